"""What this machine has: processor, memory, disk, and the software that can run graphs. Probes only; imports none of it."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flamingo_export.errors import pip_install

if TYPE_CHECKING:
    from flamingo_export.backends.tensorrt.library import Library

RTX, DATACENTER, PLUGIN = "TensorRT for RTX", "TensorRT (datacenter)", "flamingo plugin library"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked for: whether it is there, what was found, and what to do if it is wanted and missing."""

    name: str
    found: bool
    detail: str
    remedy: str | None = None


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Processor, memory and disk; sizes in bytes."""

    system: str
    python: str
    processor: str
    cores: int
    """Cores this process may use."""
    vector_extensions: tuple[str, ...]
    memory: int
    memory_available: int
    disk_folder: str
    disk_free: int


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A CUDA device as the driver describes it."""

    name: str
    compute_capability: str
    memory: int


def hardware(folder: Path) -> Hardware:
    """This machine's processor and memory, and the disk that `folder` is on."""
    from flamingo_export.machine import available_memory, total_memory, usable_cores

    model, flags = _processor()
    return Hardware(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=model,
        cores=usable_cores(),
        vector_extensions=flags,
        memory=total_memory(),
        memory_available=available_memory(),
        disk_folder=str(folder.resolve()),
        disk_free=shutil.disk_usage(folder).free,
    )


def _processor() -> tuple[str, tuple[str, ...]]:
    """Model name and those vector extensions that ONNX Runtime's kernels use; Linux tells both, others the name at best."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return model, ()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    wanted = (
        "avx2",
        "f16c",
        "fma",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_bf16",
        "amx_int8",
        "asimd",
        "asimddp",
        "i8mm",
    )
    return model, tuple(flag for flag in wanted if flag in flags)


def package(name: str, *modules: str) -> str | None:
    """Installed version of distribution `name`, or None; `modules` must be importable too, where given."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return None
    return found if all(_importable(module) for module in modules) else None


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def onnxruntime() -> Finding:
    """ONNX Runtime and the execution providers of this build of it. Not found: missing, too old, or two builds in one folder."""
    from flamingo_export.backends import onnxruntime_library as library

    name, installed = "ONNX Runtime", library.installed()
    if len(installed) > 1:
        both = " and ".join(f"{each} {number}" for each, number in installed.items())
        return Finding(
            name=name,
            found=False,
            detail=f"{both} are both installed; they own one folder, so what is in it is of one or the other",
            remedy=f"pip uninstall {' '.join(installed)}; then one. {library.INSTALL}",
        )
    try:
        import onnxruntime as runtime
    except ImportError as error:
        return Finding(name=name, found=False, detail=f"does not load: {error}", remedy=library.INSTALL)
    fault = library.too_old(runtime.__version__)
    if fault:
        return Finding(name=name, found=False, detail=fault, remedy=library.INSTALL)
    providers = ", ".join(each.removesuffix("ExecutionProvider") for each in runtime.get_available_providers())
    return Finding(name=name, found=True, detail=f"{runtime.__version__}; providers {providers}")


def packages() -> Finding:
    """Whether each package that this one asks for, extras' where they are installed, has a version that it admits."""
    from packaging.requirements import Requirement

    name = "Python packages"
    try:
        lines = requires("flamingo-export") or []
    except PackageNotFoundError:  # run from its source folder without having been installed
        return Finding(name=name, found=False, detail="flamingo-export is not installed", remedy=pip_install("cpu"))
    fitting, wrong = set(), {}
    for asked in map(Requirement, lines):
        found = package(asked.name)
        if found is not None and asked.specifier.contains(found, prereleases=True):
            fitting.add(asked.name)
        elif found is not None or asked.marker is None or asked.marker.evaluate({"extra": ""}):
            wrong[f"{asked.name}{asked.specifier}"] = f"{asked.name} {found or 'is missing'}"
    if not wrong:
        return Finding(name=name, found=True, detail=f"{len(fitting)} found, each of a version that is admitted")
    return Finding(
        name=name,
        found=False,
        detail=f"of a version that is not admitted: {', '.join(wrong.values())}",
        remedy=f"pip install {' '.join(map(repr, wrong))}",
    )


def torch() -> Finding:
    """PyTorch, only by its version: importing it takes seconds."""
    found = package("torch", "torch")
    if found is None:
        return Finding(name="PyTorch", found=False, detail="not installed", remedy=pip_install("torch"))
    return Finding(name="PyTorch", found=True, detail=found)


def cuda() -> tuple[Finding, list[Gpu]]:
    """The NVIDIA driver and its devices, asked through the driver's own library."""
    name = "NVIDIA driver"
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Finding(name=name, found=False, detail="libcuda not found", remedy="for a GPU: install the NVIDIA driver"), []
    status = driver.cuInit(0)
    if status != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        why = text.value.decode() if text.value else "no description"
        return Finding(name=name, found=False, detail=f"cuInit failed with {status} ({why})", remedy="check nvidia-smi"), []
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    detail = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    devices = _devices(driver)
    return Finding(name=name, found=bool(devices), detail=f"{detail}, {len(devices)} GPUs"), devices


def _devices(driver: ctypes.CDLL) -> list[Gpu]:
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append(Gpu(name=name.value.decode(), compute_capability=f"{major.value}.{minor.value}", memory=memory.value))
    return found


def tensorrt() -> list[Finding]:
    """TensorRT for RTX, datacenter TensorRT with its libraries, headers, our plugin library, and the CUDA compiler."""
    from flamingo_export.backends.tensorrt import library

    rtx, bindings = library.RTX, library.DATACENTER
    versions = ("tensorrt-rtx", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings")
    found = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_cu13_bindings", "tensorrt_cu12_bindings")
    runtime = ctypes.util.find_library("nvinfer") or _wheel_library("tensorrt_libs", "libnvinfer.so*")
    header = _first_file("NvInfer.h", _include_folders())
    compiler = shutil.which("nvcc") or _first_file("nvcc", [Path("/usr/local/cuda/bin")])
    return [
        _finding(RTX, _first_package(*versions) or _module_of(rtx), rtx.install),
        _finding(DATACENTER, _first_package(*found) or _module_of(bindings), bindings.install),
        _finding(
            "TensorRT libraries", runtime, "on a GPU host: NVIDIA's tar or Debian packages (libnvinfer), or the wheel above"
        ),
        _finding("TensorRT headers", header, "libnvinfer-headers-dev, or set TENSORRT_ROOT to an unpacked TensorRT"),
        _plugin(),
        _finding("CUDA compiler (nvcc)", compiler, "the CUDA toolkit 12.8 or later"),
    ]


def _module_of(library: Library) -> str | None:
    """A library that can be imported though no distribution of it is installed: a folder on PYTHONPATH."""
    from flamingo_export.backends.tensorrt.library import installed

    return f"a module {' or '.join(library.modules)}" if installed(library) else None


def _plugin() -> Finding:
    """Our plugin library, which datacenter TensorRT needs."""
    from flamingo_export.backends.tensorrt import plugin
    from flamingo_export.errors import BackendError

    try:
        path = plugin.find_plugin()
    except BackendError as error:
        return Finding(name=PLUGIN, found=False, detail=str(error), remedy=plugin.HOW_TO_BUILD)
    return _finding(PLUGIN, str(path) if path is not None else None, plugin.HOW_TO_BUILD)


def _finding(name: str, found: str | None, remedy: str) -> Finding:
    return Finding(name=name, found=found is not None, detail=found or "not found", remedy=None if found else remedy)


def _first_package(*names: str) -> str | None:
    for name in names:
        found = package(name)
        if found is not None:
            return f"{name} {found}"
    return None


def _include_folders() -> Sequence[Path]:
    root = os.environ.get("TENSORRT_ROOT")
    folders = [Path(root) / "include"] if root else []
    machine = f"{platform.machine()}-linux-gnu"
    return [
        *folders,
        *map(Path, ("/usr/include", f"/usr/include/{machine}", "/usr/local/tensorrt/include", "/opt/tensorrt/include")),
    ]


def _first_file(name: str, folders: Sequence[Path]) -> str | None:
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


def _wheel_library(module: str, pattern: str) -> str | None:
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        match = next(Path(folder).glob(pattern), None)
        if match is not None:
            return str(match)
    return None
