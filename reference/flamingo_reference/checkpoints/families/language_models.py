"""Language models that OpenFlamingo was trained on, as published on their own: MPT-1B (MosaicGPT), MPT-7B, GPT-NeoX, LLaMA.

Names, shapes and settings are those of transformers, and for MPT-1B of its own files (Porian et al., mpt-1b-redpajama-200b).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from flamingo_reference.checkpoints.conversions import AnyArray, Recipe, as_is, choice, positive, rows, setting, with_bias
from flamingo_reference.config import AlibiPositions, ConfigError, LanguageModelConfig, RotaryPositions

_setting = functools.partial(setting, where="config.json of the language model")
_choice = functools.partial(choice, where="config.json of the language model")
_positive = functools.partial(positive, where="config.json of the language model")

IGNORED = (
    (r".*\.rotary_emb\.inv_freq", "frequencies of the rotary positions, which follow from the config"),
    (r".*\.attention\.(bias|masked_bias)", "GPT-NeoX's causal mask, which follows from the positions"),
    (r".*\.attn_bias", "MPT's ALiBi, which follows from the config"),
)
"""Tensors of the files that the model does not need: pattern of the whole name, and why."""


class Family(msgspec.Struct, frozen=True):
    """How the files of one kind of language model are read. `{i}` in layers stands for the layer."""

    layers: str
    embedding: str
    head: str
    config: Callable[[Mapping[str, Any]], LanguageModelConfig]
    layer: Callable[[LanguageModelConfig, str], dict[str, Recipe]]
    """Recipes of one layer, our names and theirs relative to it; the prefix of theirs is given."""
    norm: Callable[[LanguageModelConfig], dict[str, Recipe]]


def family_of(raw: Mapping[str, Any]) -> Family:
    """The kind that a config.json names by its model_type. Raises ConfigError for one that is not supported."""
    found: Family = choice(raw, "model_type", FAMILIES, None, where="config.json of the language model")
    return found


def recipes(lm: LanguageModelConfig, family: Family) -> dict[str, Recipe]:
    """Our names, relative to `language_model.`, from theirs: all but embedding and head, whose rows depend on the tokens added."""
    found: dict[str, Recipe] = {}
    for i in range(lm.num_layers):
        layer = family.layer(lm, f"{family.layers}.{i}")
        found |= {f"layers.{i}.{name}": recipe for name, recipe in layer.items()}
    return found | family.norm(lm)


def _head_size(width: int, heads: int) -> int:
    if heads < 1 or width < 1 or width % heads:
        raise ConfigError(f"config.json of the language model: {heads} heads do not divide a width of {width}.")
    return width // heads


def _rotary(raw: Mapping[str, Any], head_size: int, *, share: float, base: float) -> RotaryPositions:
    """share: of a head's channels, those that are turned."""
    rope = {} if raw.get("rope_parameters") is None else _setting(raw, "rope_parameters", dict)
    _choice(rope, "rope_type", {"default": None}, "default")
    if raw.get("rope_scaling") is not None:
        raise ConfigError(f"config.json of the language model: rope_scaling {raw['rope_scaling']!r:.80} is not supported.")
    share = _positive(rope, "partial_rotary_factor", share)
    if share > 1:
        raise ConfigError(f"config.json of the language model: {share} of a head's channels are rotated, expected 1 at most.")
    return RotaryPositions(size=int(head_size * share), base=_positive(rope, "rope_theta", base))


# LLaMA


def _llama_config(raw: Mapping[str, Any]) -> LanguageModelConfig:
    width, heads = _setting(raw, "hidden_size", int), _setting(raw, "num_attention_heads", int)
    head_size = _setting(raw, "head_dim", int) if raw.get("head_dim") is not None else _head_size(width, heads)
    for name in ("attention_bias", "mlp_bias"):
        _choice(raw, name, {False: None}, False)
    kv_heads = _setting(raw, "num_key_value_heads", int) if raw.get("num_key_value_heads") is not None else heads
    return LanguageModelConfig(
        num_layers=_setting(raw, "num_hidden_layers", int),
        width=width,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_size=head_size,
        ffw_width=_setting(raw, "intermediate_size", int),
        vocab_size=_setting(raw, "vocab_size", int),
        max_positions=_setting(raw, "max_position_embeddings", int, 2048),
        norm_eps=_setting(raw, "rms_norm_eps", float, 1e-6),
        positions=_rotary(raw, head_size, share=1.0, base=_positive(raw, "rope_theta", 10000.0)),
        feed_forward=_choice(raw, "hidden_act", {"silu": "swiglu"}, "silu"),
        tied_head=_setting(raw, "tie_word_embeddings", bool, False),
    )


def _llama_layer(lm: LanguageModelConfig, theirs: str) -> dict[str, Recipe]:
    inner, kv_inner = lm.num_heads * lm.head_size, lm.kv_heads * lm.head_size
    return {
        "attention_norm.weight": as_is(f"{theirs}.input_layernorm.weight", (lm.width,)),
        "q_proj.weight": as_is(f"{theirs}.self_attn.q_proj.weight", (inner, lm.width)),
        "k_proj.weight": as_is(f"{theirs}.self_attn.k_proj.weight", (kv_inner, lm.width)),
        "v_proj.weight": as_is(f"{theirs}.self_attn.v_proj.weight", (kv_inner, lm.width)),
        "out_proj.weight": as_is(f"{theirs}.self_attn.o_proj.weight", (lm.width, inner)),
        "ffw_norm.weight": as_is(f"{theirs}.post_attention_layernorm.weight", (lm.width,)),
        "ffw_swish.weight": as_is(f"{theirs}.mlp.gate_proj.weight", (lm.ffw_width, lm.width)),
        "ffw_up.weight": as_is(f"{theirs}.mlp.up_proj.weight", (lm.ffw_width, lm.width)),
        "ffw_down.weight": as_is(f"{theirs}.mlp.down_proj.weight", (lm.width, lm.ffw_width)),
    }


# GPT-NeoX


def _neox_config(raw: Mapping[str, Any]) -> LanguageModelConfig:
    width, heads = _setting(raw, "hidden_size", int), _setting(raw, "num_attention_heads", int)
    head_size = _head_size(width, heads)
    _choice(raw, "attention_bias", {True: None}, True)
    share, base = _positive(raw, "rotary_pct", 0.25), _positive(raw, "rotary_emb_base", 10000.0)
    return LanguageModelConfig(
        num_layers=_setting(raw, "num_hidden_layers", int),
        width=width,
        num_heads=heads,
        head_size=head_size,
        ffw_width=_setting(raw, "intermediate_size", int),
        vocab_size=_setting(raw, "vocab_size", int),
        max_positions=_setting(raw, "max_position_embeddings", int, 2048),
        norm_eps=_setting(raw, "layer_norm_eps", float, 1e-5),
        positions=_rotary(raw, head_size, share=share, base=base),
        norm="layer_norm",
        norm_bias=True,
        feed_forward=_choice(raw, "hidden_act", {"gelu": "gelu"}, "gelu"),
        bias=True,
        parallel=_setting(raw, "use_parallel_residual", bool, True),
        tied_head=_setting(raw, "tie_word_embeddings", bool, False),
    )


def _neox_layer(lm: LanguageModelConfig, theirs: str) -> dict[str, Recipe]:
    width = lm.width
    found = {
        **with_bias("attention_norm", f"{theirs}.input_layernorm", (width,)),
        **with_bias("ffw_norm", f"{theirs}.post_attention_layernorm", (width,)),
        **with_bias("out_proj", f"{theirs}.attention.dense", (width, width)),
        **with_bias("ffw_up", f"{theirs}.mlp.dense_h_to_4h", (lm.ffw_width, width)),
        **with_bias("ffw_down", f"{theirs}.mlp.dense_4h_to_h", (width, lm.ffw_width)),
    }
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        make = functools.partial(_of_each_head, part=part, num_heads=lm.num_heads)
        found[f"{name}.weight"] = Recipe({f"{theirs}.attention.query_key_value.weight": (3 * width, width)}, make)
        found[f"{name}.bias"] = Recipe({f"{theirs}.attention.query_key_value.bias": (3 * width,)}, make)
    return found


def _of_each_head(sources: Sequence[AnyArray], *, part: int, num_heads: int) -> AnyArray:
    """GPT-NeoX stores each head's query, key and value next to each other: one of the three, heads joined."""
    joined = sources[0]
    split = joined.reshape(num_heads, 3, -1, *joined.shape[1:])[:, part]
    return split.reshape(-1, *joined.shape[1:])


# MPT


def _mpt_config(raw: Mapping[str, Any], *, rounded_slopes: bool = True) -> LanguageModelConfig:
    """MPT-7B keeps the settings of its attention in attn_config, MPT-1B (MosaicGPT) beside the others, as attn_...

    rounded_slopes: see AlibiPositions.rounded. MosaicGPT has a slope for each of its heads, MPT those of the next power of two.
    """
    given = raw.get("attn_config")
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"config.json: attn_config is {given!r:.80}, expected an object. Fetch the file again.")
    attention = given or {
        name.removeprefix("attn_"): value for name, value in raw.items() if name.startswith(("attn_", "alibi"))
    } | {"softmax_scale": raw.get("softmax_scale")}
    _choice(attention, "alibi", {True: None}, True)
    for settings in (attention, raw):
        _choice(settings, "prefix_lm", {False: None}, False)
    _choice(raw, "no_bias", {True: None}, True)
    # RMSNorm has the same tensors.
    _choice(raw, "norm_type", {"low_precision_layernorm": None, "layernorm": None}, "layernorm")
    for settings, name in ((attention, "clip_qkv"), (attention, "softmax_scale"), (raw, "logit_scale")):
        _choice(settings, name, {None: None}, None)
    width, heads = _setting(raw, "d_model", int), _setting(raw, "n_heads", int)
    ratio = _setting(raw, "mlp_ratio" if "mlp_ratio" in raw else "expansion_ratio", int, 4)
    return LanguageModelConfig(
        num_layers=_setting(raw, "n_layers", int),
        width=width,
        num_heads=heads,
        head_size=_head_size(width, heads),
        ffw_width=ratio * width,
        vocab_size=_setting(raw, "vocab_size", int),
        max_positions=_setting(raw, "max_seq_len", int, 2048),
        norm_eps=_setting(raw, "layer_norm_epsilon", float, 1e-5),
        positions=AlibiPositions(max_bias=_positive(attention, "alibi_bias_max", 8.0), rounded=rounded_slopes),
        norm="layer_norm",
        qk_norm=_setting(attention, "qk_ln", bool, False),
        feed_forward="gelu",
    )


def _mpt_layer(lm: LanguageModelConfig, theirs: str, *, norms: tuple[str, str], up: str, down: str) -> dict[str, Recipe]:
    width = lm.width
    found = {
        "attention_norm.weight": as_is(f"{theirs}.{norms[0]}.weight", (width,)),
        "out_proj.weight": as_is(f"{theirs}.attn.out_proj.weight", (width, width)),
        "ffw_norm.weight": as_is(f"{theirs}.{norms[1]}.weight", (width,)),
        "ffw_up.weight": as_is(f"{theirs}.{up}.weight", (lm.ffw_width, width)),
        "ffw_down.weight": as_is(f"{theirs}.{down}.weight", (width, lm.ffw_width)),
    }
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        source = f"{theirs}.attn.Wqkv.weight"
        found[f"{name}.weight"] = rows(source, (3 * width, width), part * width, (part + 1) * width)
    if lm.qk_norm:
        found |= {f"{kind}_norm.weight": as_is(f"{theirs}.attn.{kind}_ln.weight", (width,)) for kind in "qk"}
    return found


def _norm(lm: LanguageModelConfig, *, name: str) -> dict[str, Recipe]:
    if lm.norm_bias:
        return with_bias("norm", name, (lm.width,))
    return {"norm.weight": as_is(f"{name}.weight", (lm.width,))}


_MPT_1B = functools.partial(_mpt_layer, norms=("ln_1", "ln_2"), up="mlp.mlp_up", down="mlp.mlp_down")
_MPT_7B = functools.partial(_mpt_layer, norms=("norm_1", "norm_2"), up="ffn.up_proj", down="ffn.down_proj")


def _named(name: str) -> Callable[[LanguageModelConfig], dict[str, Recipe]]:
    return functools.partial(_norm, name=name)


FAMILIES: Mapping[str, Family] = {
    "llama": Family("model.layers", "model.embed_tokens", "lm_head", _llama_config, _llama_layer, _named("model.norm")),
    "gpt_neox": Family(
        "gpt_neox.layers", "gpt_neox.embed_in", "embed_out", _neox_config, _neox_layer, _named("gpt_neox.final_layer_norm")
    ),
    "mosaic_gpt": Family(
        "transformer.blocks",
        "transformer.wte",
        "lm_head",
        functools.partial(_mpt_config, rounded_slopes=False),
        _MPT_1B,
        _named("transformer.ln_f"),
    ),
    "mpt": Family("transformer.blocks", "transformer.wte", "lm_head", _mpt_config, _MPT_7B, _named("transformer.norm_f")),
}
"""model_type of a config.json -> how its files are read."""
