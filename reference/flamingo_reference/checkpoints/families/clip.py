"""CLIP's vision transformer, in the two layouts that are published.

openai         ViT-L-14.pt and open_clip's files: visual.conv1, visual.transformer.resblocks.0.attn.in_proj_weight (q, k and v joined)
transformers   vision_model.embeddings.patch_embedding, vision_model.encoder.layers.0.self_attn.q_proj; also inside of IDEFICS, and, as newer
               versions save the image encoder alone, without `vision_model.`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flamingo_reference.checkpoints.conversions import Recipe, Shape, as_is, choice, rows, setting, with_bias
from flamingo_reference.config import Activation, ConfigError, ViTConfig

# CLIP's preprocessing (Radford et al. 2021): mean and standard deviation of RGB in 0..1.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_SIZE = 64
"""Of every model that OpenAI published; the tensors do not tell."""
IGNORED = (
    (r"(visual\.ln_post|(vision_model\.)?post_layernorm)\.(weight|bias)", "norm that the features do not go through"),
    (r"(visual\.proj|visual_projection\.weight)", "projection into the space shared with text"),
    (r"(transformer\.resblocks\.|text_model\.|token_embedding\.|ln_final\.).*", "CLIP's text encoder"),
    (r"(positional_embedding|text_projection|text_projection\.weight|logit_scale)", "CLIP's text encoder"),
    (r"(input_resolution|context_length|vocab_size)", "sizes stored as tensors"),
    (r"(vision_model\.)?embeddings\.position_ids", "the numbers 0, 1, ..., which need no tensor"),
)
"""Tensors of CLIP's files that the model does not need: pattern of the whole name, and why."""


def config_from_shapes(
    shapes: Mapping[str, Shape], *, activation: Activation = "quick_gelu", num_heads: int | None = None
) -> ViTConfig:
    """The encoder that a file of either layout holds, its class token dropped and no final norm, as OpenFlamingo uses it.

    num_heads: None for heads of 64. Raises ConfigError if the file is none of CLIP's.
    """
    openai, prefix = "visual.conv1.weight" in shapes, _prefix(shapes)
    layers, fc = ("visual.transformer.resblocks", "mlp.c_fc") if openai else (f"{prefix}encoder.layers", "mlp.fc1")
    names = (
        ("visual.conv1.weight", "visual.positional_embedding")
        if openai
        else (f"{prefix}embeddings.patch_embedding.weight", f"{prefix}embeddings.position_embedding.weight")
    )
    up = f"{layers}.0.{fc}.weight"
    missing = [name for name in (*names, up) if name not in shapes]
    if missing:
        raise ConfigError(f"the vision file holds no CLIP image encoder: {', '.join(missing)} missing, also by OpenAI's names.")
    for name, sizes in ((names[0], 4), (names[1], 2), (up, 2)):
        if len(shapes[name]) != sizes or min(shapes[name]) < 1:
            raise ConfigError(f"the vision file's {name} has shape {shapes[name]}, expected {sizes} sizes of at least 1.")
    (width, _, _, patch), side = shapes[names[0]], math.isqrt(shapes[names[1]][0] - 1)
    heads = width // HEAD_SIZE if num_heads is None else num_heads
    return ViTConfig(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        num_layers=len({name.removeprefix(f"{layers}.").split(".")[0] for name in shapes if name.startswith(f"{layers}.")}),
        num_heads=heads,
        ffw_width=shapes[up][0],
        activation=activation,
    )


def config_from(raw: Mapping[str, Any]) -> ViTConfig:
    """The encoder of a transformers config.json (CLIPModel or CLIPVisionModel), used as by `config_from_shapes`. Raises ConfigError."""
    where = "config.json of CLIP"
    vision = setting(raw, "vision_config", dict, where=where) if "vision_config" in raw else raw
    return ViTConfig(
        image_size=setting(vision, "image_size", int, 224, where=where),
        patch_size=setting(vision, "patch_size", int, 32, where=where),
        width=setting(vision, "hidden_size", int, 768, where=where),
        num_layers=setting(vision, "num_hidden_layers", int, 12, where=where),
        num_heads=setting(vision, "num_attention_heads", int, 12, where=where),
        ffw_width=setting(vision, "intermediate_size", int, 3072, where=where),
        activation=choice(vision, "hidden_act", {"quick_gelu": "quick_gelu", "gelu": "gelu"}, "quick_gelu", where=where),
        norm_eps=setting(vision, "layer_norm_eps", float, 1e-5, where=where),
    )


def recipes(vision: ViTConfig, prefix: str) -> dict[str, Recipe]:
    """Our names, below `vision_encoder.`, from transformers' below `prefix`."""
    width, inner = vision.width, vision.ffw_width
    found = {
        "class_embedding": as_is(f"{prefix}embeddings.class_embedding", (width,)),
        "patch_embedding.weight": as_is(
            f"{prefix}embeddings.patch_embedding.weight", (width, 3, vision.patch_size, vision.patch_size)
        ),
        "position_embedding.weight": as_is(f"{prefix}embeddings.position_embedding.weight", (vision.grid_size + 1, width)),
        **with_bias("pre_norm", f"{prefix}pre_layrnorm", (width,)),  # sic
    }
    for i in range(vision.num_layers):
        ours, theirs = f"layers.{i}", f"{prefix}encoder.layers.{i}"
        found |= with_bias(f"{ours}.attention_norm", f"{theirs}.layer_norm1", (width,))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= with_bias(f"{ours}.{name}", f"{theirs}.self_attn.{name}", (width, width))
        found |= with_bias(f"{ours}.ffw_norm", f"{theirs}.layer_norm2", (width,))
        found |= with_bias(f"{ours}.ffw_up", f"{theirs}.mlp.fc1", (inner, width))
        found |= with_bias(f"{ours}.ffw_down", f"{theirs}.mlp.fc2", (width, inner))
    if vision.final_norm:
        found |= with_bias("final_norm", f"{prefix}post_layernorm", (width,))
    return {f"vision_encoder.{name}": recipe for name, recipe in found.items()}


def openai_recipes(vision: ViTConfig) -> dict[str, Recipe]:
    """Our names, below `vision_encoder.`, from OpenAI's."""
    width, inner = vision.width, vision.ffw_width
    found = {
        "class_embedding": as_is("visual.class_embedding", (width,)),
        "patch_embedding.weight": as_is("visual.conv1.weight", (width, 3, vision.patch_size, vision.patch_size)),
        "position_embedding.weight": as_is("visual.positional_embedding", (vision.grid_size + 1, width)),
        **with_bias("pre_norm", "visual.ln_pre", (width,)),
    }
    for i in range(vision.num_layers):
        ours, theirs = f"layers.{i}", f"visual.transformer.resblocks.{i}"
        found |= with_bias(f"{ours}.attention_norm", f"{theirs}.ln_1", (width,))
        for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
            span = place * width, (place + 1) * width
            found[f"{ours}.{name}.weight"] = rows(f"{theirs}.attn.in_proj_weight", (3 * width, width), *span)
            found[f"{ours}.{name}.bias"] = rows(f"{theirs}.attn.in_proj_bias", (3 * width,), *span)
        found |= with_bias(f"{ours}.out_proj", f"{theirs}.attn.out_proj", (width, width))
        found |= with_bias(f"{ours}.ffw_norm", f"{theirs}.ln_2", (width,))
        found |= with_bias(f"{ours}.ffw_up", f"{theirs}.mlp.c_fc", (inner, width))
        found |= with_bias(f"{ours}.ffw_down", f"{theirs}.mlp.c_proj", (width, inner))
    if vision.final_norm:
        found |= with_bias("final_norm", "visual.ln_post", (width,))
    return {f"vision_encoder.{name}": recipe for name, recipe in found.items()}


def recipes_for(vision: ViTConfig, shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """`openai_recipes` or `recipes`, by the names that a file has."""
    return openai_recipes(vision) if "visual.conv1.weight" in shapes else recipes(vision, _prefix(shapes))


def _prefix(shapes: Mapping[str, Shape]) -> str:
    """What stands before transformers' names in a file."""
    return "" if "embeddings.class_embedding" in shapes else "vision_model."
