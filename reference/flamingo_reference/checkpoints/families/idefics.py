"""IDEFICS v1 (HuggingFaceM4/idefics-9b, -80b, -instruct) as published: LLaMA, CLIP ViT-H/14, a resampler with LayerNorm on q and k.

Source: Laurençon et al. 2023 (OBELICS, arXiv 2306.16527); names, shapes and settings are those of transformers' `IdeficsForVisionText2Text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flamingo_reference.checkpoints.conversions import (
    Recipe,
    as_is,
    choice,
    joined,
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
    ModelConfig,
    ResamplerConfig,
    RotaryPositions,
    TokenIds,
    ViTConfig,
)

IGNORED = (
    (r"model\.vision_model\.post_layernorm\.(weight|bias)", "norm of CLIP's pooled output, which the model does not use"),
    (r"model\.vision_model\.embeddings\.position_ids", "the numbers 0, 1, ..., which need no tensor"),
    (r".*\.rotary_emb\.inv_freq", "frequencies of the rotary positions, which follow from the config"),
)
"""Tensors of the files that the model does not need: pattern of the whole name, and why."""
TIED = {
    "lm_head.weight": "model.embed_tokens.weight",
    "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
}
"""Where the output is the embedding: names of the output's tensors, and the embedding's."""


def config_from(
    raw: Mapping[str, Any],
    *,
    name: str = "idefics",
    image: int | None = None,
    eoc: int | None = None,
    around_image: int | None = None,
    reset: int | None = None,
) -> ModelConfig:
    """The model that a published config.json describes.

    image, eoc, around_image, reset: ids of `<image>`, of the token that ends an answer, of the tag around images and of the token after which
    no image is seen, from the tokenizer. Without them, those of the published models: the second additional token, the end of a text, the first
    additional token, the end of a text. Neither `<image>` nor the tag around it is ever generated. Raises ConfigError naming what is missing or
    not supported.
    """
    width, heads = setting(raw, "hidden_size", int, 4096), setting(raw, "num_attention_heads", int, 32)
    vocab, more = setting(raw, "vocab_size", int, 32000), setting(raw, "additional_vocab_size", int, 0)
    every, layers = setting(raw, "cross_layer_interval", int, 1), setting(raw, "num_hidden_layers", int, 32)
    if min(width, heads, every, layers) < 1 or width % heads or layers % every:
        raise ConfigError(
            f"config.json: hidden_size {width} must be a multiple of num_attention_heads {heads}, and num_hidden_layers {layers} "
            f"one of cross_layer_interval {every}."
        )
    plain_head_size(raw, width, heads)
    if more < 0:
        raise ConfigError(f"config.json: additional_vocab_size is {more}, expected at least 0.")
    if not setting(raw, "use_resampler", bool, False):
        raise ConfigError(
            "config.json: use_resampler is false; models whose text attends to image features directly are not supported."
        )
    choice(raw, "hidden_act", {"silu": "swiglu"}, "silu")
    eps, head_size = setting(raw, "rms_norm_eps", float, 1e-6), width // heads
    ends = token_ids(raw, "eos_token_id", 2)
    end = ends[0]
    eoc = end if eoc is None else eoc
    raw = _nested(raw)
    vision = _vision(setting(raw, "vision_config", dict, {}))
    image, around = vocab + 1 if image is None else image, vocab if around_image is None else around_image
    return ModelConfig(
        name=name,
        vision=vision,
        resampler=_resampler(setting(raw, "perceiver_config", dict, {}), vision),
        cross_attention=CrossAttentionConfig(
            every=every,
            num_heads=heads,
            head_size=head_size,
            ffw_width=setting(raw, "intermediate_size", int, 11008),
            norm="rms_norm",
            norm_eps=eps,
            qk_norm=setting(raw, "qk_layer_norms", bool, False),
            feed_forward="swiglu",
            gate=choice(raw, "alpha_type", {"float": "scalar", "vector": "vector"}, "float"),
        ),
        language_model=LanguageModelConfig(
            num_layers=layers,
            width=width,
            num_heads=heads,
            head_size=head_size,
            ffw_width=setting(raw, "intermediate_size", int, 11008),
            vocab_size=vocab + more,
            max_positions=setting(raw, "max_position_embeddings", int, 2048),
            norm_eps=eps,
            positions=RotaryPositions(size=head_size, base=_rotary_base(raw)),
            feed_forward="swiglu",
            tied_head=setting(raw, "tie_word_embeddings", bool, False),
        ),
        tokens=TokenIds(
            pad=end if raw.get("pad_token_id", 0) is None else token_ids(raw, "pad_token_id", 0)[0],
            bos=token_ids(raw, "bos_token_id", 1)[0],
            eoc=eoc,
            image=image,
            reset=end if reset is None else reset,
            ends=tuple(dict.fromkeys(each for each in ends if each != eoc)) if len(ends) > 1 else (),
            banned=(around,) if around < vocab + more and around != image else (),
        ),
        pixel_mean=clip.PIXEL_MEAN,
        pixel_std=clip.PIXEL_STD,
    )


def recipes(config: ModelConfig, *, additional_vocab: int) -> dict[str, Recipe]:
    """Every tensor of ours, from those of the published files. additional_vocab: the config's additional_vocab_size."""
    assert isinstance(config.vision, ViTConfig)
    return {
        **clip.recipes(config.vision, "model.vision_model."),
        **_resampler_recipes(config),
        **_gated_recipes(config),
        **_language_model_recipes(config, additional_vocab),
    }


def _rotary_base(raw: Mapping[str, Any]) -> float:
    rope = setting(raw, "rope_parameters", dict, {}) if raw.get("rope_parameters") is not None else {}
    rope_type(rope, {"default": None}, where="config.json, rope_parameters")
    if raw.get("rope_scaling") is not None:
        raise ConfigError(f"config.json: rope_scaling is {raw['rope_scaling']!r:.80}, which is not supported; expected none.")
    return positive({**raw, **rope}, "rope_theta", 10000.0)


# The settings that the form of config.json before transformers took the model in had side by side with the language model's.
_FLAT_VISION = ("embed_dim", "image_size", "patch_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_FLAT_PERCEIVER = (
    "resampler_n_latents",
    "resampler_depth",
    "resampler_n_heads",
    "resampler_head_dim",
    "qk_layer_norms_perceiver",
)


def _nested(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The old flat config.json in today's form; today's as it is. Raises ConfigError if one of the old form lacks what no tensor tells."""
    if "vision_config" in raw or not any(name.startswith("vision_") for name in raw):
        return raw
    lacking = [name for name in (*(f"vision_{name}" for name in _FLAT_VISION), *_FLAT_PERCEIVER) if name not in raw]
    if lacking:
        raise ConfigError(
            f"config.json is of IDEFICS' old flat form (vision_... beside the language model's settings) and lacks {', '.join(lacking)}. "
            "Fetch today's, which has a vision_config and a perceiver_config."
        )
    vision = {name.removeprefix("vision_"): value for name, value in raw.items() if name.startswith("vision_")}
    return {**raw, "vision_config": vision, "perceiver_config": {name: raw[name] for name in _FLAT_PERCEIVER}}


def _vision(raw: Mapping[str, Any]) -> ViTConfig:
    where = "config.json, vision_config"
    width = setting(raw, named(raw, ("embed_dim", "hidden_size"), where=where), int, 768, where=where)
    activations = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
    return ViTConfig(
        image_size=setting(raw, "image_size", int, 224, where=where),
        patch_size=setting(raw, "patch_size", int, 14, where=where),
        width=width,
        num_layers=setting(raw, "num_hidden_layers", int, 32, where=where),
        num_heads=setting(raw, "num_attention_heads", int, 16, where=where),
        ffw_width=setting(raw, "intermediate_size", int, 5120, where=where),
        activation=choice(raw, "hidden_act", activations, "gelu", where=where),
        class_token=True,
        norm_eps=setting(raw, "layer_norm_eps", float, 1e-5, where=where),
    )


def _resampler(raw: Mapping[str, Any], vision: ViTConfig) -> ResamplerConfig:
    where = "config.json, perceiver_config"
    return ResamplerConfig(
        num_layers=setting(raw, "resampler_depth", int, 6, where=where),
        width=vision.width,
        num_heads=setting(raw, "resampler_n_heads", int, 16, where=where),
        head_size=setting(raw, "resampler_head_dim", int, 96, where=where),
        ffw_width=4 * vision.width,
        num_latents=setting(raw, "resampler_n_latents", int, 64, where=where),
        num_time_embeddings=0,
        activation="relu",
        input_proj=False,
        qk_norm=setting(raw, "qk_layer_norms_perceiver", bool, False, where=where),
    )


RESAMPLER = table("""
    latents      latents           R,W    exact
    norm         layer_norm        W      bias
""")
RESAMPLER_LAYER = table("""
    media_norm   0.context_layer_norm    W      bias
    latent_norm  0.latents_layer_norm    W      bias
    q_proj       0.q_proj                I,W
    k_proj       0.k_proj                I,W
    v_proj       0.v_proj                I,W
    out_proj     0.output_proj           W,I
    ffw_norm     1.ln                    W      bias
    ffw_up       1.fc                    F,W
    ffw_down     1.c_proj                W,F
""")
RESAMPLER_QK_NORM = table("""
    q_norm       0.q_layer_norm          D      bias
    k_norm       0.k_layer_norm          D      bias
""")
GATED = table("""
    norm         input_layernorm             W
    q_proj       cross_attn.q_proj           I,W
    k_proj       cross_attn.k_proj           I,M
    v_proj       cross_attn.v_proj           I,M
    out_proj     cross_attn.o_proj           W,I
    ffw_norm     post_attention_layernorm    W
    ffw_swish    mlp.gate_proj               F,W
    ffw_up       mlp.up_proj                 F,W
    ffw_down     mlp.down_proj               W,F
""")
GATED_QK_NORM = table("""
    q_norm       cross_attn.q_layer_norm     D
    k_norm       cross_attn.k_layer_norm     D
""")
LAYER = table("""
    attention_norm  input_layernorm             W
    q_proj          self_attn.q_proj            I,W
    k_proj          self_attn.k_proj            I,W
    v_proj          self_attn.v_proj            I,W
    out_proj        self_attn.o_proj            W,I
    ffw_norm        post_attention_layernorm    W
    ffw_swish       mlp.gate_proj               F,W
    ffw_up          mlp.up_proj                 F,W
    ffw_down        mlp.down_proj               W,F
""")


def _resampler_recipes(config: ModelConfig) -> dict[str, Recipe]:
    resampler, theirs = config.resampler, "model.perceiver_resampler."
    sizes = {
        "R": resampler.num_latents,
        "W": resampler.width,
        "I": resampler.num_heads * resampler.head_size,
        "D": resampler.head_size,
        "F": resampler.ffw_width,
    }
    found = filled(RESAMPLER, "resampler.", theirs, sizes)
    lines = RESAMPLER_LAYER + (RESAMPLER_QK_NORM if resampler.qk_norm else ())
    for i in range(resampler.num_layers):
        found |= filled(lines, f"resampler.layers.{i}.", f"{theirs}blocks.{i}.", sizes)
    return found


def _gated_recipes(config: ModelConfig) -> dict[str, Recipe]:
    block, width = config.cross_attention, config.language_model.width
    sizes = {
        "W": width,
        "M": config.resampler.width,
        "I": block.num_heads * block.head_size,
        "D": block.head_size,
        "F": block.ffw_width,
    }
    gate, ours_gate = ((1,), ()) if block.gate == "scalar" else ((1, 1, width), (width,))
    found: dict[str, Recipe] = {}
    for i in range(len(config.gated_layers)):
        ours, theirs = f"cross_attention.{i}.", f"model.gated_cross_attn_layers.{i}."
        found |= filled(GATED + (GATED_QK_NORM if block.qk_norm else ()), ours, theirs, sizes)
        found[f"{ours}attention_gate"] = reshaped(f"{theirs}alpha_cross_attn", gate, ours_gate)
        found[f"{ours}ffw_gate"] = reshaped(f"{theirs}alpha_dense", gate, ours_gate)
    return found


def _language_model_recipes(config: ModelConfig, additional_vocab: int) -> dict[str, Recipe]:
    lm = config.language_model
    sizes = {"W": lm.width, "I": lm.num_heads * lm.head_size, "F": lm.ffw_width}
    first = (lm.vocab_size - additional_vocab, lm.width)

    def both(weight: str, more: str) -> Recipe:
        """Rows of the vocabulary, and of the tokens that were added to it."""
        return joined({weight: first, more: (additional_vocab, lm.width)}) if additional_vocab else as_is(weight, first)

    embedding, head = "model.embed_tokens", "lm_head"
    found = {"language_model.embedding.weight": both(f"{embedding}.weight", f"{embedding}.additional_embedding.weight")}
    for i in range(lm.num_layers):
        found |= filled(LAYER, f"language_model.layers.{i}.", f"model.layers.{i}.", sizes)
    found["language_model.norm.weight"] = as_is("model.norm.weight", (lm.width,))
    if not lm.tied_head:
        found["language_model.head.weight"] = both(f"{head}.weight", f"{head}.additional_fc.weight")
    return found
