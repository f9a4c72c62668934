"""CLIP's text tower and the projections into the space that it shares with images, in the layouts that clip.py knows.

openai         visual.ln_post, visual.proj, transformer.resblocks.0..., text_projection (both projections [in, out])
transformers   vision_model.post_layernorm, visual_projection, text_model.encoder.layers.0..., text_projection

A file that holds the image encoder only has none of it. Settings that change what the text tower computes leave the towers out and say so:
the model itself does not need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.conversions import Recipe, choice, setting, transposed
from flamingo_reference.checkpoints.converted import source_shapes
from flamingo_reference.checkpoints.families.clip import (
    HEAD_SIZE,
    OPEN_CLIP_CONFIG,
    OPENAI_LAYER,
    TRANSFORMERS_LAYER,
    refuse_two,
    settings_of,
)
from flamingo_reference.checkpoints.name_table import filled, table
from flamingo_reference.config import ConfigError, ViTConfig
from flamingo_reference.contrastive_config import ClassToken, ContrastiveConfig, TextConfig

TEMPLATE = "a photo of a {}."
"""Radford et al. 2021, section 3.1.4."""


class Towers(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of CLIP holds beside its image encoder. config: None where that is nothing usable. note: why it is not, empty where there
    is simply nothing."""

    config: ContrastiveConfig | None = None
    note: str = ""


def towers_of(
    shapes: Mapping[str, Shape], settings: Mapping[str, Any], open_clip: Mapping[str, Any], vision: ViTConfig
) -> Towers:
    """The towers in a file whose image encoder is `vision`. shapes, settings, open_clip: as `clip.encoder_of` takes them."""
    openai = "visual.conv1.weight" in shapes
    proj, width_at = ("visual.proj", 0) if openai else ("visual_projection.weight", 1)
    if proj not in shapes:
        return Towers()
    if len(shapes[proj]) != 2 or shapes[proj][width_at] != vision.width:
        return Towers(note=f"{proj} has shape {shapes[proj]} and the image encoder is {vision.width} wide")
    try:
        if open_clip and settings.get("model_type") is None:
            _check_open_clip_pooling(open_clip)
        text, eps = _text(shapes, settings, open_clip, openai=openai)
    except ConfigError as error:
        return Towers(note=str(error))
    config = ContrastiveConfig(
        joint_width=shapes[proj][1 - width_at],
        pooling=ClassToken(),
        image_norm=True,
        norm_eps=vision.norm_eps if eps is None else eps,
        text=text,
        template=TEMPLATE,
    )
    layers, read = f"{_NAMES['openai' if openai else 'transformers'].layers}.", source_shapes(recipes(config, vision, shapes))
    unread = [name for name in shapes if name.startswith(layers) and name not in read] if text is not None else []
    if unread:
        return Towers(note=f"the text encoder holds {unread[0]}, which CLIP's has not")
    return Towers(config=config)


def _check_open_clip_pooling(raw: Mapping[str, Any]) -> None:
    """Raises ConfigError for an image encoder that is pooled otherwise than by its class token; its features are the same."""
    where = f"{OPEN_CLIP_CONFIG}, vision_cfg"
    model = setting(raw, "model_cfg", dict, where=OPEN_CLIP_CONFIG)
    vision = setting(model, "vision_cfg", dict, {}, where=f"{OPEN_CLIP_CONFIG}, model_cfg")
    choice(vision, "pool_type", {"tok": None}, "tok", where=where)
    choice(vision, "global_average_pool", {False: None, None: None}, False, where=where)  # its name in earlier versions


def _text(
    shapes: Mapping[str, Shape], settings: Mapping[str, Any], open_clip: Mapping[str, Any], *, openai: bool
) -> tuple[TextConfig | None, float | None]:
    """The text tower, None where the file has none. Raises ConfigError for one that has no counterpart here."""
    names = _NAMES["openai" if openai else "transformers"]
    if names.embedding not in shapes:
        return None, None
    missing = [
        name for name in (names.positions, names.projection, f"{names.layers}.0.{names.up}.weight") if name not in shapes
    ]
    flat = [name for name in (names.embedding, names.positions, names.projection) if name in shapes and len(shapes[name]) != 2]
    if missing or flat:
        raise ConfigError(f"the text encoder is incomplete: {', '.join(missing + flat)} missing or no matrix")
    vocab_size, width = shapes[names.embedding]
    found = TextConfig(
        num_layers=len(
            {name.removeprefix(f"{names.layers}.").split(".")[0] for name in shapes if name.startswith(f"{names.layers}.")}
        ),
        width=width,
        num_heads=max(1, width // HEAD_SIZE),
        ffw_width=shapes[f"{names.layers}.0.{names.up}.weight"][0],
        vocab_size=vocab_size,
        max_positions=shapes[names.positions][0],
    )
    if not openai:
        return _transformers_text(found, settings), None
    if open_clip and settings.get("model_type") is None:
        return _open_clip_text(found, open_clip), None
    return found, None


def _transformers_text(found: TextConfig, settings: Mapping[str, Any]) -> TextConfig:
    given, older = (settings_of(settings, name) for name in ("text_config", "text_config_dict"))
    text = _text_of(found, given or {})
    refuse_two("text_config", text, text if older is None else _text_of(found, older))
    return text


def _text_of(found: TextConfig, raw: Mapping[str, Any]) -> TextConfig:
    where = "config.json of CLIP, text_config"
    return msgspec.structs.replace(
        found,
        num_heads=setting(raw, "num_attention_heads", int, 8, where=where),
        activation=choice(raw, "hidden_act", {"quick_gelu": "quick_gelu", "gelu": "gelu"}, "quick_gelu", where=where),
        norm_eps=setting(raw, "layer_norm_eps", float, 1e-5, where=where),
    )


# Settings of open_clip's text_cfg that change what is computed, and the values under which it is CLIP's.
_OPEN_CLIP_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "hf_model_name": (None,),
    "hf_tokenizer_name": (None, ""),
    "ls_init_value": (None,),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "final_ln_after_pool": (False,),
    "pool_type": ("argmax",),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "norm_type": (None, "LayerNorm"),
}


def _open_clip_text(found: TextConfig, raw: Mapping[str, Any]) -> TextConfig:
    model = setting(raw, "model_cfg", dict, where=OPEN_CLIP_CONFIG)
    where = f"{OPEN_CLIP_CONFIG}, text_cfg"
    text = setting(model, "text_cfg", dict, {}, where=f"{OPEN_CLIP_CONFIG}, model_cfg")
    for name, plain in _OPEN_CLIP_PLAIN.items():
        choice(text, name, dict.fromkeys(plain), plain[0], where=where)
    for name in ("norm_kwargs", "act_kwargs"):
        if text.get(name):
            raise ConfigError(f"{where}: {name} is {text[name]!r:.80}, which is not supported; expected none.")
    quick = setting(model, "quick_gelu", bool, False, where=f"{OPEN_CLIP_CONFIG}, model_cfg")
    return msgspec.structs.replace(
        found,
        num_heads=setting(text, "heads", int, 8, where=where),
        activation="quick_gelu" if quick else "gelu",
    )


class _Names(msgspec.Struct, frozen=True, kw_only=True):
    embedding: str
    positions: str
    projection: str
    layers: str
    up: str


_NAMES = {
    "openai": _Names(
        embedding="token_embedding.weight",
        positions="positional_embedding",
        projection="text_projection",
        layers="transformer.resblocks",
        up="mlp.c_fc",
    ),
    "transformers": _Names(
        embedding="text_model.embeddings.token_embedding.weight",
        positions="text_model.embeddings.position_embedding.weight",
        projection="text_projection.weight",
        layers="text_model.encoder.layers",
        up="mlp.fc1",
    ),
}
TRANSFORMERS_IMAGE = table("""
    norm                        vision_model.post_layernorm             E        bias
    proj                        visual_projection                       J,E
""")
TRANSFORMERS_TEXT = table("""
    embedding                   text_model.embeddings.token_embedding       V,W
    position_embedding          text_model.embeddings.position_embedding    S,W
    final_norm                  text_model.final_layer_norm                 W        bias
    proj                        text_projection                             J,W
""")
OPENAI_IMAGE = table("norm   visual.ln_post   E   bias")
OPENAI_TEXT = table("""
    embedding                   token_embedding                         V,W
    position_embedding.weight   positional_embedding                    S,W      exact
    final_norm                  ln_final                                W        bias
""")


def recipes(config: ContrastiveConfig, vision: ViTConfig, shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """Our names, below `contrastive.`, from those of the layout that a file has."""
    openai = "visual.conv1.weight" in shapes
    text, joint = config.text, config.joint_width
    sizes: dict[str, int | Shape] = {"E": vision.width, "J": joint}
    found = filled(OPENAI_IMAGE if openai else TRANSFORMERS_IMAGE, "contrastive.image.", "", sizes)
    if openai:
        found["contrastive.image.proj.weight"] = transposed("visual.proj", (vision.width, joint))
    if text is None:
        return found
    sizes = {"V": text.vocab_size, "W": text.width, "S": text.max_positions, "F": text.ffw_width, "J": joint}
    ours, names = "contrastive.text.", _NAMES["openai" if openai else "transformers"]
    found |= filled(OPENAI_TEXT if openai else TRANSFORMERS_TEXT, ours, "", sizes)
    if openai:
        found[f"{ours}proj.weight"] = transposed("text_projection", (text.width, joint))
    for i in range(text.num_layers):
        found |= filled(OPENAI_LAYER if openai else TRANSFORMERS_LAYER, f"{ours}layers.{i}.", f"{names.layers}.{i}.", sizes)
    return found | filled(table("logit_scale   logit_scale   J   exact"), "contrastive.", "", {"J": ()})
