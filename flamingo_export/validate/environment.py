"""What parity needs to know of its surroundings: whether PyTorch is there, how many threads are worth it, and what ran where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform

from flamingo_export.backends.base import Backend
from flamingo_export.machine import usable_cores
from flamingo_reference.config import ModelConfig
from flamingo_reference.names import expected_tensors


def is_small(config: ModelConfig) -> bool:
    """Whether more than one thread would cost more than it brings: below 50M parameters."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values()) < 50_000_000


def torch_found() -> bool:
    """Whether PyTorch can be imported, without importing it."""
    return importlib.util.find_spec("torch") is not None


def environment(backend: Backend) -> dict[str, str]:
    """Versions and machine, for the report."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(usable_cores()),
        "backend": backend.availability().detail,
    }
    for package in ("flamingo-export", "numpy", "onnxruntime", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
