"""Weights of the vision encoder: NFNet with its kernels standardised and its gains folded, CLIP's ViT, or the transformer over tiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from flamingo_export.weights.recipes import (
    GELU_GAIN,
    Weight,
    as_is,
    branch_scale,
    encoder_layer,
    feed_forward_up,
    gated,
    gated_transposed,
    linear,
    linear_bias,
    norm,
    standardised,
)
from flamingo_reference.arrays import Array
from flamingo_reference.config import ModelConfig, NFNetConfig, TiledViTConfig, ViTConfig
from flamingo_reference.names import needs_downsample, squeeze_width

GROUP = "vision_encoder"


def vision_encoder(config: ModelConfig) -> Iterator[Weight]:
    """Weights of the `vision_encoder` graph; none for an encoder that is traced, whose graph brings its own (`vision_trace`)."""
    if isinstance(config.vision, ViTConfig):
        yield from _vit(config.vision)
    elif isinstance(config.vision, TiledViTConfig):
        yield from _tiled_vit(config.vision)
    elif isinstance(config.vision, NFNetConfig):
        yield from _nfnet(config.vision)


def _nfnet(vision: NFNetConfig) -> Iterator[Weight]:
    def conv(name: str, out: int, into: int, kernel: int, scale: float) -> Iterator[Weight]:
        source = f"vision_encoder.{name.replace('/', '.')}"
        yield Weight(
            name=f"vision_encoder/{name}/weight",
            shape=(out, into, kernel, kernel),
            group="vision_encoder",
            sources=(f"{source}.weight", f"{source}.gain"),
            make=functools.partial(standardised, scale=scale),
        )
        yield bias(name, out)

    def bias(name: str, out: int) -> Weight:
        source = f"vision_encoder.{name.replace('/', '.')}.bias"
        return Weight(
            name=f"vision_encoder/{name}/bias",
            shape=(out,),
            group="vision_encoder",
            sources=(source,),
            make=as_is,
            full_precision=True,
        )

    width = 3
    for index, out in enumerate(vision.stem_widths):
        yield from conv(f"stem/{index}", out, width, 3, GELU_GAIN if index else 1.0)
        width = out
    variance = 1.0
    for stage, (out, depth) in enumerate(zip(vision.widths, vision.depths, strict=True)):
        middle, squeezed = int(out * vision.bottleneck_ratio), squeeze_width(out, vision.squeeze_excite_ratio)
        for block in range(depth):
            prefix = f"stages/{stage}/{block}"
            into_block = GELU_GAIN * variance**-0.5
            if needs_downsample(stage, block, width, out):
                yield from conv(f"{prefix}/downsample", out, width, 1, into_block)
            yield from conv(f"{prefix}/conv1", middle, width, 1, into_block)
            yield from conv(f"{prefix}/conv2", middle, vision.group_width, 3, GELU_GAIN)
            yield from conv(f"{prefix}/conv2b", middle, vision.group_width, 3, GELU_GAIN)
            yield from conv(f"{prefix}/conv3", out, middle, 1, GELU_GAIN)
            for name, rows, columns in (("fc1", squeezed, out), ("fc2", out, squeezed)):
                yield Weight(
                    name=f"vision_encoder/{prefix}/squeeze_excite/{name}/weight",
                    shape=(rows, columns, 1, 1),
                    group="vision_encoder",
                    sources=(f"vision_encoder.stages.{stage}.{block}.squeeze_excite.{name}.weight",),
                    make=as_is,
                )
                yield bias(f"{prefix}/squeeze_excite/{name}", rows)
            yield Weight(
                name=f"vision_encoder/{prefix}/branch_scale",
                shape=(1,),
                group="vision_encoder",
                sources=(f"vision_encoder.stages.{stage}.{block}.skip_gain",),
                make=functools.partial(branch_scale, alpha=vision.alpha),
                full_precision=True,
            )
            variance = (1.0 if block == 0 else variance) + vision.alpha**2
            width = out
    yield from conv("final_conv", vision.feature_width, width, 1, 1.0)


def _vit(vision: ViTConfig) -> Iterator[Weight]:
    width, patch = vision.width, vision.patch_size
    yield Weight(
        name="vision_encoder/patch_embedding",
        shape=(width, 3, patch, patch),
        group=GROUP,
        sources=("vision_encoder.patch_embedding.weight",),
        make=as_is,
        moves_only=True,
    )
    yield Weight(
        name="vision_encoder/position_embedding",
        shape=(vision.grid_size + 1, width),
        group=GROUP,
        sources=("vision_encoder.position_embedding.weight", "vision_encoder.class_embedding"),
        make=_with_class_token,
        full_precision=True,
    )
    yield from norm("vision_encoder/pre_norm", width, GROUP, "vision_encoder.pre_norm")
    for layer in range(vision.num_layers):
        yield from encoder_layer(f"vision_encoder/layer.{layer}", f"vision_encoder.layers.{layer}", GROUP, vision)
    if vision.final_norm:
        yield from norm("vision_encoder/final_norm", width, GROUP, "vision_encoder.final_norm")


def _tiled_vit(vision: TiledViTConfig) -> Iterator[Weight]:
    """Gates are folded: into the embeddings of tiles, into the output projections of the global layers."""
    width, patch, ids = vision.width, vision.patch_size, len(vision.aspect_ratios) + 1
    ours, theirs = "vision_encoder", "vision_encoder."
    yield Weight(
        name=f"{ours}/patch_embedding",
        shape=(width, 3, patch, patch),
        group=GROUP,
        sources=(f"{theirs}patch_embedding.weight",),
        make=as_is,
        moves_only=True,
    )
    yield Weight(
        name=f"{ours}/position_embedding",
        shape=(vision.num_patches, width),
        group=GROUP,
        sources=(f"{theirs}position_embedding.weight", f"{theirs}class_embedding", f"{theirs}position_gate"),
        make=_gated_positions,
        full_precision=True,
    )
    for place, count in (("tile_position", vision.num_patches), ("pre_tile", 1), ("post_tile", 1)):
        gate = "position_gate" if place == "tile_position" else f"{place}_gate"
        yield Weight(
            name=f"{ours}/{place}_embedding",
            shape=(ids, vision.max_tiles * count * width),
            group=GROUP,
            sources=(f"{theirs}{place}_embedding.weight", f"{theirs}{gate}"),
            make=gated,
            full_precision=count == 1,
        )
    for place in ("pre", "post"):
        yield from norm(f"{ours}/{place}_norm", width, GROUP, f"{theirs}{place}_norm")
    for layer in range(vision.num_layers):
        yield from _tiled_layer(vision, f"{ours}/layer.{layer}", f"{theirs}layers.{layer}", is_gated=False)
    for layer in range(vision.num_global_layers):
        yield from _tiled_layer(vision, f"{ours}/global_layer.{layer}", f"{theirs}global_layers.{layer}", is_gated=True)


def _tiled_layer(vision: TiledViTConfig, name: str, source: str, *, is_gated: bool) -> Iterator[Weight]:
    width, inner = vision.width, vision.ffw_width
    yield from norm(f"{name}/attention_norm", width, GROUP, f"{source}.attention_norm")
    yield linear(f"{name}/qkv_proj", (width, 3 * width), GROUP, *(f"{source}.{part}_proj.weight" for part in "qkv"))
    yield from norm(f"{name}/ffw_norm", width, GROUP, f"{source}.ffw_norm")
    yield from feed_forward_up(name, source, GROUP, width, inner, vision.activation, bias=True)
    if not is_gated:
        yield linear(f"{name}/out_proj", (width, width), GROUP, f"{source}.out_proj.weight")
        yield linear(f"{name}/ffw_down", (inner, width), GROUP, f"{source}.ffw_down.weight")
        yield linear_bias(f"{name}/ffw_down", width, GROUP, f"{source}.ffw_down.bias")
        return
    for part, rows, gate in (("out_proj", width, "attention_gate"), ("ffw_down", inner, "ffw_gate")):
        yield Weight(
            name=f"{name}/{part}",
            shape=(rows, width),
            group=GROUP,
            sources=(f"{source}.{part}.weight", f"{source}.{gate}"),
            make=gated_transposed,
            product=True,
        )
    yield Weight(
        name=f"{name}/ffw_down.bias",
        shape=(width,),
        group=GROUP,
        sources=(f"{source}.ffw_down.bias", f"{source}.ffw_gate"),
        make=gated,
        full_precision=True,
    )


def _gated_positions(sources: Sequence[Array]) -> Array:
    """Position embeddings times 1 - tanh(gate), the class token added to the first: nothing else stands there."""
    positions, class_token, gate = sources
    added: Array = positions.astype(np.float32) * np.float32(1 - np.tanh(np.float64(gate)))
    added[0] += class_token
    return added


def _with_class_token(sources: Sequence[Array]) -> Array:
    """Position embeddings, the class token added to the first: nothing else stands there."""
    positions, class_token = sources
    added = positions.copy()
    added[0] += class_token
    return added
