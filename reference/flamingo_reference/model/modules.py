"""Single parts of the model with their weights, for running it when the whole does not fit: each read, used and dropped.

A part is named by the prefix of its parameters in a checkpoint: vision_encoder, resampler, cross_attention.i, language_model.layers.j,
language_model, which is what the layers leave of it: embedding, norm and head, or contrastive.readout, .image and .text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy.typing as npt
import torch
from torch import nn

from flamingo_reference.config import ModelConfig
from flamingo_reference.model import torch_from_numpy
from flamingo_reference.model.contrastive import Contrastive
from flamingo_reference.model.cross_attention import GatedCrossAttention
from flamingo_reference.model.decoder import LanguageModel, LanguageModelLayer
from flamingo_reference.model.resampler import make_resampler
from flamingo_reference.model.vision import make_vision_encoder


def empty_part(config: ModelConfig, prefix: str) -> nn.Module:
    """A part made from only the configuration. Raises ValueError for an unknown prefix."""
    if prefix == "vision_encoder":
        return make_vision_encoder(config.vision)
    if prefix == "resampler":
        return make_resampler(config)
    if prefix.startswith("cross_attention."):
        return GatedCrossAttention(config)
    if prefix.startswith("language_model.layers."):
        return LanguageModelLayer(config.language_model)
    if prefix == "language_model":
        return LanguageModel(msgspec.structs.replace(config.language_model, num_layers=0))
    if prefix.startswith("contrastive.") and config.contrastive is not None:
        part = getattr(Contrastive(config), prefix.removeprefix("contrastive."), None)
        if isinstance(part, nn.Module):
            return part
    raise ValueError(f"{prefix!r} is not part of a Flamingo")


def load_part(config: ModelConfig, prefix: str, read: Callable[[str], npt.NDArray[Any]]) -> nn.Module:
    """A part in fp32 with its weights, each got from `read` by its checkpoint name; nothing else of the model is read."""
    with torch.device("meta"):
        module = empty_part(config, prefix)
    state = {name: torch_from_numpy(read(f"{prefix}.{name}")).to(torch.float32) for name in module.state_dict()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()
