"""Choices that several components have, and the error of a configuration."""

from __future__ import annotations

from typing import Literal

Activation = Literal["relu", "squared_relu", "gelu", "quick_gelu"]
"""gelu is the exact one (erf); quick_gelu is x * sigmoid(1.702 x), CLIP's."""
FeedForward = Literal["relu", "squared_relu", "gelu", "quick_gelu", "swiglu"]
"""down(activation(up(x))), or for swiglu down(swish(gate(x)) * up(x)) (Shazeer 2020)."""
Norm = Literal["layer_norm", "rms_norm"]


class ConfigError(ValueError):
    """A model configuration that cannot be built; the message names the field."""
