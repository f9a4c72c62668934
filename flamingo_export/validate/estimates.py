"""What parity needs to know of model and machine: how much memory each side takes, and what ran where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform

from flamingo_export.backends.base import Backend
from flamingo_reference.config import ModelConfig
from flamingo_reference.names import expected_tensors


def is_small(config: ModelConfig) -> bool:
    """Whether more than one thread would cost more than it brings: below 50M parameters."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values()) < 50_000_000


def torch_found() -> bool:
    """Whether PyTorch can be imported, without importing it."""
    return importlib.util.find_spec("torch") is not None


def reference_bytes(config: ModelConfig) -> int:
    """Estimate of what the whole reference takes for token traces: fp64 and fp32 side by side, and activations."""
    return int(12.5 * sum(math.prod(shape) for shape in expected_tensors(config).values())) + (300 << 20)


def engine_bytes(config: ModelConfig) -> int:
    """Estimate of what all engines take at once: fp32 weights, a second copy while they are packed, caches and activations."""
    return int(8.5 * sum(math.prod(shape) for shape in expected_tensors(config).values())) + (300 << 20)


def environment(backend: Backend) -> dict[str, str]:
    """Versions and machine, for the report."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "backend": backend.availability().detail,
    }
    for package in ("flamingo-export", "numpy", "onnxruntime", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
