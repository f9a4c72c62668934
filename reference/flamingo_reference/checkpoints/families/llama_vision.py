"""Llama 3.2 Vision (meta-llama/Llama-3.2-11B-Vision, -90B-Vision, -Instruct, and what was tuned from them), `mllama` in transformers.

Names, shapes and settings are those of transformers' `MllamaForConditionalGeneration`: in published files `vision_model.`,
`multi_modal_projector.` and `language_model.model.`; what its live model calls them (`model.vision_model.`, `lm_head.`) is known too. What
is computed follows Meta's own code (`llama-models`): the features are the inputs of the layers that the config lists, and a token that
sees no image passes a gated block unchanged. transformers 4.57 and later do otherwise in both.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from flamingo_reference.arrays import Array, Shape
from flamingo_reference.checkpoints.conversions import (
    Recipe,
    as_is,
    choice,
    named,
    plain_head_size,
    positive,
    reshaped,
    rope_type,
    setting,
    token_ids,
)
from flamingo_reference.checkpoints.families import clip
from flamingo_reference.checkpoints.name_table import filled, table
from flamingo_reference.config import (
    ConfigError,
    CrossAttentionConfig,
    LanguageModelConfig,
    Llama3Scaling,
    ModelConfig,
    RotaryPositions,
    TiledViTConfig,
    TokenIds,
    projector_config,
)

EXTRA_EMBEDDINGS = 8
"""Rows that the embedding has beyond the output's: the image token is the first of them."""
TURN = 128009
"""Id of `<|eot_id|>`, which ends a turn of the published models that were tuned on instructions."""
NOTES = (
    "features and tokens before the first image are computed as Meta's own code does and the weights were trained; transformers since 4.57 "
    "takes other features, and lets such tokens attend to images (docs/llama_vision.md)",
)
IGNORED = ((r".*\.rotary_emb\.inv_freq", "frequencies of the rotary positions, which follow from the config"),)
"""Tensors of the files that the model does not need: pattern of the whole name, and why."""

_LIVE = ("model.vision_model.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")
_PUBLISHED = ("vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.")


def plain_name(name: str) -> str:
    """A tensor's published name, from that or from the name it has in transformers' live model."""
    for live, published in zip(_LIVE, _PUBLISHED, strict=True):
        if name.startswith(live):
            return published + name.removeprefix(live)
    return name


def live_name(name: str) -> str:
    """The name in transformers' live model of a tensor with this published name."""
    for live, published in zip(_LIVE, _PUBLISHED, strict=True):
        if name.startswith(published):
            return live + name.removeprefix(published)
    return name


def has_live_names(names: Collection[str]) -> bool:
    """Whether a file's tensors are named as in transformers' live model."""
    return any(name.startswith(_LIVE[0]) for name in names)


def config_from(raw: Mapping[str, Any], *, name: str = "llama-vision", ends: Sequence[int] = ()) -> ModelConfig:
    """The model that a published config.json describes. ends: tokens that end a text, the one that ends an answer first; without them
    those of the config.

    Raises ConfigError naming what is missing or not supported.
    """
    text = setting(raw, "text_config", dict)
    vision = _vision(setting(raw, "vision_config", dict))
    where = "config.json, text_config"
    width, heads = (
        setting(text, "hidden_size", int, 4096, where=where),
        setting(text, "num_attention_heads", int, 32, where=where),
    )
    kv_heads = setting(text, "num_key_value_heads", int, 8, where=where)
    layers = setting(text, "num_hidden_layers", int, 40, where=where)
    if min(width, heads, kv_heads) < 1 or width % heads or heads % kv_heads:
        raise ConfigError(
            f"{where}: hidden_size {width} must be a multiple of num_attention_heads {heads}, and that one of "
            f"num_key_value_heads {kv_heads}."
        )
    plain_head_size(text, width, heads, where=where)
    vocab = setting(text, "vocab_size", int, 128256, where=where)
    image = setting(raw, named(raw, ("image_token_index", "image_token_id")), int, 128256)
    if not vocab <= image < vocab + EXTRA_EMBEDDINGS:
        raise ConfigError(
            f"config.json: image_token_index is {image}, expected one of the {EXTRA_EMBEDDINGS} tokens beyond the output's {vocab} rows."
        )
    projected = setting(vision_raw := setting(raw, "vision_config", dict), "vision_output_dim", int, vision.feature_width)
    if projected != vision.feature_width:
        raise ConfigError(
            f"config.json: vision_config.vision_output_dim is {projected}, and {1 + len(vision.feature_layers)} states of "
            f"{vision_raw.get('hidden_size')} side by side are {vision.feature_width}."
        )
    choice(text, "hidden_act", {"silu": "swiglu"}, "silu", where=where)
    choice(text, "tie_word_embeddings", {False: None}, False, where=where)
    every, offset, count = _schedule(text, layers)
    ffw, eps, head_size = (
        setting(text, "intermediate_size", int, 14336, where=where),
        setting(text, "rms_norm_eps", float, 1e-5, where=where),
        width // heads,
    )
    ends = tuple(ends) or token_ids(text, "eos_token_id", 128001, where=where)
    pad = text.get("pad_token_id")
    return ModelConfig(
        name=name,
        vision=vision,
        resampler=projector_config(num_latents=vision.num_patches, width=width),
        cross_attention=CrossAttentionConfig(
            every=every,
            offset=offset,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            ffw_width=ffw,
            norm="rms_norm",
            norm_eps=eps,
            qk_norm=True,
            feed_forward="swiglu",
            sees="group",
            without_media="nothing",
        ),
        language_model=LanguageModelConfig(
            num_layers=count,
            width=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            ffw_width=ffw,
            vocab_size=vocab,
            extra_embeddings=EXTRA_EMBEDDINGS,
            max_positions=setting(text, "max_position_embeddings", int, 131072, where=where),
            norm_eps=eps,
            positions=_rotary(text, head_size),
            feed_forward="swiglu",
            tied_head=False,
        ),
        tokens=TokenIds(
            pad=ends[0] if pad is None else setting(text, "pad_token_id", int, where=where),
            bos=token_ids(text, "bos_token_id", 128000, where=where)[0],
            eoc=ends[0],
            image=image,
            ends=tuple(dict.fromkeys(end for end in ends if end != ends[0])),
        ),
        pixel_mean=clip.PIXEL_MEAN,
        pixel_std=clip.PIXEL_STD,
    )


def _schedule(text: Mapping[str, Any], layers: int) -> tuple[int, int, int]:
    """(every, offset, number of LM layers) of a list of gated layers, numbered among all. Raises ConfigError for a list that is not a regular
    schedule of gated blocks, each before a language model layer."""
    where = "config.json, text_config"
    listed = setting(text, "cross_attention_layers", list, [3, 8, 13, 18, 23, 28, 33, 38], where=where)
    wrong = [each for each in listed if type(each) is not int or not 0 <= each < layers]
    if wrong or sorted(set(listed)) != listed or not listed:
        raise ConfigError(f"{where}: cross_attention_layers is {listed!r:.80}, expected layers of {layers} in order.")
    adjacent = [each for each in listed if each + 1 in listed]
    if adjacent:
        raise ConfigError(
            f"{where}: cross_attention_layers has layers {adjacent[0]} and {adjacent[0] + 1} next to each other; this version puts one "
            "gated block before a layer of the language model."
        )
    if listed[-1] == layers - 1:
        raise ConfigError(
            f"{where}: cross_attention_layers ends with the model's last layer, {listed[-1]}; no layer of the language model follows."
        )
    before = [each - i for i, each in enumerate(listed)]
    count = layers - len(listed)
    every = before[1] - before[0] if len(before) > 1 else count
    regular = range(before[0], count, every)
    if len(regular) != len(before) or list(regular) != before or before[0] >= every:
        raise ConfigError(
            f"{where}: cross_attention_layers {listed} is not a regular schedule: gated blocks would stand before layers {before} of the "
            f"language model's {count}."
        )
    return every, before[0], count


def _rotary(text: Mapping[str, Any], head_size: int) -> RotaryPositions:
    """Rotary positions with llama3 scaling, from `rope_scaling` (published) or `rope_parameters` (transformers 5)."""
    where = "config.json, text_config, rope_scaling"
    given = [text[name] for name in ("rope_parameters", "rope_scaling") if text.get(name)]
    if len(given) == 2 and given[0] != given[1]:
        raise ConfigError(
            "config.json, text_config: rope_parameters and rope_scaling are two names of one setting, and say different things. "
            "Remove the one that was not trained with."
        )
    rope = setting({"rope_scaling": given[0] if given else {}}, "rope_scaling", dict, where="config.json, text_config")
    base = positive({**text, **rope}, "rope_theta", 500000.0, where="config.json, text_config")
    if not rope_type(rope, {"llama3": True, "default": False}, where=where):
        return RotaryPositions(size=head_size, base=base)
    # What the published models have is not taken for granted: transformers has other values where one is left out.
    lacking = [
        name
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if name not in rope
    ]
    if lacking:
        raise ConfigError(f"{where}: {', '.join(lacking)} missing, which rope_type 'llama3' needs. Fetch the file again.")
    factor, low, high = (positive(rope, name, 0.0, where=where) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = setting(rope, "original_max_position_embeddings", int, where=where)
    return RotaryPositions(
        size=head_size, base=base, scaling=Llama3Scaling(factor=factor, low=low, high=high, original=original)
    )


def _vision(raw: Mapping[str, Any]) -> TiledViTConfig:
    where = "config.json, vision_config"
    chosen = setting(raw, "intermediate_layers_indices", list, [3, 7, 15, 23, 30], where=where)
    if any(type(each) is not int or each < 0 for each in chosen):
        raise ConfigError(f"{where}: intermediate_layers_indices is {chosen!r:.80}, expected numbers of layers.")
    vision = TiledViTConfig(
        image_size=setting(raw, "image_size", int, 448, where=where),
        patch_size=setting(raw, "patch_size", int, 14, where=where),
        width=setting(raw, "hidden_size", int, 1280, where=where),
        num_layers=setting(raw, "num_hidden_layers", int, 32, where=where),
        num_global_layers=setting(raw, "num_global_layers", int, 8, where=where),
        num_heads=setting(raw, named(raw, ("attention_heads", "num_attention_heads"), where=where), int, 16, where=where),
        ffw_width=setting(raw, "intermediate_size", int, 5120, where=where),
        max_tiles=setting(raw, "max_num_tiles", int, 4, where=where),
        feature_layers=tuple(chosen),
        activation=choice(raw, "hidden_act", {"gelu": "gelu", "quick_gelu": "quick_gelu"}, "gelu", where=where),
        norm_eps=setting(raw, "norm_eps", float, 1e-5, where=where),
    )
    choice(raw, "num_channels", {3: None}, 3, where=where)
    # Two of the norms have this one whatever the config says, in Meta's code as in transformers'.
    choice(raw, "norm_eps", {1e-5: None}, 1e-5, where=where)
    if min(vision.image_size, vision.patch_size, vision.width, vision.num_heads) < 1:
        raise ConfigError(f"{where}: image_size, patch_size, hidden_size and attention_heads must be at least 1.")
    if not 1 <= vision.max_tiles <= 64:
        raise ConfigError(f"{where}: max_num_tiles is {vision.max_tiles}, expected 1 to 64.")
    known = [list(ratio) for ratio in vision.aspect_ratios]
    listed = setting(raw, "supported_aspect_ratios", list, known, where=where)
    if listed != known:
        raise ConfigError(
            f"{where}: supported_aspect_ratios is {listed!r:.120}, expected all (rows, columns) of up to {vision.max_tiles} tiles in "
            f"order, which the tile embeddings are numbered by: {known}."
        )
    return vision


VISION = table("""
    class_embedding               class_embedding                                E      exact
    patch_embedding               patch_embedding                                E,3,K,K
    position_embedding.weight     gated_positional_embedding.embedding           P,E    exact
    tile_position_embedding       gated_positional_embedding.tile_embedding      A,TPE
    pre_tile_embedding            pre_tile_positional_embedding.embedding        A,TE
    post_tile_embedding           post_tile_positional_embedding.embedding       A,TE
    pre_norm                      layernorm_pre                                  E      bias
    post_norm                     layernorm_post                                 E      bias
""")
VISION_GATES = {
    "position_gate": "gated_positional_embedding.gate",
    "pre_tile_gate": "pre_tile_positional_embedding.gate",
    "post_tile_gate": "post_tile_positional_embedding.gate",
}
VISION_LAYER = table("""
    attention_norm  input_layernorm             E      bias
    q_proj          self_attn.q_proj            E,E
    k_proj          self_attn.k_proj            E,E
    v_proj          self_attn.v_proj            E,E
    out_proj        self_attn.o_proj            E,E
    ffw_norm        post_attention_layernorm    E      bias
    ffw_up          mlp.fc1                     F,E    bias
    ffw_down        mlp.fc2                     E,F    bias
""")
GATED = table("""
    norm            input_layernorm             W
    q_proj          cross_attn.q_proj           I,W
    k_proj          cross_attn.k_proj           G,W
    v_proj          cross_attn.v_proj           G,W
    q_norm          cross_attn.q_norm           D
    k_norm          cross_attn.k_norm           D
    out_proj        cross_attn.o_proj           W,I
    ffw_norm        post_attention_layernorm    W
    ffw_swish       mlp.gate_proj               F,W
    ffw_up          mlp.up_proj                 F,W
    ffw_down        mlp.down_proj               W,F
""")
LAYER = table("""
    attention_norm  input_layernorm             W
    q_proj          self_attn.q_proj            I,W
    k_proj          self_attn.k_proj            G,W
    v_proj          self_attn.v_proj            G,W
    out_proj        self_attn.o_proj            W,I
    ffw_norm        post_attention_layernorm    W
    ffw_swish       mlp.gate_proj               F,W
    ffw_up          mlp.up_proj                 F,W
    ffw_down        mlp.down_proj               W,F
""")


def recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Every tensor of ours, from those of the published files by their published names."""
    assert isinstance(config.vision, TiledViTConfig)
    lm, width = config.language_model, config.language_model.width
    projector = "multi_modal_projector"
    features = config.vision.feature_width
    return {
        **_vision_recipes(config.vision),
        "resampler.input_proj.weight": Recipe(
            {f"{projector}.weight": (width, features)}, functools.partial(side_by_side, width=config.vision.width)
        ),
        "resampler.input_proj.bias": as_is(f"{projector}.bias", (width,)),
        "language_model.embedding.weight": as_is("language_model.model.embed_tokens.weight", (lm.embedding_rows, width)),
        "language_model.norm.weight": as_is("language_model.model.norm.weight", (width,)),
        "language_model.head.weight": as_is("language_model.lm_head.weight", (lm.vocab_size, width)),
        **_layer_recipes(config),
    }


def side_by_side(sources: Sequence[Array], *, width: int) -> Array:
    """Columns of the projector in our order of features: the final state, then each chosen layer's whole input. In the files the chosen
    layers are interleaved, channel by channel."""
    (matrix,) = sources
    chosen = matrix[:, width:].reshape(len(matrix), width, -1)
    return np.concatenate([matrix[:, :width], *np.moveaxis(chosen, 2, 0)], axis=1)


def _vision_recipes(vision: TiledViTConfig) -> dict[str, Recipe]:
    ours, theirs = "vision_encoder.", "vision_model."
    sizes: dict[str, int | Shape] = {
        "3": 3,
        "E": vision.width,
        "K": vision.patch_size,
        "P": vision.num_patches,
        "A": len(vision.aspect_ratios) + 1,
        "TPE": vision.max_tiles * vision.num_patches * vision.width,
        "TE": vision.max_tiles * vision.width,
        "F": vision.ffw_width,
    }
    found = filled(VISION, ours, theirs, sizes)
    found |= {f"{ours}{gate}": _gate(f"{theirs}{name}") for gate, name in VISION_GATES.items()}
    for i in range(vision.num_layers):
        found |= filled(VISION_LAYER, f"{ours}layers.{i}.", f"{theirs}transformer.layers.{i}.", sizes)
    for i in range(vision.num_global_layers):
        prefix, source = f"{ours}global_layers.{i}.", f"{theirs}global_transformer.layers.{i}."
        found |= filled(VISION_LAYER, prefix, source, sizes)
        found |= {f"{prefix}attention_gate": _gate(f"{source}gate_attn"), f"{prefix}ffw_gate": _gate(f"{source}gate_ffn")}
    return found


def _layer_recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Language model layers and the gated blocks before them, which the files number as one stack."""
    lm, block = config.language_model, config.cross_attention
    sizes: dict[str, int | Shape] = {
        "W": lm.width,
        "I": lm.num_heads * lm.head_size,
        "G": lm.kv_heads * lm.head_size,
        "D": block.head_size,
        "F": lm.ffw_width,
    }
    found: dict[str, Recipe] = {}
    number = 0
    for layer in range(lm.num_layers):
        if layer in config.gated_layers:
            i, theirs = config.gated_layers.index(layer), f"language_model.model.layers.{number}."
            found |= filled(GATED, f"cross_attention.{i}.", theirs, sizes)
            found[f"cross_attention.{i}.attention_gate"] = _gate(f"{theirs}cross_attn_attn_gate")
            found[f"cross_attention.{i}.ffw_gate"] = _gate(f"{theirs}cross_attn_mlp_gate")
            number += 1
        found |= filled(LAYER, f"language_model.layers.{layer}.", f"language_model.model.layers.{number}.", sizes)
        number += 1
    return found


def _gate(name: str) -> Recipe:
    return reshaped(name, (1,), ())
