"""What several parts of the model are made of: norms, activations, the feed-forward half of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import FeedForward, Norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_norm(kind: Norm, width: int, eps: float, *, bias: bool = True) -> RMSNorm | nn.LayerNorm:
    """A norm over the last axis. bias: of a LayerNorm; RMSNorm has none."""
    return RMSNorm(width, eps) if kind == "rms_norm" else nn.LayerNorm(width, eps, bias=bias)


class HookPoint(nn.Module):
    """Passes tensors on as they are, so that others can listen: a forward hook on it sees what one half of a computation gives the other,
    or replaces it by what it returns. Calibration counts there, parity rounds there; a live model with such hooks is not exported."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021)."""
    return F.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), which CLIP was trained with in place of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"relu": F.relu, "squared_relu": squared_relu, "gelu": F.gelu, "quick_gelu": quick_gelu}
)


def make_swish(kind: FeedForward, width: int, inner: int, *, bias: bool = False) -> nn.Linear | None:
    """The projection that swiglu has beside `ffw_up`; None for the other kinds."""
    return nn.Linear(width, inner, bias=bias) if kind == "swiglu" else None


def feed_forward(x: Tensor, kind: FeedForward, *, up: nn.Linear, down: nn.Linear, swish: nn.Linear | None) -> Tensor:
    """down(activation(up(x))), or for swiglu down(swish(swish_proj(x)) * up(x))."""
    inner = up(x)
    projected: Tensor = down(ACTIVATIONS[kind](inner) if swish is None else F.silu(swish(x)) * inner)
    return projected
