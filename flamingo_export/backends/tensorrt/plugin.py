"""The plugin library: where it is, which one it is, and loading it into TensorRT's registry.

TensorRT is passed as a module, so that one body serves datacenter TensorRT, its lean runtime and TensorRT for RTX. Its registry belongs to
the process, so a library is loaded once a process and module, and is never unloaded: engines keep pointers into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from flamingo_export.backends.tensorrt.machine_code import check_card
from flamingo_export.errors import BackendError, IncompatibleEngine
from flamingo_export.specs import FUNCTION_DOMAIN

LIBRARY = "libflamingo_plugins.so"
VARIABLE = "FLAMINGO_PLUGIN"
NAME, VERSION, NAMESPACE = "PhiCrossAttention", "1", FUNCTION_DOMAIN

_PACKAGE = Path(__file__).resolve().parents[2]
HOW_TO_BUILD = (
    "Build it in a source checkout, with nvcc and TensorRT's headers: cmake -S . -B build && cmake --build build --target flamingo_plugins; "
    f"or name a built one: {VARIABLE}=/path/to/{LIBRARY}"
)

_loaded: dict[str, str] = {}  # module name -> digest of the library in its registry


def find_plugin(environment: Mapping[str, str] | None = None, *, package: Path = _PACKAGE) -> Path | None:
    """The plugin library, or None: of the variable FLAMINGO_PLUGIN, in the package's lib/, in the build/ of a source checkout.

    environment: None takes the process's. Raises BackendError where the variable names no file: an explicit wish is not passed over.
    """
    named = (os.environ if environment is None else environment).get(VARIABLE)
    if named:
        path = Path(os.path.expanduser(named))  # as Path.expanduser, which is an error where there is no home folder
        if not path.is_file():
            raise BackendError(f"{VARIABLE} names {named}, which is not a file. Correct it or unset it.")
        return path.resolve()
    candidates = [package / "lib" / LIBRARY]
    if (package.parent / "trt_plugins").is_dir():
        candidates.append(package.parent / "build" / LIBRARY)
    return next((path.resolve() for path in candidates if path.is_file()), None)


def digest(path: Path) -> str:
    """SHA-256 of a library, as the manifest records it. Raises BackendError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BackendError(f"the plugin library {path} cannot be read ({error.strerror})") from error


def load(trt: ModuleType, path: Path | None = None, *, expected: str | None = None, target: str | None = None) -> str:
    """Loads the plugin library into the registry of `trt` unless it is there already, and returns its digest.

    path: None looks as find_plugin does. expected: the digest that the manifest of a bundle names, which the library must have.
    target: the GPU (`sm89`) that it must have code for.
    Raises BackendError where there is no library, it has no such code or TensorRT does not take it, IncompatibleEngine where it is another one
    than expected.
    """
    path = path or find_plugin()
    if path is None:
        raise BackendError(f"the plugin library {LIBRARY} was not found. {HOW_TO_BUILD}")
    found = digest(path)
    if expected is not None and found != expected:
        raise IncompatibleEngine(
            f"{path} has digest {found[:12]}..., the engine was built with {expected[:12]}.... "
            f"Name the library it was built with ({VARIABLE}=...), or build the engine again with this one."
        )
    if target is not None:
        check_card(path, found, target)
    registry = trt.get_plugin_registry()
    if _registered(registry):
        _check_same(trt, path, found)
        return found
    _check_rtx_resolves(trt)
    if registry.load_library(str(path)) is None or not _registered(registry):
        raise BackendError(f"TensorRT {trt.__version__} does not take the plugin library {path}: {_why_not(path)}")
    _loaded[trt.__name__] = found
    return found


def _registered(registry: Any) -> bool:
    """By the list: `get_creator` reports an error to the log where there is none."""
    wanted = (NAME, VERSION, NAMESPACE)
    return any((one.name, one.plugin_version, one.plugin_namespace) == wanted for one in registry.all_creators)


def offered(trt: ModuleType, functions: Collection[str]) -> frozenset[str]:
    """Those of the functions that the library in the registry computes: one that was built before a function came to be lacks it."""
    present = {
        one.name
        for one in trt.get_plugin_registry().all_creators
        if (one.plugin_version, one.plugin_namespace) == (VERSION, NAMESPACE)
    }
    return frozenset(name for name in functions if name in present)


def _check_same(trt: ModuleType, path: Path, found: str) -> None:
    present = _loaded.get(trt.__name__)
    if present != found:
        which = f"with digest {present[:12]}..." if present else "loaded by other code"
        raise IncompatibleEngine(
            f"this process already has {NAMESPACE}::{NAME} from a library {which}; {path} has {found[:12]}.... "
            "A process takes one plugin library: start another one."
        )


def _check_rtx_resolves(trt: ModuleType) -> None:
    """TensorRT for RTX opens itself as libtensorrt_rtx.so when its parser meets a plugin, and ends the process where it cannot."""
    if not trt.__name__.startswith("tensorrt_rtx"):
        return
    try:
        ctypes.CDLL("libtensorrt_rtx.so")
    except OSError as error:
        raise BackendError(
            "TensorRT for RTX takes plugins only where the loader finds libtensorrt_rtx.so, and its wheel has only libtensorrt_rtx.so.1. "
            "Put a link of that name into a folder of LD_LIBRARY_PATH, or leave the plugin out: the graph's own function serves."
        ) from error


def _why_not(path: Path) -> str:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    missing = [name for name in ("getCreators", "setLoggerFinder") if not hasattr(library, name)]
    return f"it lacks {' and '.join(missing)}" if missing else "its registry refused it"
