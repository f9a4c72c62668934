"""Language models that OpenFlamingo was trained on, as published on their own: MPT-1B (MosaicGPT), MPT-7B, GPT-NeoX, LLaMA.

Names, shapes and settings are those of transformers, and for MPT-1B of its own files (Porian et al., mpt-1b-redpajama-200b).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from flamingo_reference.arrays import Array
from flamingo_reference.checkpoints.conversions import (
    Recipe,
    choice,
    named,
    plain_head_size,
    positive,
    rope_type,
    setting,
    with_bias,
)
from flamingo_reference.checkpoints.name_table import Table, filled, table
from flamingo_reference.config import AlibiPositions, ConfigError, LanguageModelConfig, RotaryPositions

_setting = functools.partial(setting, where="config.json of the language model")
_choice = functools.partial(choice, where="config.json of the language model")
_positive = functools.partial(positive, where="config.json of the language model")
_named = functools.partial(named, where="config.json of the language model")

IGNORED = (
    (r".*\.rotary_emb\.inv_freq", "frequencies of the rotary positions, which follow from the config"),
    (r".*\.attention\.(bias|masked_bias)", "GPT-NeoX's causal mask, which follows from the positions"),
    (r".*\.attn_bias", "MPT's ALiBi, which follows from the config"),
)
"""Tensors of the files that the model does not need: pattern of the whole name, and why."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How the files of one kind of language model are read.

    layers, embedding, head, norm: where its list of layers, embedding, output and last norm are. config: reads its config.json.
    layer: names of a layer's tensors; qk_norm: those of its norms of queries and keys; more: what no table can say, by what stands before
    our names and theirs.
    """

    layers: str
    embedding: str
    head: str
    norm: str
    config: Callable[[Mapping[str, Any]], LanguageModelConfig]
    layer: Table
    qk_norm: Table = ()
    more: Callable[[LanguageModelConfig, str, str], dict[str, Recipe]] | None = None


def family_of(raw: Mapping[str, Any]) -> Family:
    """The kind that a config.json names by its model_type. Raises ConfigError for one that is not supported."""
    found: Family = choice(raw, "model_type", FAMILIES, None, where="config.json of the language model")
    return found


def recipes(lm: LanguageModelConfig, family: Family) -> dict[str, Recipe]:
    """Our names, relative to `language_model.`, from theirs: all but embedding and head, whose rows depend on the tokens added."""
    sizes = {
        "W": lm.width,
        "I": lm.num_heads * lm.head_size,
        "K": lm.kv_heads * lm.head_size,
        "F": lm.ffw_width,
    }
    found: dict[str, Recipe] = {}
    for i in range(lm.num_layers):
        ours, theirs = f"layers.{i}.", f"{family.layers}.{i}."
        found |= filled(family.layer + (family.qk_norm if lm.qk_norm else ()), ours, theirs, sizes)
        found |= family.more(lm, ours, theirs) if family.more is not None else {}
    norm = with_bias("norm", family.norm, (lm.width,))
    return found | (norm if lm.norm_bias else {"norm.weight": norm["norm.weight"]})


def _head_size(width: int, heads: int) -> int:
    if heads < 1 or width < 1 or width % heads:
        raise ConfigError(f"config.json of the language model: {heads} heads do not divide a width of {width}.")
    return width // heads


def _rotary(raw: Mapping[str, Any], head_size: int, *, share: float, base: float) -> RotaryPositions:
    """share: of a head's channels, those that are turned."""
    rope = {} if raw.get("rope_parameters") is None else _setting(raw, "rope_parameters", dict)
    rope_type(rope, {"default": None}, where="config.json of the language model")
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
    if isinstance(rope := raw.get("rope_parameters"), Mapping):
        _choice(rope, "partial_rotary_factor", {1.0: None, None: None}, None)  # which transformers' LLaMA does not look at
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


LLAMA_LAYER = table("""
    attention_norm  input_layernorm             W
    q_proj          self_attn.q_proj            I,W
    k_proj          self_attn.k_proj            K,W
    v_proj          self_attn.v_proj            K,W
    out_proj        self_attn.o_proj            W,I
    ffw_norm        post_attention_layernorm    W
    ffw_swish       mlp.gate_proj               F,W
    ffw_up          mlp.up_proj                 F,W
    ffw_down        mlp.down_proj               W,F
""")


# GPT-NeoX


def _neox_config(raw: Mapping[str, Any]) -> LanguageModelConfig:
    width, heads = _setting(raw, "hidden_size", int), _setting(raw, "num_attention_heads", int)
    head_size = _head_size(width, heads)
    plain_head_size(raw, width, heads, where="config.json of the language model")
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


NEOX_LAYER = table("""
    attention_norm  input_layernorm             W      bias
    out_proj        attention.dense             W,I    bias
    ffw_norm        post_attention_layernorm    W      bias
    ffw_up          mlp.dense_h_to_4h           F,W    bias
    ffw_down        mlp.dense_4h_to_h           W,F    bias
""")


def _neox_queries_keys_values(lm: LanguageModelConfig, ours: str, theirs: str) -> dict[str, Recipe]:
    source, width = f"{theirs}attention.query_key_value", lm.width
    found: dict[str, Recipe] = {}
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        make = functools.partial(_of_each_head, part=part, num_heads=lm.num_heads)
        found[f"{ours}{name}.weight"] = Recipe({f"{source}.weight": (3 * width, width)}, make)
        found[f"{ours}{name}.bias"] = Recipe({f"{source}.bias": (3 * width,)}, make)
    return found


def _of_each_head(sources: Sequence[Array], *, part: int, num_heads: int) -> Array:
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
    # Of later versions of MosaicML's code, in which the tensors have the same names.
    for name, plain in (("rope", False), ("sliding_window_size", -1), ("attn_logit_softcapping", None)):
        _choice(attention, name, {plain: None, None: None}, plain)
    _choice(raw, "norm_eps", {1e-5: None}, 1e-5)
    _choice(raw, "final_logit_softcapping", {None: None}, None)
    for settings, name in ((attention, "clip_qkv"), (attention, "softmax_scale"), (raw, "logit_scale")):
        _choice(settings, name, {None: None}, None)
    width, heads, layers = (
        _setting(raw, _named(raw, names), int)
        for names in (("d_model", "hidden_size"), ("n_heads", "num_attention_heads"), ("n_layers", "num_hidden_layers"))
    )
    ratio = _setting(raw, _named(raw, ("mlp_ratio", "expansion_ratio")), int, 4)
    return LanguageModelConfig(
        num_layers=layers,
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
        tied_head=_setting(raw, "tie_word_embeddings", bool, True),
    )


_MPT_ATTENTION = """
    q_proj          attn.Wqkv        I,W    part 1 of 3
    k_proj          attn.Wqkv        I,W    part 2 of 3
    v_proj          attn.Wqkv        I,W    part 3 of 3
    out_proj        attn.out_proj    W,I
"""
MPT_1B_LAYER = table(
    _MPT_ATTENTION
    + """
    attention_norm  ln_1             W
    ffw_norm        ln_2             W
    ffw_up          mlp.mlp_up       F,W
    ffw_down        mlp.mlp_down     W,F
"""
)
MPT_7B_LAYER = table(
    _MPT_ATTENTION
    + """
    attention_norm  norm_1           W
    ffw_norm        norm_2           W
    ffw_up          ffn.up_proj      F,W
    ffw_down        ffn.down_proj    W,F
"""
)
MPT_QK_NORM = table("""
    q_norm          attn.q_ln        I
    k_norm          attn.k_ln        I
""")


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        layers="model.layers", embedding="model.embed_tokens", head="lm_head", norm="model.norm", config=_llama_config,
        layer=LLAMA_LAYER,
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers", embedding="gpt_neox.embed_in", head="embed_out", norm="gpt_neox.final_layer_norm",
        config=_neox_config, layer=NEOX_LAYER, more=_neox_queries_keys_values,
    ),
    "mosaic_gpt": Family(
        layers="transformer.blocks", embedding="transformer.wte", head="lm_head", norm="transformer.ln_f",
        config=functools.partial(_mpt_config, rounded_slopes=False), layer=MPT_1B_LAYER, qk_norm=MPT_QK_NORM,
    ),
    "mpt": Family(
        layers="transformer.blocks", embedding="transformer.wte", head="lm_head", norm="transformer.norm_f", config=_mpt_config,
        layer=MPT_7B_LAYER, qk_norm=MPT_QK_NORM,
    ),
}  # fmt: skip
"""model_type of a config.json -> how its files are read."""
