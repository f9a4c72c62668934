"""TensorRT's module and the driver: which there is, and what is said where one does not load. Both are stand-ins."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flamingo_export.backends.tensorrt import library
from flamingo_export.backends.tensorrt.library import DATACENTER, RTX, Device
from flamingo_export.errors import BackendError

NAMES = (*RTX.modules, *DATACENTER.modules)


class Driver:
    """The driver's library with a GPU of 24 GiB for each compute capability."""

    def __init__(self, *capabilities: tuple[int, int], status: int = 0) -> None:
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 100 + index
        return 0 if index < len(self.capabilities) else 101

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.capabilities[device.value - 100][{75: 0, 76: 1}[attribute]]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:  # noqa: N802
        memory._obj.value = 24 << 30
        return 0


def test_the_driver_is_asked_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def opened(name: str) -> Driver:
        asked.append(name)
        return Driver((8, 9), (12, 0))

    monkeypatch.setattr(ctypes, "CDLL", opened)
    assert library.device() == Device(target="sm89", memory=24 << 30)
    assert library.device(1) == Device(target="sm120", memory=24 << 30)
    assert library.device(2) is None
    assert library.device_count() == 2
    assert set(asked) == {"nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"}


def test_a_driver_that_does_not_start_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((8, 9), status=100))
    assert library.device() is None
    assert library.device_count() == 0


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert library.device() is None
    assert library.device_count() == 0


@pytest.mark.parametrize(
    ("found", "there"),
    [(SimpleNamespace(origin="x.so"), True), (None, False), (ImportError("x"), False), (ValueError("x"), False)],
)
def test_modules_are_looked_for_without_importing_them(found: Any, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(name: str) -> Any:
        asked.append(name)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(library, "find_spec", find)
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert library.cuda_python() is there
    assert library.installed(RTX) is there
    assert asked[:2] == ["cuda.bindings.runtime", "tensorrt_rtx"]
    assert not set(NAMES) & set(sys.modules)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules are imported from, before all others; no TensorRT is imported yet."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def test_the_module_is_given(packages: Path) -> None:
    (packages / "tensorrt_rtx.py").write_text("__version__ = '1.7.0.5'\nclass Builder: pass\n")
    assert library.installed(RTX)
    assert library.load(RTX).__file__ == str(packages / "tensorrt_rtx.py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "raise OSError('libnvinfer.so.10: cannot open shared object file')",
            r"TensorRT is installed but does not load \(libnvinfer\.so\.10: .*\)\. On the GPU host: pip install",
        ),
        (
            "import no_such_module_at_all",
            r"TensorRT is installed but does not load \(No module named 'no_such_module_at_all'\)",
        ),
        ("", r"tensorrt is installed without TensorRT's builder\. On the GPU host"),
        ("class Builder: pass\n__version__ = '10.9.0.34'", r"TensorRT 10\.9\.0\.34 is too old: .*Install 10\.15 or later"),
    ],
)
def test_a_module_that_cannot_be_used(packages: Path, text: str, words: str) -> None:
    (packages / "tensorrt.py").write_text(text)
    with pytest.raises(BackendError, match=words):
        library.load(DATACENTER)


def test_a_folder_of_that_name_is_no_library(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packages / "tensorrt").mkdir()
    monkeypatch.setattr(sys, "path", [str(packages)])
    assert not library.installed(DATACENTER)
    with pytest.raises(BackendError, match=r"^TensorRT is not installed\. On the GPU host: pip install tensorrt-cu13"):
        library.load(DATACENTER)
