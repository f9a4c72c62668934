"""Name and shape of every tensor of our own checkpoint format: the parameter names of `flamingo_reference.model.Flamingo`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.config import (
    FeedForward,
    ModelConfig,
    NFNetConfig,
    Norm,
    RelativePositions,
    ResamplerConfig,
    TiledViTConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_reference.contrastive_config import ContrastiveConfig, Readout, TextConfig

Named = Iterator[tuple[str, Shape]]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, in the order the model uses them."""
    tensors: dict[str, Shape] = {}
    for name, shape in _vision(config.vision):
        tensors[f"vision_encoder.{name}"] = shape
    for name, shape in _resampler(config):
        tensors[f"resampler.{name}"] = shape
    for index in range(len(config.gated_layers)):
        for name, shape in _cross_attention(config):
            tensors[f"cross_attention.{index}.{name}"] = shape
    for name, shape in _language_model(config):
        tensors[f"language_model.{name}"] = shape
    if config.contrastive is not None:
        for name, shape in _contrastive(config, config.contrastive):
            tensors[f"contrastive.{name}"] = shape
    return tensors


def component_of(name: str) -> str:
    """The component a tensor belongs to: vision_encoder, resampler, cross_attention, language_model or contrastive."""
    return name.split(".", 1)[0]


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters of each component, in model order."""
    counts: dict[str, int] = {}
    for name, shape in expected_tensors(config).items():
        counts[component_of(name)] = counts.get(component_of(name), 0) + math.prod(shape)
    return counts


def squeeze_width(width: int, ratio: float) -> int:
    """Width inside a squeeze-excite block: width * ratio to the nearest multiple of 8, at least 8 (as timm has it)."""
    return max(8, int(width * ratio + 4) // 8 * 8)


def needs_downsample(stage: int, block: int, width: int, out: int) -> bool:
    """Whether an NFNet block has a convolution on its shortcut: where the width changes or a later stage begins with stride 2."""
    return width != out or (block == 0 and stage > 0)


def _vision(vision: VisionConfig) -> Named:
    """None for an encoder that is not ours: it comes with its own tensors."""
    if isinstance(vision, ViTConfig):
        yield from _vit(vision)
    elif isinstance(vision, TiledViTConfig):
        yield from _tiled_vit(vision)
    elif isinstance(vision, NFNetConfig):
        yield from _nfnet(vision)


def _conv(name: str, out: int, into: int, kernel: int) -> Named:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{name}.bias", (out,)
    yield f"{name}.gain", (out, 1, 1, 1)


def _nfnet(vision: NFNetConfig) -> Named:
    width = 3
    for index, stem_width in enumerate(vision.stem_widths):
        yield from _conv(f"stem.{index}", stem_width, width, 3)
        width = stem_width
    for stage, (out, depth) in enumerate(zip(vision.widths, vision.depths, strict=True)):
        middle = int(out * vision.bottleneck_ratio)
        squeezed = squeeze_width(out, vision.squeeze_excite_ratio)
        for block in range(depth):
            prefix = f"stages.{stage}.{block}"
            if needs_downsample(stage, block, width, out):
                yield from _conv(f"{prefix}.downsample", out, width, 1)
            yield from _conv(f"{prefix}.conv1", middle, width, 1)
            yield from _conv(f"{prefix}.conv2", middle, vision.group_width, 3)
            yield from _conv(f"{prefix}.conv2b", middle, vision.group_width, 3)
            yield from _conv(f"{prefix}.conv3", out, middle, 1)
            yield f"{prefix}.squeeze_excite.fc1.weight", (squeezed, out, 1, 1)
            yield f"{prefix}.squeeze_excite.fc1.bias", (squeezed,)
            yield f"{prefix}.squeeze_excite.fc2.weight", (out, squeezed, 1, 1)
            yield f"{prefix}.squeeze_excite.fc2.bias", (out,)
            yield f"{prefix}.skip_gain", ()
            width = out
    yield from _conv("final_conv", vision.feature_width, width, 1)


def _vit(vision: ViTConfig) -> Named:
    width = vision.width
    yield "class_embedding", (width,)
    yield "patch_embedding.weight", (width, 3, vision.patch_size, vision.patch_size)
    yield "position_embedding.weight", (vision.grid_size + 1, width)
    yield from _norm("pre_norm", width, "layer_norm", bias=True)
    for layer in range(vision.num_layers):
        yield from _encoder_layer(vision, f"layers.{layer}", bias=True)
    if vision.final_norm:
        yield from _norm("final_norm", width, "layer_norm", bias=True)


def _tiled_vit(vision: TiledViTConfig) -> Named:
    width, ids = vision.width, len(vision.aspect_ratios) + 1
    yield "class_embedding", (width,)
    yield "patch_embedding.weight", (width, 3, vision.patch_size, vision.patch_size)
    yield "position_embedding.weight", (vision.num_patches, width)
    yield "tile_position_embedding.weight", (ids, vision.max_tiles * vision.num_patches * width)
    yield "position_gate", ()
    for place in ("pre", "post"):
        yield f"{place}_tile_embedding.weight", (ids, vision.max_tiles * width)
        yield f"{place}_tile_gate", ()
        yield from _norm(f"{place}_norm", width, "layer_norm", bias=True)
    for kind, count in (("layers", vision.num_layers), ("global_layers", vision.num_global_layers)):
        for layer in range(count):
            prefix = f"{kind}.{layer}"
            yield from _encoder_layer(vision, prefix, bias=False)
            if kind == "global_layers":
                yield f"{prefix}.attention_gate", ()
                yield f"{prefix}.ffw_gate", ()


def _encoder_layer(config: ViTConfig | TiledViTConfig | TextConfig, prefix: str, *, bias: bool) -> Named:
    """bias: of attention's projections; norms and the feed-forward layer always have theirs."""
    width = config.width
    yield from _norm(f"{prefix}.attention_norm", width, "layer_norm", bias=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{prefix}.{name}", width, width, bias=bias)
    yield from _norm(f"{prefix}.ffw_norm", width, "layer_norm", bias=True)
    yield from _feed_forward(f"{prefix}.", width, config.ffw_width, config.activation, bias=True)


def _norm(name: str, width: int, kind: Norm, *, bias: bool) -> Named:
    yield f"{name}.weight", (width,)
    if kind == "layer_norm" and bias:
        yield f"{name}.bias", (width,)


def _linear(name: str, out: int, into: int, *, bias: bool = False) -> Named:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _feed_forward(prefix: str, width: int, inner: int, kind: FeedForward, *, bias: bool = False) -> Named:
    if kind == "swiglu":
        yield from _linear(f"{prefix}ffw_swish", inner, width, bias=bias)
    yield from _linear(f"{prefix}ffw_up", inner, width, bias=bias)
    yield from _linear(f"{prefix}ffw_down", width, inner, bias=bias)


def _resampler(config: ModelConfig) -> Named:
    resampler = config.resampler
    width, inner = resampler.width, resampler.num_heads * resampler.head_size
    if resampler.kind == "projector":
        yield from _linear("input_proj", width, config.vision.feature_width, bias=True)
        return
    if resampler.input_proj:
        yield from _linear("input_proj", width, config.vision.feature_width)
    yield "latents", (resampler.num_latents, width)
    if resampler.num_time_embeddings:
        yield "time_embeddings", (resampler.num_time_embeddings, width)
    for layer in range(resampler.num_layers):
        prefix = f"layers.{layer}"
        yield from _norm(f"{prefix}.media_norm", width, "layer_norm", bias=True)
        yield from _norm(f"{prefix}.latent_norm", width, "layer_norm", bias=True)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{prefix}.{name}", inner, width)
        if resampler.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield from _norm(f"{prefix}.{name}", resampler.head_size, "layer_norm", bias=True)
        yield from _linear(f"{prefix}.out_proj", width, inner)
        yield from _norm(f"{prefix}.ffw_norm", width, "layer_norm", bias=True)
        yield from _feed_forward(f"{prefix}.", width, resampler.ffw_width, resampler.activation)
    yield from _norm("norm", width, "layer_norm", bias=True)


def readout_model(config: ModelConfig, readout: Readout) -> ModelConfig:
    """The model with the readout of its contrastive encoder in the resampler's place: the two are made of the same layers."""
    resampler = ResamplerConfig(
        num_layers=readout.num_layers,
        width=readout.width,
        num_heads=readout.num_heads,
        head_size=readout.head_size,
        ffw_width=readout.ffw_width,
        num_latents=readout.num_latents,
        num_time_embeddings=0,
        activation=readout.activation,
    )
    return msgspec.structs.replace(config, resampler=resampler, contrastive=None)


def pooled_width(config: ModelConfig, contrastive: ContrastiveConfig) -> int:
    """Width of `pooled`, the vision encoder's second output."""
    pooling = contrastive.pooling
    return pooling.num_latents * pooling.width if isinstance(pooling, Readout) else config.vision.feature_width


def _contrastive(config: ModelConfig, contrastive: ContrastiveConfig) -> Named:
    if isinstance(contrastive.pooling, Readout):
        for name, shape in _resampler(readout_model(config, contrastive.pooling)):
            yield f"readout.{name}", shape
    width = pooled_width(config, contrastive)
    if contrastive.image_norm:
        yield from _norm("image.norm", width, "layer_norm", bias=True)
    yield from _linear("image.proj", contrastive.joint_width, width)
    if contrastive.text is not None:
        for name, shape in _text(contrastive.text):
            yield f"text.{name}", shape
        yield from _linear("text.proj", contrastive.joint_width, contrastive.text.width)
        yield "logit_scale", ()


def _text(text: TextConfig) -> Named:
    width = text.width
    yield "embedding.weight", (text.vocab_size, width)
    yield "position_embedding.weight", (text.max_positions, width)
    if text.embedding_norm:
        yield from _norm("embedding_norm", width, "layer_norm", bias=True)
    for layer in range(text.num_layers):
        yield from _encoder_layer(text, f"layers.{layer}", bias=True)
    if text.final_norm:
        yield from _norm("final_norm", width, "layer_norm", bias=True)


def _cross_attention(config: ModelConfig) -> Named:
    block = config.cross_attention
    width, media_width, inner = config.language_model.width, config.resampler.width, block.num_heads * block.head_size
    kv_inner = block.kv_heads * block.head_size
    gate: Shape = () if block.gate == "scalar" else (width,)
    gated = block.gate != "none"
    yield from _norm("norm", width, block.norm, bias=True)
    yield from _linear("q_proj", inner, width)
    yield from _linear("k_proj", kv_inner, media_width)
    yield from _linear("v_proj", kv_inner, media_width)
    if block.qk_norm:
        yield "q_norm.weight", (block.head_size,)
        yield "k_norm.weight", (block.head_size,)
    yield from _linear("out_proj", width, inner)
    if gated:
        yield "attention_gate", gate
    yield from _norm("ffw_norm", width, block.norm, bias=True)
    yield from _feed_forward("", width, block.ffw_width, block.feed_forward)
    if gated:
        yield "ffw_gate", gate


def _language_model(config: ModelConfig) -> Named:
    lm = config.language_model
    inner, kv_inner = lm.num_heads * lm.head_size, lm.kv_heads * lm.head_size
    yield "embedding.weight", (lm.embedding_rows, lm.width)
    for layer in range(lm.num_layers):
        prefix = f"layers.{layer}"
        yield from _norm(f"{prefix}.attention_norm", lm.width, lm.norm, bias=lm.norm_bias)
        yield from _linear(f"{prefix}.q_proj", inner, lm.width, bias=lm.bias)
        yield from _linear(f"{prefix}.k_proj", kv_inner, lm.width, bias=lm.bias)
        yield from _linear(f"{prefix}.v_proj", kv_inner, lm.width, bias=lm.bias)
        if lm.qk_norm:
            yield f"{prefix}.q_norm.weight", (inner,)
            yield f"{prefix}.k_norm.weight", (kv_inner,)
        if isinstance(lm.positions, RelativePositions):
            yield f"{prefix}.relative_proj.weight", (inner, lm.width)
            yield f"{prefix}.content_bias", (lm.num_heads, lm.head_size)
            yield f"{prefix}.position_bias", (lm.num_heads, lm.head_size)
        yield from _linear(f"{prefix}.out_proj", lm.width, inner, bias=lm.bias)
        yield from _norm(f"{prefix}.ffw_norm", lm.width, lm.norm, bias=lm.norm_bias)
        yield from _feed_forward(f"{prefix}.", lm.width, lm.ffw_width, lm.feed_forward, bias=lm.bias)
    yield from _norm("norm", lm.width, lm.norm, bias=lm.norm_bias)
    if not lm.tied_head:
        yield "head.weight", (lm.vocab_size, lm.width)
