"""Single parts of the model with their weights, for running it when the whole does not fit: each read, used and dropped.

A part is named by the prefix of its parameters in a checkpoint: vision_encoder, resampler, cross_attention.i, language_model.layers.j,
language_model, which is what the layers leave of it: embedding, norm and head, or contrastive.readout, .image and .text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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


def load_part(config: ModelConfig, prefix: str, read: Callable[[str], npt.NDArray[Any]], *, narrow: bool = False) -> nn.Module:
    """A part in fp32 with its weights, each got from `read` by its checkpoint name; nothing else of the model is read.

    narrow: weights are held in the type that they are read in, and a leaf's are fp32 only while it runs, which computes the same numbers.
        Of a Llama 3.2 Vision of 11B, the vision encoder is one part of 3.4 GB in fp32, embedding and head another of 4.2.
    """
    with torch.device("meta"):
        module = empty_part(config, prefix)
    state = {name: torch_from_numpy(read(f"{prefix}.{name}")) for name in module.state_dict()}
    if not narrow:
        state = {name: tensor.to(torch.float32) for name, tensor in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()
    if narrow:
        _widen_at_use(module)
    return module


def _widen_at_use(module: nn.Module) -> None:
    for buffer in module.buffers():
        buffer.data = buffer.data.float()
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if next(part.children(), None) is not None:
            for parameter in own:
                parameter.data = parameter.data.float()
        elif isinstance(part, nn.Embedding):  # of its rows only those that are looked up
            part.register_forward_hook(_widened)
        elif any(parameter.dtype != torch.float32 for parameter in own):
            held = [parameter.data for parameter in own]
            part.register_forward_pre_hook(functools.partial(_set, own, [None] * len(own)))
            part.register_forward_hook(functools.partial(_set, own, held))


def _widened(_: nn.Module, __: Any, found: torch.Tensor) -> torch.Tensor:
    return found.float()


def _set(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor | None], *_: Any) -> None:
    """Gives parameters these values; None makes theirs fp32."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = parameter.data.float() if value is None else value
