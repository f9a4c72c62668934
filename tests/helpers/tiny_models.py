"""Tiny seeded models without a silent part."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import nn

from flamingo_reference.config import (
    NANO,
    CrossAttentionConfig,
    LanguageModelConfig,
    ModelConfig,
    NFNetConfig,
    ResamplerConfig,
    TokenIds,
)
from flamingo_reference.model import Flamingo

# Every size differs from every other, so that axes that change places are noticed; gated before layers 0, 2 and 4.
TINY = ModelConfig(
    name="tiny",
    vision=NFNetConfig(
        image_size=40, widths=(16, 48), depths=(1, 2), stem_widths=(4, 8, 16, 32), feature_width=40, group_width=8
    ),
    resampler=ResamplerConfig(
        num_layers=2, width=20, num_heads=3, head_size=6, ffw_width=28, num_latents=7, num_time_embeddings=8
    ),
    cross_attention=CrossAttentionConfig(every=2, num_heads=2, head_size=10, ffw_width=36),
    language_model=LanguageModelConfig(
        num_layers=5, width=24, num_heads=4, head_size=8, ffw_width=44, vocab_size=61, max_positions=12
    ),
    tokens=TokenIds(pad=0, bos=1, eoc=2, image=3),
)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Numbers for every parameter that initialisation leaves at zero or one, so that no part of the model is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("gain"):
                drawn = 1.0 + 0.3 * drawn
            elif name.endswith("gate"):
                drawn = 0.7 + 0.3 * drawn
            elif parameter.dim() < 2:
                drawn = 0.3 * drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif parameter.dim() == 2 and not name.endswith(("latents", "time_embeddings")):
                drawn = drawn / parameter.shape[-1] ** 0.5
            parameter.copy_(drawn)


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> Flamingo:
    """A float64 model without a silent part."""
    model = Flamingo(config).double()
    randomise(model, seed)
    return model.requires_grad_(False).eval()


def smaller(config: ModelConfig = NANO, **parts: Any) -> ModelConfig:
    """A config with some parts' fields replaced: smaller(vision={"image_size": 32})."""
    changed = {name: msgspec.structs.replace(getattr(config, name), **fields) for name, fields in parts.items()}
    return msgspec.structs.replace(config, **changed)
