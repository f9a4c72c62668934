"""Tiny seeded models, and timm without torchvision."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY, tiny_model

from flamingo_reference.model import Flamingo


@pytest.fixture
def tiny() -> Flamingo:
    return tiny_model()


@pytest.fixture
def bank(tiny: Flamingo) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of five media."""
    resampler = TINY.resampler
    latents = torch.from_numpy(np.random.default_rng(1).standard_normal((5, resampler.num_latents, resampler.width)))
    return tiny.media_kv(latents)


class _AnyMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Any


class _Any(metaclass=_AnyMeta):
    """Stands for whatever timm imports from torchvision and these tests never use."""


_InterpolationMode = enum.Enum(  # type: ignore[misc]
    "_InterpolationMode", {name.upper(): name for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")}
)


class _StandIn(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - a package, so that its submodules can be imported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _InterpolationMode if name == "InterpolationMode" else _Any


_STAND_INS = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


@pytest.fixture(scope="session")
def nfnet_module() -> ModuleType:
    """timm's NFNet module. timm is installed without torchvision, of which it needs names only: they are stood in for while it loads."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed (pip install --no-deps timm)")
    missing = importlib.util.find_spec("torchvision") is None
    if missing:
        sys.modules.update({name: _StandIn(name) for name in _STAND_INS})
    try:
        module = importlib.import_module("timm.models.nfnet")
    finally:
        if missing:
            for name in _STAND_INS:
                del sys.modules[name]
    return module
