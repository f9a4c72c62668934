"""Weights of a contrastive encoder's towers: `image_tower` and `text_tower`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from flamingo_export.weights.recipes import Weight, as_is, encoder_layer, linear, norm, plain
from flamingo_reference.arrays import Array
from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import TextConfig
from flamingo_reference.names import pooled_width

LOGIT_SCALE = "text_tower/logit_scale"
"""Logarithm of what products of embeddings are multiplied with before they are compared: [1], read by the runtime, by no graph."""

OF_TOWERS = ("image_tower/", "text_tower/", "vision_encoder/readout/")
"""What the names of a contrastive encoder's weights begin with."""


def towers(config: ModelConfig) -> Iterator[Weight]:
    """Of a config with a contrastive encoder; nothing of any other."""
    contrastive = config.contrastive
    if contrastive is None:
        return
    width = pooled_width(config, contrastive)
    if contrastive.image_norm:
        yield from norm("image_tower/norm", width, "image_tower", "contrastive.image.norm")
    yield linear("image_tower/proj", (width, contrastive.joint_width), "image_tower", "contrastive.image.proj.weight")
    yield _unit("image_tower", contrastive.joint_width)
    if contrastive.text is not None:
        yield from _text(contrastive.text, contrastive.joint_width)


def _text(text: TextConfig, joint: int) -> Iterator[Weight]:
    width, group, source = text.width, "text_tower", "contrastive.text"
    yield Weight(
        name="text_tower/embedding",
        shape=(text.vocab_size, width),
        group=group,
        sources=(f"{source}.embedding.weight",),
        make=as_is,
        moves_only=True,
    )
    yield plain("text_tower/position_embedding", (text.max_positions, width), group, f"{source}.position_embedding.weight")
    if text.embedding_norm:
        yield from norm("text_tower/embedding_norm", width, group, f"{source}.embedding_norm")
    for layer in range(text.num_layers):
        yield from encoder_layer(f"text_tower/layer.{layer}", f"{source}.layers.{layer}", group, text)
    if text.final_norm:
        yield from norm("text_tower/final_norm", width, group, f"{source}.final_norm")
    yield linear("text_tower/proj", (width, joint), group, f"{source}.proj.weight")
    yield _unit("text_tower", joint)
    yield Weight(
        name=LOGIT_SCALE,
        shape=(1,),
        group=group,
        sources=("contrastive.logit_scale",),
        make=_vector,
        full_precision=True,
    )


def _unit(tower: str, joint: int) -> Weight:
    """What makes a vector of root mean square 1 one of length 1: [J]."""
    return Weight(
        name=f"{tower}/unit",
        shape=(joint,),
        group=tower,
        sources=(),
        make=functools.partial(_root, joint=joint),
        full_precision=True,
    )


def _root(_: Sequence[Array], *, joint: int) -> Array:
    return np.full(joint, joint**-0.5)


def _vector(sources: Sequence[Array]) -> Array:
    return sources[0].reshape(1)
