"""CLIP's vision transformer, in the two layouts that are published.

openai         ViT-L-14.pt and open_clip's files: visual.conv1, visual.transformer.resblocks.0.attn.in_proj_weight (q, k and v joined).
               open_clip's models differ in their activation and heads, which open_clip_config.json says and no tensor does
transformers   vision_model.embeddings.patch_embedding, vision_model.encoder.layers.0.self_attn.q_proj; also inside of IDEFICS, and, as newer
               versions save only the image encoder, without `vision_model.`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.conversions import Recipe, choice, setting
from flamingo_reference.checkpoints.families.preprocessor import Colour, Images, read_images, three_numbers
from flamingo_reference.checkpoints.name_table import Table, filled, table
from flamingo_reference.config import Activation, ConfigError, ViTConfig
from flamingo_reference.input_format import ImageFit

# CLIP's preprocessing (Radford et al. 2021): mean and standard deviation of RGB in 0..1.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_SIZE = 64
"""Of every model that OpenAI published; the tensors do not tell."""
OPEN_CLIP_CONFIG = "open_clip_config.json"
_CONFIG = "config.json of CLIP"
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
"""Sizes that OpenAI's own files hold as tensors, and no other's."""
IGNORED = (
    (r"(visual\.ln_post|(vision_model\.)?post_layernorm)\.(weight|bias)", "norm that the features do not go through"),
    (r"(visual\.proj|visual_projection\.weight)", "projection into the space shared with text"),
    (r"(transformer\.resblocks\.|text_model\.|token_embedding\.|ln_final\.).*", "CLIP's text encoder"),
    (r"(positional_embedding|text_projection|text_projection\.weight|logit_scale)", "CLIP's text encoder"),
    (r"(input_resolution|context_length|vocab_size)", "sizes stored as tensors"),
    (r"(vision_model\.)?embeddings\.position_ids", "the numbers 0, 1, ..., which need no tensor"),
)
"""Tensors of CLIP's files that the model does not need: pattern of the whole name, and why."""


class Encoder(msgspec.Struct, frozen=True, kw_only=True):
    """An image encoder and how images are prepared for it: mean and standard deviation of RGB in 0..1, the fit of their shape."""

    vision: ViTConfig
    pixel_mean: Colour = PIXEL_MEAN
    pixel_std: Colour = PIXEL_STD
    fit: ImageFit = "crop"


def encoder_of(
    shapes: Mapping[str, Shape], settings: Mapping[str, Any], open_clip: Mapping[str, Any], *, path: Path
) -> Encoder:
    """The encoder in a file or folder.

    shapes: of its tensors. settings: transformers' config.json, open_clip: open_clip_config.json, each empty where there is none.
    Raises ConfigError if nothing says which activation the model was trained with: it is never guessed.
    """
    # A config.json without model_type beside open_clip's is another library's (timm).
    if open_clip and settings.get("model_type") is None:
        return _open_clip_encoder(shapes, open_clip)
    if settings:
        return transformers_encoder(settings, path)
    openai = "visual.conv1.weight" in shapes
    if openai and all(name in shapes for name in OPENAI_MARKS):
        return Encoder(vision=config_from_shapes(shapes))
    config_from_shapes(shapes)  # says first what no CLIP is
    if openai:
        raise ConfigError(
            f"{path} is not OpenAI's own file (it lacks {', '.join(name for name in OPENAI_MARKS if name not in shapes)}), and models of "
            f"these shapes were trained with GELU and with QuickGELU, which no tensor tells. Give the folder that holds its {OPEN_CLIP_CONFIG}, "
            "or OpenAI's ViT-L-14.pt."
        )
    raise ConfigError(
        f"{path} has no config.json, which says how its tensors are computed with. Give the folder that holds both."
    )


def transformers_encoder(settings: Mapping[str, Any], folder: Path) -> Encoder:
    """The encoder of transformers' config.json, with what is written beside it of images. Raises ConfigError, CheckpointError."""
    vision = config_from(settings)
    images = read_images(folder, vision.image_size, Images(mean=PIXEL_MEAN, std=PIXEL_STD), crop=True)
    return Encoder(vision=vision, pixel_mean=images.mean, pixel_std=images.std)


def _open_clip_encoder(shapes: Mapping[str, Shape], raw: Mapping[str, Any]) -> Encoder:
    """What open_clip_config.json says, sizes being those of the tensors. Raises ConfigError for what has no counterpart here."""
    where = OPEN_CLIP_CONFIG
    model = setting(raw, "model_cfg", dict, where=where)
    vision = setting(model, "vision_cfg", dict, where=f"{where}, model_cfg")
    inner = f"{where}, vision_cfg"
    for name, plain in _OPEN_CLIP_PLAIN.items():
        choice(vision, name, dict.fromkeys(plain), plain[0], where=inner)
    norm = setting(vision, "norm_kwargs", dict, {}, where=inner) if vision.get("norm_kwargs") is not None else {}
    if vision.get("act_kwargs"):
        raise ConfigError(f"{inner}: act_kwargs is {vision['act_kwargs']!r:.80}, which is not supported; expected none.")
    head = setting(vision, "head_width", int, HEAD_SIZE, where=inner)
    quick = setting(model, "quick_gelu", bool, False, where=f"{where}, model_cfg")
    found = config_from_shapes(shapes, activation="quick_gelu" if quick else "gelu")
    if head < 1 or found.width % head:
        raise ConfigError(f"{inner}: head_width {head} does not divide the encoder's width {found.width}.")
    for name, size in (("width", found.width), ("layers", found.num_layers), ("patch_size", found.patch_size)):
        configured = vision.get(name, size)
        if configured != size:
            raise ConfigError(f"{inner}: {name} is {configured!r:.80}, the tensors have {size}. Bring the files of one model.")
    if vision.get("image_size", found.image_size) not in (found.image_size, [found.image_size] * 2):
        raise ConfigError(
            f"{inner}: image_size is {vision['image_size']!r:.80}, the tensors have {found.image_size}. Bring the files of one model."
        )
    found = msgspec.structs.replace(
        found, num_heads=found.width // head, norm_eps=setting(norm, "eps", float, 1e-5, where=f"{inner}, norm_kwargs")
    )
    images = setting(raw, "preprocess_cfg", dict, {}, where=where) if raw.get("preprocess_cfg") is not None else {}
    choice(images, "interpolation", {"bicubic": None}, "bicubic", where=f"{where}, preprocess_cfg")
    fit = choice(images, "resize_mode", {"shortest": "crop", "squash": "stretch"}, "shortest", where=f"{where}, preprocess_cfg")
    return Encoder(
        vision=found, pixel_mean=_colour(images, "mean", PIXEL_MEAN), pixel_std=_colour(images, "std", PIXEL_STD), fit=fit
    )


# Settings of open_clip's vision_cfg that change what is computed, and the values under which it is CLIP's transformer.
_OPEN_CLIP_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "timm_model_name": (None,),
    "ls_init_value": (None,),
    "attentional_pool": (False, None),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "norm_type": (None, "LayerNorm"),
}


def _colour(raw: Mapping[str, Any], name: str, default: Colour) -> Colour:
    if raw.get(name) is None:
        return default
    return three_numbers(raw[name], f"{OPEN_CLIP_CONFIG}, preprocess_cfg: {name}")


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
    given = settings_of(raw, "vision_config")
    vision = _vision(raw if given is None else given)
    older = settings_of(raw, "vision_config_dict")
    refuse_two("vision_config", vision, vision if older is None or given is None else _vision(older))
    return vision


def settings_of(raw: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A tower's settings in transformers' config.json of a whole CLIP, under `name`, or under its older name, `name` and `_dict`."""
    found = name if raw.get(name) is not None else f"{name.removesuffix('_dict')}_dict"
    value: Mapping[str, Any] | None = setting(raw, found, dict, where=_CONFIG) if raw.get(found) is not None else None
    return value


def refuse_two(name: str, one: msgspec.Struct, other: msgspec.Struct) -> None:
    """Raises ConfigError if a tower is another by the older name of its settings, by which transformers goes where there are both."""
    said, older = msgspec.structs.asdict(one), msgspec.structs.asdict(other)
    unlike = [f"{each} {older[each]!r} for {said[each]!r}" for each in said if said[each] != older[each]]
    if unlike:
        raise ConfigError(
            f"{_CONFIG}: {name}_dict and {name} are two names of one setting, and say different things ({', '.join(unlike)}). Remove the one "
            "that was not trained with."
        )


def _vision(vision: Mapping[str, Any]) -> ViTConfig:
    where = _CONFIG
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


TRANSFORMERS = table("""
    class_embedding             embeddings.class_embedding              W        exact
    patch_embedding             embeddings.patch_embedding              W,C
    position_embedding          embeddings.position_embedding           P,W
    pre_norm                    pre_layrnorm                            W        bias
""")
TRANSFORMERS_LAYER = table("""
    attention_norm              layer_norm1                             W        bias
    q_proj                      self_attn.q_proj                        W,W      bias
    k_proj                      self_attn.k_proj                        W,W      bias
    v_proj                      self_attn.v_proj                        W,W      bias
    out_proj                    self_attn.out_proj                      W,W      bias
    ffw_norm                    layer_norm2                             W        bias
    ffw_up                      mlp.fc1                                 F,W      bias
    ffw_down                    mlp.fc2                                 W,F      bias
""")
TRANSFORMERS_LAST = table("final_norm   post_layernorm   W   bias")
OPENAI = table("""
    class_embedding             class_embedding                         W        exact
    patch_embedding.weight      conv1.weight                            W,C      exact
    position_embedding.weight   positional_embedding                    P,W      exact
    pre_norm                    ln_pre                                  W        bias
""")
OPENAI_LAYER = table("""
    attention_norm              ln_1                                    W        bias
    q_proj.weight               attn.in_proj_weight                     W,W      exact  part 1 of 3
    k_proj.weight               attn.in_proj_weight                     W,W      exact  part 2 of 3
    v_proj.weight               attn.in_proj_weight                     W,W      exact  part 3 of 3
    q_proj.bias                 attn.in_proj_bias                       W        exact  part 1 of 3
    k_proj.bias                 attn.in_proj_bias                       W        exact  part 2 of 3
    v_proj.bias                 attn.in_proj_bias                       W        exact  part 3 of 3
    out_proj                    attn.out_proj                           W,W      bias
    ffw_norm                    ln_2                                    W        bias
    ffw_up                      mlp.c_fc                                F,W      bias
    ffw_down                    mlp.c_proj                              W,F      bias
""")
OPENAI_LAST = table("final_norm   ln_post   W   bias")


def recipes(vision: ViTConfig, prefix: str) -> dict[str, Recipe]:
    """Our names, below `vision_encoder.`, from transformers' below `prefix`."""
    return _filled(vision, prefix, TRANSFORMERS, "encoder.layers", TRANSFORMERS_LAYER, TRANSFORMERS_LAST)


def openai_recipes(vision: ViTConfig) -> dict[str, Recipe]:
    """Our names, below `vision_encoder.`, from OpenAI's."""
    return _filled(vision, "visual.", OPENAI, "transformer.resblocks", OPENAI_LAYER, OPENAI_LAST)


def _filled(vision: ViTConfig, prefix: str, first: Table, layers: str, layer: Table, last: Table) -> dict[str, Recipe]:
    ours, patch = "vision_encoder.", (3, vision.patch_size, vision.patch_size)
    sizes: dict[str, int | Shape] = {"W": vision.width, "F": vision.ffw_width, "P": vision.grid_size + 1, "C": patch}
    found = filled(first, ours, prefix, sizes)
    for i in range(vision.num_layers):
        found |= filled(layer, f"{ours}layers.{i}.", f"{prefix}{layers}.{i}.", sizes)
    return found | (filled(last, ours, prefix, sizes) if vision.final_norm else {})


def recipes_for(vision: ViTConfig, shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """`openai_recipes` or `recipes`, by the names that a file has, which need not be all of them."""
    return openai_recipes(vision) if any(name.startswith("visual.") for name in shapes) else recipes(vision, _prefix(shapes))


def _prefix(shapes: Mapping[str, Shape]) -> str:
    """What stands before transformers' names in a file."""
    return "" if any(name.startswith(("embeddings.", "pre_layrnorm.", "encoder.")) for name in shapes) else "vision_model."
