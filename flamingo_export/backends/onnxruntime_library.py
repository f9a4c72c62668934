"""ONNX Runtime's Python module: importing it, the versions that can run bundles, and what to install where there is none.

Two distributions, `onnxruntime` and `onnxruntime-gpu`, own one folder of site-packages, so they come by extra and never together.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from flamingo_export.errors import BackendError, pip_install

LOWEST = (1, 30)
"""1.24 has no TensorScatter for CPUs; 1.25 to 1.29 compute the resampler so inexactly that nano misses a gate on some processors
(docs/development.md). pyproject.toml asks for the same."""
DISTRIBUTIONS = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}
"""Extras and what they bring."""
INSTALL = f"For CPUs: {pip_install('cpu')}; for NVIDIA GPUs: {pip_install('gpu')}."


def load() -> ModuleType:
    """The module `onnxruntime`. Raises BackendError, with what to install, where it is missing, does not load or is too old."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported ({error}). {INSTALL}") from error
    fault = too_old(onnxruntime.__version__)
    if fault:
        raise BackendError(f"{fault}. {INSTALL}")
    module: ModuleType = onnxruntime
    return module


def too_old(found: str) -> str | None:
    """What is wrong with a version of ONNX Runtime, None where it can run bundles."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= LOWEST:
        return None
    return f"onnxruntime {found} is too old to run bundles: {lowest()} or later is needed"


def lowest() -> str:
    """The lowest version, as people write it."""
    return ".".join(map(str, LOWEST))


def installed() -> dict[str, str]:
    """Versions of the distributions that are installed, by name; more than one is a fault."""
    found = {}
    for name in DISTRIBUTIONS.values():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
