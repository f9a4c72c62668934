"""Every tensor of a bundle, component by component; the graphs' names for them are those given here."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from flamingo_export.precision import Precision
from flamingo_export.weights.recipes import (
    DISTANCE_BLOCK,
    Weight,
    as_is,
    distance_blocks,
    distances,
    feed_forward_up,
    gated_transposed,
    head_bias,
    linear,
    linear_bias,
    norm,
    plain,
    rotary_table,
)
from flamingo_export.weights.towers import towers
from flamingo_export.weights.vision import vision_encoder
from flamingo_reference.config import CrossAttentionConfig, ModelConfig, RelativePositions, RotaryPositions
from flamingo_reference.contrastive_config import Readout
from flamingo_reference.names import readout_model


def bundle_weights(config: ModelConfig, precision: Precision | None = None) -> list[Weight]:
    """Every tensor of the bundle, group by group. A group is one safetensors file, the unit of resuming a build.

    precision: None is any without a policy. A head that is quantised is a matrix of its own, tied to the embedding or not.
    """
    model = [*vision_encoder(config), *_readout(config), *perceiver(config), *_media_kv(config), *_decoder(config, precision)]
    return [*model, *towers(config)]


def _readout(config: ModelConfig) -> Iterator[Weight]:
    """What the vision encoder's graph has of a contrastive encoder that reads the features."""
    if config.contrastive is not None and isinstance(config.contrastive.pooling, Readout):
        of_readout = readout_model(config, config.contrastive.pooling)
        yield from perceiver(of_readout, "vision_encoder/readout", "contrastive.readout", "vision_encoder.readout")


def perceiver(
    config: ModelConfig, below: str = "resampler", source_of: str = "resampler", group: str = "resampler"
) -> Iterator[Weight]:
    """Weights of the config's resampler, or of another one made of the same layers. below, source_of: what stands before the bundle's and
    the checkpoint's names."""
    resampler = config.resampler
    width, inner = resampler.width, resampler.num_heads * resampler.head_size
    if resampler.kind == "projector":
        yield linear("resampler/input_proj", (config.vision.feature_width, width), group, "resampler.input_proj.weight")
        yield linear_bias("resampler/input_proj", width, group, "resampler.input_proj.bias")
        return
    if resampler.input_proj:
        yield linear(f"{below}/input_proj", (config.vision.feature_width, width), group, f"{source_of}.input_proj.weight")
    yield plain(f"{below}/latents", (resampler.num_latents, width), group, f"{source_of}.latents")
    if resampler.num_time_embeddings:
        yield plain(f"{below}/time_embeddings", (resampler.num_time_embeddings, width), group, f"{source_of}.time_embeddings")
    for layer in range(resampler.num_layers):
        name, source = f"{below}/layer.{layer}", f"{source_of}.layers.{layer}"
        yield from norm(f"{name}/media_norm", width, group, f"{source}.media_norm")
        yield from norm(f"{name}/latent_norm", width, group, f"{source}.latent_norm")
        yield linear(f"{name}/q_proj", (width, inner), group, f"{source}.q_proj.weight")
        yield linear(f"{name}/kv_proj", (width, 2 * inner), group, f"{source}.k_proj.weight", f"{source}.v_proj.weight")
        if resampler.qk_norm:
            for kind in "qk":
                yield from norm(f"{name}/{kind}_norm", resampler.head_size, group, f"{source}.{kind}_norm")
        yield linear(f"{name}/out_proj", (inner, width), group, f"{source}.out_proj.weight")
        yield from norm(f"{name}/ffw_norm", width, group, f"{source}.ffw_norm")
        yield from feed_forward_up(name, source, group, width, resampler.ffw_width, resampler.activation)
        yield linear(f"{name}/ffw_down", (resampler.ffw_width, width), group, f"{source}.ffw_down.weight")
    yield from norm(f"{below}/norm", width, group, f"{source_of}.norm")


def _media_kv(config: ModelConfig) -> Iterator[Weight]:
    block = config.cross_attention
    shape = (config.resampler.width, block.kv_heads * block.head_size)
    for i in range(len(config.gated_layers)):
        for kind in "kv":
            yield linear(f"media_kv/layer.{i}/{kind}_proj", shape, "media_kv", f"cross_attention.{i}.{kind}_proj.weight")
        if block.qk_norm:
            source = f"cross_attention.{i}.k_norm"
            yield from norm(f"media_kv/layer.{i}/k_norm", block.head_size, "media_kv", source, kind="rms_norm")


def _decoder(config: ModelConfig, precision: Precision | None) -> Iterator[Weight]:
    lm = config.language_model
    yield Weight(
        name="decoder/embedding",
        shape=(lm.embedding_rows, lm.width),
        group="decoder.embedding",
        sources=("language_model.embedding.weight",),
        make=as_is,
        moves_only=True,
    )
    yield from norm("decoder/norm", lm.width, "decoder.embedding", "language_model.norm", kind=lm.norm, bias=lm.norm_bias)
    if isinstance(lm.positions, RotaryPositions):
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            yield Weight(
                name=f"decoder/rotary_{name}",
                shape=(lm.max_positions, lm.positions.size // 2),
                group="decoder.embedding",
                sources=(),
                make=functools.partial(rotary_table, positions=lm.positions, num_positions=lm.max_positions, function=function),
                full_precision=True,
            )
    source = "language_model.embedding.weight" if lm.tied_head else "language_model.head.weight"
    head = linear("decoder/head", (lm.width, lm.vocab_size), "decoder.head", source)
    if not lm.tied_head or (precision is not None and head.quantisation(precision) is not None):
        yield head
    for layer in range(lm.num_layers):
        if layer in config.gated_layers:
            yield from _gated_block(config, config.gated_layers.index(layer), layer)
        yield from _language_model_layer(config, layer)


def _gated_block(config: ModelConfig, i: int, layer: int) -> Iterator[Weight]:
    block, width = config.cross_attention, config.language_model.width
    inner, group = block.num_heads * block.head_size, f"decoder.cross_attention.{i:03d}"
    name, source = f"decoder/layer.{layer}/cross_attention", f"cross_attention.{i}"
    yield from norm(f"{name}/norm", width, group, f"{source}.norm", kind=block.norm)
    yield linear(f"{name}/q_proj", (width, inner), group, f"{source}.q_proj.weight")
    if block.qk_norm:
        yield from norm(f"{name}/q_norm", block.head_size, group, f"{source}.q_norm", kind="rms_norm")
    yield _gated(f"{name}/out_proj", (inner, width), group, block, f"{source}.out_proj.weight", f"{source}.attention_gate")
    yield from norm(f"{name}/ffw_norm", width, group, f"{source}.ffw_norm", kind=block.norm)
    yield from feed_forward_up(name, source, group, width, block.ffw_width, block.feed_forward)
    yield _gated(f"{name}/ffw_down", (block.ffw_width, width), group, block, f"{source}.ffw_down.weight", f"{source}.ffw_gate")


def _gated(name: str, shape: tuple[int, int], group: str, block: CrossAttentionConfig, weight: str, gate: str) -> Weight:
    if block.gate == "none":
        return linear(name, shape, group, weight)
    sources = (weight, gate)
    return Weight(name=name, shape=shape, group=group, sources=sources, make=gated_transposed, product=True)


def _language_model_layer(config: ModelConfig, layer: int) -> Iterator[Weight]:
    lm = config.language_model
    inner, group = lm.num_heads * lm.head_size, f"decoder.layer.{layer:03d}"
    kv_inner = lm.kv_heads * lm.head_size
    name, source = f"decoder/layer.{layer}", f"language_model.layers.{layer}"
    attention = f"{name}/self_attention"
    qkv = [f"{source}.{part}_proj" for part in "qkv"]
    yield from norm(f"{name}/attention_norm", lm.width, group, f"{source}.attention_norm", kind=lm.norm, bias=lm.norm_bias)
    yield linear(f"{attention}/qkv_proj", (lm.width, inner + 2 * kv_inner), group, *(f"{part}.weight" for part in qkv))
    if lm.bias:
        yield linear_bias(f"{attention}/qkv_proj", inner + 2 * kv_inner, group, *(f"{part}.bias" for part in qkv))
    if lm.qk_norm:
        yield from norm(f"{attention}/q_norm", inner, group, f"{source}.q_norm", bias=False)
        yield from norm(f"{attention}/k_norm", kv_inner, group, f"{source}.k_norm", bias=False)
    if isinstance(lm.positions, RelativePositions):
        yield from _relative_positions(config, layer)
    yield linear(f"{attention}/out_proj", (inner, lm.width), group, f"{source}.out_proj.weight")
    if lm.bias:
        yield linear_bias(f"{attention}/out_proj", lm.width, group, f"{source}.out_proj.bias")
    yield from norm(f"{name}/ffw_norm", lm.width, group, f"{source}.ffw_norm", kind=lm.norm, bias=lm.norm_bias)
    yield from feed_forward_up(name, source, group, lm.width, lm.ffw_width, lm.feed_forward, bias=lm.bias)
    yield linear(f"{name}/ffw_down", (lm.ffw_width, lm.width), group, f"{source}.ffw_down.weight")
    if lm.bias:
        yield linear_bias(f"{name}/ffw_down", lm.width, group, f"{source}.ffw_down.bias")


def _relative_positions(config: ModelConfig, layer: int) -> Iterator[Weight]:
    lm, group = config.language_model, f"decoder.layer.{layer:03d}"
    name, source = f"decoder/layer.{layer}/self_attention", f"language_model.layers.{layer}"
    for part in ("content_bias", "position_bias"):
        yield Weight(
            name=f"{name}/{part}",
            shape=(lm.num_heads, 1, lm.head_size),
            group=group,
            sources=(f"{source}.{part}",),
            make=head_bias,
            full_precision=True,
        )
    yield Weight(
        name=f"{name}/distances",
        shape=(lm.num_heads, lm.head_size, distance_blocks(lm.max_positions), DISTANCE_BLOCK),
        group=group,
        sources=(f"{source}.relative_proj.weight",),
        make=functools.partial(distances, num_distances=lm.max_positions, num_heads=lm.num_heads),
    )
