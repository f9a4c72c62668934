"""What makes a configuration impossible to build, each fault with the field and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from flamingo_reference.config.text_decoder import AlibiPositions, LanguageModelConfig, RelativePositions, RotaryPositions
from flamingo_reference.config.vision_encoders import OwnVisionConfig, TiledViTConfig, VisionConfig, ViTConfig
from flamingo_reference.contrastive_config import faults as contrastive_faults

if TYPE_CHECKING:
    from flamingo_reference.config.model_config import ModelConfig

_MOST_LAYERS = 10_000
"""Hundreds of times what models have: every layer has names of its own, so a number that is not one must not be counted up to."""
_MOST_POSITIONS = 1 << 24
_MOST_TILES = 64
_LEAST_STD, _MOST_COLOUR = 1e-4, 10
"""Of pixels from 0 to 1: models have 0.2 to 0.6, and means and deviations of pixels from 0 to 255 would make every image one grey."""
_MAY_BE_ZERO = (
    "cross_attention.offset",
    "resampler.num_time_embeddings",
    "language_model.extra_embeddings",
    "vision.num_global_layers",
    "vision.feature_layers",
)
_NONE_IN_A_PROJECTOR = ("num_layers", "num_heads", "head_size", "ffw_width", "num_time_embeddings")


def faults_of(config: ModelConfig) -> Iterator[str]:
    """Each fault, beginning with the field that has it."""
    yield from _sizes(config)
    yield from _vision(config.vision)
    yield from _bridge(config)
    yield from _language_model(config.language_model)
    yield from _tokens(config)
    if config.contrastive is not None:
        yield from contrastive_faults(config.contrastive, vision=str(type(config.vision).__struct_config__.tag))
    if min(config.pixel_std) <= 0:
        yield f"pixel_std {config.pixel_std} has an entry that is not positive"
    elif not all(_LEAST_STD <= std <= _MOST_COLOUR for std in config.pixel_std):
        yield f"pixel_std {config.pixel_std} is outside {_LEAST_STD} to {_MOST_COLOUR}, expected that of pixels from 0 to 1"
    if not all(-_MOST_COLOUR <= mean <= _MOST_COLOUR for mean in config.pixel_mean):
        yield f"pixel_mean {config.pixel_mean} is outside -{_MOST_COLOUR} to {_MOST_COLOUR}, expected that of pixels from 0 to 1"


def _sizes(config: ModelConfig) -> Iterator[str]:
    for part in ("vision", "resampler", "cross_attention", "language_model"):
        for field, value in msgspec.structs.asdict(getattr(config, part)).items():
            least = 0 if f"{part}.{field}" in _MAY_BE_ZERO else 1
            if part == "resampler" and config.resampler.kind == "projector" and field in _NONE_IN_A_PROJECTOR:
                if value != 0:
                    yield f"{part}.{field} is {value}, a projector has none"
                continue
            if field == "norm_eps" and not 0 < value < 1:
                yield f"{part}.norm_eps is {value}, expected a small positive number"
            counts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(count, int) and not isinstance(count, bool) and count < least for count in counts):
                yield f"{part}.{field} is {value}, expected at least {least}"
            if field in ("num_layers", "depths") and max(counts, default=0) > _MOST_LAYERS:
                yield f"{part}.{field} is {value}, expected at most {_MOST_LAYERS}"


def _vision(vision: VisionConfig) -> Iterator[str]:
    if isinstance(vision, OwnVisionConfig):
        return
    if isinstance(vision, TiledViTConfig):
        yield from _tiles(vision)
    if isinstance(vision, ViTConfig | TiledViTConfig):
        if vision.num_heads > 0 and vision.width % vision.num_heads:
            yield f"vision.num_heads {vision.num_heads} does not divide vision.width {vision.width}"
        if vision.image_size < vision.patch_size:
            yield f"vision.patch_size {vision.patch_size} is larger than vision.image_size {vision.image_size}"
        return
    if len(vision.widths) != len(vision.depths) or not vision.widths:
        yield f"vision.widths {vision.widths} and vision.depths {vision.depths} differ in length or are empty"
    ratios = {"bottleneck_ratio": vision.bottleneck_ratio, "squeeze_excite_ratio": vision.squeeze_excite_ratio}
    wrong = [f"vision.{name} is {ratio}, expected one from 0 to 16" for name, ratio in ratios.items() if not 0 < ratio <= 16]
    yield from wrong
    for width in () if wrong else vision.widths:
        middle = int(width * vision.bottleneck_ratio)
        if vision.group_width > 0 and (middle < 1 or middle % vision.group_width):
            yield f"vision.group_width {vision.group_width} does not divide bottleneck width {middle}"


def _tiles(vision: TiledViTConfig) -> Iterator[str]:
    if vision.max_tiles > _MOST_TILES:
        yield f"vision.max_tiles is {vision.max_tiles}, expected at most {_MOST_TILES}"
    if any(layer >= vision.num_layers for layer in vision.feature_layers):
        yield f"vision.feature_layers {vision.feature_layers} names a layer beyond the {vision.num_layers} that there are"
    if len(set(vision.feature_layers)) != len(vision.feature_layers):
        yield f"vision.feature_layers {vision.feature_layers} names a layer twice"


def _bridge(config: ModelConfig) -> Iterator[str]:
    resampler, block = config.resampler, config.cross_attention
    if resampler.kind == "projector" and resampler.num_latents != config.vision.num_patches:
        yield f"resampler.num_latents {resampler.num_latents} differs from the {config.vision.num_patches} features of a medium"
    if resampler.kind == "projector" and not resampler.input_proj:
        yield "resampler.input_proj is false: a projector is that matrix and nothing else"
    if isinstance(config.vision, TiledViTConfig) and resampler.kind != "projector":
        yield "resampler.kind is perceiver; tiles go through a projector"
    if block.kv_heads > 0 and block.num_heads % block.kv_heads:
        yield f"cross_attention.num_kv_heads {block.kv_heads} does not divide num_heads {block.num_heads}"
    if not resampler.input_proj and resampler.width != config.vision.feature_width:
        yield (
            f"resampler.width {resampler.width} differs from the vision encoder's {config.vision.feature_width}, "
            "which needs resampler.input_proj"
        )
    if block.every > 0 and not 0 <= block.offset < block.every:
        yield f"cross_attention.offset {block.offset} is outside 0 to {block.every - 1}"
    elif block.every > 0 and config.language_model.num_layers > 0 and block.offset >= config.language_model.num_layers:
        yield f"no layer is gated: cross_attention.offset {block.offset} of {config.language_model.num_layers} layers"


def _language_model(lm: LanguageModelConfig) -> Iterator[str]:
    if isinstance(lm.positions, RelativePositions) and lm.width % 2:
        yield f"language_model.width {lm.width} is odd; the sinusoids of relative positions come in pairs"
    if isinstance(lm.positions, RotaryPositions):
        size = lm.positions.size
        if size < 2 or size % 2 or size > lm.head_size:
            yield f"language_model.positions.size {size} is not an even number of channels from 2 to head_size {lm.head_size}"
        if not 0 < lm.positions.base < math.inf:
            yield f"language_model.positions.base is {lm.positions.base}, expected a positive number"
        if (scaling := lm.positions.scaling) is not None and not (
            0 < scaling.low < scaling.high < math.inf and 0 < scaling.factor < math.inf and scaling.original > 0
        ):
            yield f"language_model.positions.scaling is {scaling}, expected positive numbers, low below high"
    if isinstance(lm.positions, AlibiPositions) and not 0 < lm.positions.max_bias < math.inf:
        yield f"language_model.positions.max_bias is {lm.positions.max_bias}, expected a positive number"
    if lm.max_positions > _MOST_POSITIONS:
        yield f"language_model.max_positions is {lm.max_positions}, expected at most {_MOST_POSITIONS}"
    if lm.kv_heads > 0 and lm.num_heads % lm.kv_heads:
        yield f"language_model.num_kv_heads {lm.kv_heads} does not divide num_heads {lm.num_heads}"
    if lm.norm == "rms_norm" and lm.norm_bias:
        yield "language_model.norm_bias is for LayerNorm; RMSNorm has no bias"
    if lm.tied_head and lm.extra_embeddings:
        yield f"language_model.extra_embeddings is {lm.extra_embeddings}: a head tied to the embedding has all of its rows"


def _tokens(config: ModelConfig) -> Iterator[str]:
    tokens, size = config.tokens, config.language_model.vocab_size
    for field, value in msgspec.structs.asdict(tokens).items():
        known = config.language_model.embedding_rows if field in ("pad", "image") else size
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < known:
                yield f"tokens.{field} {token} is outside the vocabulary of {known}"
    for field, first, more in (("ends", tokens.eoc, tokens.ends), ("banned", tokens.image, tokens.banned)):
        if len({first, *more}) != 1 + len(more):
            yield f"tokens.{field} {more} names a token twice, or {first}, which is among them already"
    if size > 0 and len(config.banned_logits) >= size:
        yield f"tokens.banned leaves none of {size} tokens to generate"
    if tokens.image in (tokens.pad, tokens.bos, tokens.eoc, tokens.reset):
        yield f"tokens.image {tokens.image} is also another token; every occurrence of it stands for a medium"
