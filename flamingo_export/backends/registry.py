"""The backends by name. Each is imported when it is asked for, so that a missing package costs nothing to those who do not use it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from flamingo_export.backends.base import Availability, Backend
from flamingo_export.backends.compiler import Compiler
from flamingo_export.errors import BackendError

if TYPE_CHECKING:
    from flamingo_export.bundle.manifest import Manifest

_BACKENDS = MappingProxyType(
    {
        "onnxruntime": ("flamingo_export.backends.onnxruntime", "OnnxRuntimeBackend"),
        "reference": ("flamingo_export.backends.reference", "ReferenceBackend"),
    }
)
_COMPILERS = MappingProxyType(
    {
        "tensorrt-rtx": ("flamingo_export.backends.tensorrt.backend", "tensorrt_backend"),
        "tensorrt": ("flamingo_export.backends.tensorrt.backend", "tensorrt_backend"),
    }
)
COMPILERS = tuple(_COMPILERS)
"""Backends that compile engines into a bundle. Each has a function of its name and target that makes it."""
BACKEND_NAMES = (*_BACKENDS, *COMPILERS)
PREFERRED = ("tensorrt", "tensorrt-rtx", "onnxruntime")
"""What `auto` tries, best first. The reference is never chosen by itself: it is there to be compared with."""


def get_backend(name: str, manifest: Manifest | None = None, *, gpus: Sequence[int] = ()) -> Backend:
    """The backend of that name; `auto` is the first of PREFERRED that can run here, TensorRT only for a bundle with engines that fit.

    manifest: of the bundle that is to be run. gpus: those that engines must be for; none: the first.
    Raises BackendError if there is no such backend, or it cannot run here (with what to install).
    """
    if name == "auto":
        return _first_usable(manifest, gpus or (0,))
    if name not in BACKEND_NAMES:
        raise BackendError(f"there is no backend {name!r}. Choose one of: auto, {', '.join(BACKEND_NAMES)}.")
    backend = _load(name)
    state = backend.availability()
    if not state.usable:
        raise BackendError(f"backend {name} cannot run here: {state.detail}." + _advice(state))
    return backend


def get_compiler(name: str, *, target: str | None = None) -> Compiler:
    """The backend that compiles engines, whether or not it can run them here; target: `sm89`, None for this machine's GPU.

    Raises BackendError if there is none of that name. What its library lacks here, its `prepare` says.
    """
    if name not in COMPILERS:
        raise BackendError(f"{name!r} compiles no engines. Choose one of: {', '.join(COMPILERS)}.")
    module, function = _COMPILERS[name]
    compiler: Compiler = getattr(importlib.import_module(module), function)(name, target=target)
    return compiler


def compiler_of(name: str, *, target: str | None = None) -> Compiler | None:
    """`get_compiler`, or None for a backend that runs the graphs as they are."""
    return get_compiler(name, target=target) if name in COMPILERS else None


def availability() -> dict[str, Availability]:
    """How each backend stands on this machine, in the order of BACKEND_NAMES."""
    return {name: _load(name).availability() for name in BACKEND_NAMES}


def _first_usable(manifest: Manifest | None, gpus: Sequence[int]) -> Backend:
    refused = []
    for name in PREFERRED:
        if name in COMPILERS:
            # Nothing of TensorRT is imported for a bundle without engines.
            engines = manifest.engines if manifest is not None else ()
            if manifest is not None and any(engine.backend == name for engine in engines):
                compiler = get_compiler(name)
                if compiler.fits(manifest, gpus):
                    return compiler
            continue
        backend = _load(name)
        state = backend.availability()
        if state.usable:
            return backend
        refused.append(f"{name}: {state.detail}." + _advice(state))
    raise BackendError("no backend can run here. " + " ".join(refused))


def _advice(state: Availability) -> str:
    return f" {state.remedy}" if state.remedy else ""


def _load(name: str) -> Backend:
    if name in COMPILERS:
        return get_compiler(name)
    module, attribute = _BACKENDS[name]
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
