"""Where the plugin library is looked for, and what is said when it is not there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from flamingo_export.backends.tensorrt import plugin
from flamingo_export.errors import BackendError, IncompatibleEngine


def checkout(root: Path) -> Path:
    """A source checkout; returns its package's folder."""
    (root / "trt_plugins").mkdir()
    package = root / "flamingo_export"
    package.mkdir()
    return package


def put(path: Path, content: bytes = b"library") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_variable_then_the_package_then_the_checkout(tmp_path: Path) -> None:
    package = checkout(tmp_path)
    assert plugin.find_plugin({}, package=package) is None
    built = put(tmp_path / "build" / plugin.LIBRARY)
    assert plugin.find_plugin({}, package=package) == built
    shipped = put(package / "lib" / plugin.LIBRARY)
    assert plugin.find_plugin({}, package=package) == shipped
    named = put(tmp_path / "elsewhere" / "mine.so")
    assert plugin.find_plugin({"FLAMINGO_PLUGIN": str(named)}, package=package) == named
    assert plugin.find_plugin({"FLAMINGO_PLUGIN": ""}, package=package) == shipped


def test_a_build_folder_beside_an_installed_package_is_not_ours(tmp_path: Path) -> None:
    put(tmp_path / "build" / plugin.LIBRARY)
    assert plugin.find_plugin({}, package=tmp_path / "flamingo_export") is None


def test_the_process_environment_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = put(tmp_path / "mine.so")
    monkeypatch.setenv("FLAMINGO_PLUGIN", str(named))
    assert plugin.find_plugin() == named


def test_a_variable_that_names_nothing_is_not_passed_over(tmp_path: Path) -> None:
    package = checkout(tmp_path)
    put(package / "lib" / plugin.LIBRARY)
    with pytest.raises(BackendError, match=r"FLAMINGO_PLUGIN names .*absent\.so, which is not a file"):
        plugin.find_plugin({"FLAMINGO_PLUGIN": str(tmp_path / "absent.so")}, package=package)


def test_digest(tmp_path: Path) -> None:
    assert plugin.digest(put(tmp_path / "a.so", b"abc")) == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(BackendError, match="cannot be read"):
        plugin.digest(tmp_path)


CREATOR = SimpleNamespace(name="PhiCrossAttention", plugin_version="1", plugin_namespace="flamingo")


class Registry:
    """TensorRT's registry as far as loading goes; `takes`: whether it accepts a library."""

    def __init__(self, takes: bool = True, there: bool = False) -> None:
        self.takes = takes
        other = SimpleNamespace(name="PhiCrossAttention", plugin_version="1", plugin_namespace="")
        self.all_creators = [other, CREATOR] if there else [other]
        self.loaded: list[str] = []

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        if not self.takes:
            return None
        self.all_creators.append(CREATOR)
        return object()


def module(registry: Registry, name: str = "tensorrt_of_a_test") -> ModuleType:
    return SimpleNamespace(__name__=name, __version__="11.1.0", get_plugin_registry=lambda: registry)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_loaded", {})


def test_a_library_is_loaded_once(tmp_path: Path) -> None:
    registry = Registry()
    path = put(tmp_path / "a.so")
    first = plugin.load(module(registry), path)
    assert plugin.load(module(registry), path, expected=first) == first == plugin.digest(path)
    assert registry.loaded == [str(path)]


def test_another_library_is_not_taken_for_the_loaded_one(tmp_path: Path) -> None:
    registry = Registry()
    plugin.load(module(registry), put(tmp_path / "a.so"))
    with pytest.raises(IncompatibleEngine, match="already has flamingo::PhiCrossAttention from a library with digest"):
        plugin.load(module(registry), put(tmp_path / "b.so", b"other"))
    with pytest.raises(IncompatibleEngine, match="loaded by other code"):
        plugin.load(module(Registry(there=True), "another_tensorrt"), tmp_path / "a.so")


def test_another_digest_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    registry = Registry()
    with pytest.raises(IncompatibleEngine, match=r"the engine was built with 000000000000\.\.\.\. Name the library"):
        plugin.load(module(registry), put(tmp_path / "a.so"), expected="0" * 64)
    assert not registry.loaded


def test_no_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "find_plugin", lambda: None)
    with pytest.raises(BackendError, match=r"was not found.*cmake --build build --target flamingo_plugins"):
        plugin.load(module(Registry()))


def test_a_file_that_is_no_library_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"TensorRT 11\.1\.0 does not take the plugin library .*(invalid ELF header|file too short)"
    ):
        plugin.load(module(Registry(takes=False)), put(tmp_path / "a.so"))


def test_rtx_without_its_short_name_is_an_error_not_an_abort(tmp_path: Path) -> None:
    registry = Registry()
    with pytest.raises(BackendError, match=r"libtensorrt_rtx\.so"):
        plugin.load(module(registry, "tensorrt_rtx_bindings"), put(tmp_path / "a.so"))
    assert not registry.loaded


def test_a_library_from_before_a_function_came_to_be_offers_the_others() -> None:
    """Its own version stays what it was, so engines that call it open as before."""
    both = {"PhiCrossAttention", "PhiRangeCrossAttention"}
    registry = Registry(there=True)
    assert plugin.offered(module(registry), both) == {"PhiCrossAttention"}
    registry.all_creators.append(
        SimpleNamespace(name="PhiRangeCrossAttention", plugin_version="2", plugin_namespace="flamingo")
    )
    assert plugin.offered(module(registry), both) == {"PhiCrossAttention"}
    registry.all_creators.append(
        SimpleNamespace(name="PhiRangeCrossAttention", plugin_version="1", plugin_namespace="flamingo")
    )
    assert plugin.offered(module(registry), both) == both


@pytest.mark.parametrize("named", ["~/plugin.so", "~nobody-of-this-name/plugin.so"])
def test_a_plugin_in_the_home_folder_of_nobody_is_not_a_file(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> None:
        raise KeyError("not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(BackendError, match=r"FLAMINGO_PLUGIN names ~.*, which is not a file"):
        plugin.find_plugin({"FLAMINGO_PLUGIN": named})
