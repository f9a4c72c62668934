"""The contract of each subgraph: names, element kinds and shapes of its inputs and outputs.

Graph builders declare these (and weights that may be replaced, which are not part of it: `GraphBuilder.replaceable`), the reference's subgraphs
take exactly these, sessions bind exactly these.

    vision_encoder   pixels -> features                        F frames, I image side, P patches, E feature width
                     (of tiles: pixels [F, T, ...] and         T places of tiles that an image has, padding among them)
                     aspect_ratio_ids [F]
    resampler        features, time_weights -> latents         N media, T frames of a medium, R latents, W width
                                                               (time_weights only where frames have time embeddings)
    media_kv         latents -> media_k.i, media_v.i           one pair per gated layer i
    decoder          tokens, media, cache -> logits, cache     B requests, S positions in this call, C cache capacity,
                                                               K positions whose logits are wanted, M media of a request
                                                               (key_positions only where attention depends on distances, first_media
                                                               only where a position sees the media first_media to phi)
    decoder.k        a part of it: hidden states in but for the first, out but for the last
    image_tower      pooled -> image_embedding                 where the checkpoint has a contrastive encoder: `pooled` is then a second
                                                               output of vision_encoder
    text_tower       token_ids, lengths -> text_embedding      where it has a text tower: B texts of S tokens, padded at the end

Ids, rows and indices are int64, the mask is bool, the rest is floating point of the graph's compute type ("fp32": of that type whatever
the graph computes in). Where the precision's policy keeps media in FP8, media_k.i and media_v.i are "fp8": E4M3 codes, each tensor with a
scale beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np

from flamingo_reference.config import ModelConfig, TiledViTConfig
from flamingo_reference.contrastive_config import ContrastiveConfig
from flamingo_reference.names import pooled_width

ElementKind = Literal["float", "fp32", "int64", "bool", "fp8"]
MediaKind = Literal["float", "fp8"]
"""What the media bank holds: numbers of the compute type, or E4M3 codes."""
KIND_DTYPES: Mapping[ElementKind, np.dtype[Any]] = MappingProxyType(
    {
        "float": np.dtype(np.float32),
        "fp32": np.dtype(np.float32),
        "int64": np.dtype(np.int64),
        "bool": np.dtype(np.bool_),
        "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
    }
)
"""Types of the portable graphs, whose compute type is fp32."""
FUNCTION_DOMAIN = "flamingo"
"""Of the model-local functions that a backend may replace, and of the plugins that do."""
Dim = int | str
"""A fixed size, or the one-letter name of a size that varies from call to call."""

TOP_VALUES, TOP_IDS, LOG_SUM_EXP = "top_values", "top_ids", "log_sum_exp"
"""Outputs of a decoder that finds the best tokens itself, beside its logits: fp32 and int64 [B, K, n], best first, and fp32 [B, K].
`<image>` is left out of all of them."""

HIDDEN, HIDDEN_OUT = "hidden", "hidden_out"
"""What passes from one part of the decoder to the next: float [B, S, W]."""

SUBGRAPHS = ("vision_encoder", "resampler", "media_kv", "decoder")
"""Of every model."""
IMAGE_TOWER, TEXT_TOWER = "image_tower", "text_tower"
"""Of a contrastive encoder, where there is one."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output."""

    name: str
    kind: ElementKind
    shape: tuple[Dim, ...]


class SubgraphSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs and outputs of a subgraph, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Output -> input whose buffer it shares: the cache is updated in place."""
    longest: Mapping[str, int] = msgspec.field(default_factory=dict)
    """The largest size that the model itself allows of a size that varies."""

    def input(self, name: str) -> TensorSpec:
        """The input of that name. Raises KeyError."""
        return {spec.name: spec for spec in self.inputs}[name]

    def output(self, name: str) -> TensorSpec:
        """The output of that name. Raises KeyError."""
        return {spec.name: spec for spec in self.outputs}[name]


def subgraph_specs(config: ModelConfig, *, media: MediaKind = "float") -> dict[str, SubgraphSpec]:
    """The subgraphs of a model, the decoder in one piece. media: what the bank holds, `Precision.media`."""
    every_layer = range(config.language_model.num_layers)
    found = {
        "vision_encoder": _vision_encoder(config),
        "resampler": _resampler(config),
        "media_kv": _media_kv(config, media),
        "decoder": decoder_spec(config, every_layer, name="decoder", media=media),
    }
    return found if config.contrastive is None else found | _towers(config, config.contrastive)


def towers_of(config: ModelConfig) -> tuple[str, ...]:
    """Subgraphs of the contrastive encoder, none where there is none."""
    contrastive = config.contrastive
    if contrastive is None:
        return ()
    return (IMAGE_TOWER,) if contrastive.text is None else (IMAGE_TOWER, TEXT_TOWER)


def gated_in(config: ModelConfig, layers: range) -> list[tuple[int, int]]:
    """(i, layer) of each gated cross-attention block before an LM layer in `layers`; media_k.i is its bank."""
    return [(i, layer) for i, layer in enumerate(config.gated_layers) if layer in layers]


def decoder_spec(config: ModelConfig, layers: range, *, name: str, media: MediaKind = "float") -> SubgraphSpec:
    """The decoder, or the part of it with these LM layers: hidden states in unless first, hidden states out unless last.

    Cache and media keep the numbers of the whole decoder: past_k.j is LM layer j, media_k.i gated layer i.
    """
    lm, block = config.language_model, config.cross_attention
    first, last = layers.start == 0, layers.stop == lm.num_layers
    media_shape: tuple[Dim, ...] = ("N", block.kv_heads, config.resampler.num_latents, block.head_size)
    cache_shape: tuple[Dim, ...] = ("B", lm.kv_heads, "C", lm.head_size)
    gated = [i for i, _ in gated_in(config, layers)]
    inputs = [
        TensorSpec("token_ids", "int64", ("B", "S")) if first else TensorSpec(HIDDEN, "float", ("B", "S", lm.width)),
        TensorSpec("positions", "int64", ("B", "S")),
    ]
    if gated:
        inputs += [TensorSpec("media_rows", "int64", ("B", "M")), TensorSpec("phi", "int64", ("B", "S"))]
        if config.sees_groups:
            inputs.append(TensorSpec("first_media", "int64", ("B", "S")))
    inputs += [
        TensorSpec("write_index", "int64", ("B",)),
        TensorSpec("mask", "bool", ("B", 1, "S", "C")),
    ]
    if lm.uses_distances:
        inputs.append(TensorSpec("key_positions", "int64", ("B", "C")))
    if last:
        inputs.append(TensorSpec("logit_positions", "int64", ("B", "K")))
    for i in gated:
        inputs += [TensorSpec(f"media_{kind}.{i}", media, media_shape) for kind in "kv"]
    inputs += [TensorSpec(f"past_{kind}.{j}", "float", cache_shape) for j in layers for kind in "kv"]
    outputs = [
        TensorSpec("logits", "float", ("B", "K", lm.vocab_size))
        if last
        else TensorSpec(HIDDEN_OUT, "float", ("B", "S", lm.width))
    ]
    outputs += [TensorSpec(f"present_{kind}.{j}", "float", cache_shape) for j in layers for kind in "kv"]
    aliases = {f"present_{kind}.{j}": f"past_{kind}.{j}" for j in layers for kind in "kv"}
    return SubgraphSpec(name=name, inputs=tuple(inputs), outputs=tuple(outputs), aliases=aliases)


def _vision_encoder(config: ModelConfig) -> SubgraphSpec:
    vision = config.vision
    if isinstance(vision, TiledViTConfig):
        sides = (vision.image_size, vision.image_size)
        return SubgraphSpec(
            name="vision_encoder",
            inputs=(
                TensorSpec("pixels", "float", ("F", vision.max_tiles, 3, *sides)),
                TensorSpec("aspect_ratio_ids", "int64", ("F",)),
            ),
            outputs=(TensorSpec("features", "float", ("F", vision.max_tiles, vision.num_patches, vision.feature_width)),),
        )
    outputs = [TensorSpec("features", "float", ("F", vision.num_patches, vision.feature_width))]
    if config.contrastive is not None:
        outputs.append(TensorSpec("pooled", "float", ("F", pooled_width(config, config.contrastive))))
    return SubgraphSpec(
        name="vision_encoder",
        inputs=(TensorSpec("pixels", "float", ("F", 3, vision.image_size, vision.image_size)),),
        outputs=tuple(outputs),
    )


def _towers(config: ModelConfig, contrastive: ContrastiveConfig) -> dict[str, SubgraphSpec]:
    joint, text = contrastive.joint_width, contrastive.text
    found = {
        IMAGE_TOWER: SubgraphSpec(
            name=IMAGE_TOWER,
            inputs=(TensorSpec("pooled", "float", ("F", pooled_width(config, contrastive))),),
            outputs=(TensorSpec("image_embedding", "float", ("F", joint)),),
        )
    }
    if text is not None:
        found[TEXT_TOWER] = SubgraphSpec(
            name=TEXT_TOWER,
            inputs=(TensorSpec("token_ids", "int64", ("B", "S")), TensorSpec("lengths", "int64", ("B",))),
            outputs=(TensorSpec("text_embedding", "float", ("B", joint)),),
            longest={"S": text.max_positions},
        )
    return found


def _resampler(config: ModelConfig) -> SubgraphSpec:
    resampler, vision = config.resampler, config.vision
    frames: Dim = 1 if resampler.kind == "projector" else "T"
    inputs = [TensorSpec("features", "float", ("N", frames, vision.num_patches, vision.feature_width))]
    if resampler.num_time_embeddings:
        inputs.append(TensorSpec("time_weights", "float", ("T", resampler.num_time_embeddings)))
    return SubgraphSpec(
        name="resampler",
        inputs=tuple(inputs),
        outputs=(TensorSpec("latents", "float", ("N", resampler.num_latents, resampler.width)),),
    )


def _media_kv(config: ModelConfig, media: MediaKind) -> SubgraphSpec:
    resampler, block = config.resampler, config.cross_attention
    shape: tuple[Dim, ...] = ("N", block.kv_heads, resampler.num_latents, block.head_size)
    return SubgraphSpec(
        name="media_kv",
        inputs=(TensorSpec("latents", "float", ("N", resampler.num_latents, resampler.width)),),
        outputs=tuple(TensorSpec(f"media_{kind}.{i}", media, shape) for i in range(len(config.gated_layers)) for kind in "kv"),
    )
