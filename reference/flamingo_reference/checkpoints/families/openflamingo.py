"""OpenFlamingo v1 and v2 (Awadalla et al. 2023, arXiv 2308.01390): its checkpoint.pt, beside a language model and a CLIP image encoder.
Otter (Li et al. 2023, arXiv 2305.03726) is the same model, all of it in one folder.

    checkpoint       perceiver, gated blocks, and those tensors of the language model and CLIP that were trained (embeddings, mostly)
    language_model   the rest of the language model, as published
    vision           the rest of CLIP, as published; its ln_post is left out, as it was in training

No two of the files have a tensor of the same name. Names in checkpoint.pt vary with how it was saved; `Files` finds them all (PLAIN).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.accounting import NearestName
from flamingo_reference.checkpoints.conversions import Recipe, as_is, padded, renamed, reshaped, rows
from flamingo_reference.checkpoints.converted import source_shapes
from flamingo_reference.checkpoints.families import clip, language_models
from flamingo_reference.checkpoints.families.language_models import Family
from flamingo_reference.checkpoints.families.openflamingo_files import Files
from flamingo_reference.checkpoints.name_table import filled, table
from flamingo_reference.config import (
    ConfigError,
    CrossAttentionConfig,
    LanguageModelConfig,
    ModelConfig,
    ResamplerConfig,
    TokenIds,
    ViTConfig,
)

HEAD_SIZE = 64
"""Of perceiver and gated blocks in every published model; the tensors do not tell."""
IGNORED = (*clip.IGNORED, *language_models.IGNORED)
"""Tensors of the files that the model never needs: pattern of the whole name, and why."""
ATTENDS = (
    "each token attends to the image last shown before it. Models trained by OpenFlamingo 0.0.x without use_media_placement_augmentation "
    "attend to the next image, which their files do not tell"
)
"""What a user of a model of this family should know."""


def config_from(
    files: Files,
    *,
    tokens: TokenIds,
    name: str = "openflamingo",
    vocab_size: int | None = None,
    vision: ViTConfig | None = None,
) -> ModelConfig:
    """The model that the files make together.

    tokens: from the tokenizer. vocab_size: its size, tokens added included; None takes that of the embedding in checkpoint.pt, or else the
    language model's. vision: None reads it off the file's shapes, which do not tell heads other than CLIP's 64. Tokens for which no file
    has a row of the output can never be generated (`added_without_rows`). Raises ConfigError naming what does not fit.
    """
    family, trained = files.family, files.trained()
    shapes = {plain: files.checkpoint[actual] for plain, actual in trained.items()}
    lm = family.config(files.language_model_config)
    vision = clip.config_from_shapes(files.vision) if vision is None else vision
    trained_embedding = f"lang_encoder.{family.embedding}.weight"
    embedding = _shape(shapes, trained_embedding) if trained_embedding in shapes else (lm.vocab_size, lm.width)
    lm = msgspec.structs.replace(lm, vocab_size=embedding[0] if vocab_size is None else vocab_size)
    unsaid = added_without_rows(lm, files)
    if unsaid:
        tokens = _without(tokens, unsaid, files.language_model_config)
    every, offset, first = _gated_layers(shapes, family, lm.num_layers)
    latents = _shape(shapes, "perceiver.latents")
    inner, media = (_shape(shapes, f"{first}.attn.to_q.weight")[0], _shape(shapes, f"{first}.attn.to_kv.weight")[1])
    for what, found, expected in (
        ("the perceiver's width", latents[1], vision.width),
        ("the width of media in the gated blocks", media, vision.width),
        ("the width of text in the gated blocks", _shape(shapes, f"{first}.attn.to_q.weight")[1], lm.width),
        ("the width of the embedding", embedding[1], lm.width),
    ):
        if found != expected:
            raise ConfigError(
                f"{what} in checkpoint.pt is {found}, the other files have {expected}. "
                "Give the language model and the vision encoder that it was trained with."
            )
    frames = _shape(shapes, "perceiver.frame_embs")[0] if "perceiver.frame_embs" in shapes else 0
    if "perceiver.media_time_embs" in shapes:
        raise ConfigError(
            "checkpoint.pt holds perceiver.media_time_embs, positions of media in a text, which are not supported."
        )
    return ModelConfig(
        name=name,
        vision=vision,
        resampler=ResamplerConfig(
            num_layers=_count(shapes, r"perceiver\.layers\.(\d+)\."),
            width=latents[1],
            num_heads=_heads("perceiver.layers.0.0.to_q.weight", _shape(shapes, "perceiver.layers.0.0.to_q.weight")[0]),
            head_size=HEAD_SIZE,
            ffw_width=_shape(shapes, "perceiver.layers.0.1.1.weight")[0],
            num_latents=latents[0],
            num_time_embeddings=frames,
            activation="gelu",
            input_proj=False,
        ),
        cross_attention=CrossAttentionConfig(
            every=every,
            offset=offset,
            num_heads=_heads(f"{first}.attn.to_q.weight", inner),
            head_size=HEAD_SIZE,
            ffw_width=_shape(shapes, f"{first}.ff.1.weight")[0],
            feed_forward="gelu",
            gate=_gate(shapes),
        ),
        language_model=lm,
        tokens=tokens,
        pixel_mean=clip.PIXEL_MEAN,
        pixel_std=clip.PIXEL_STD,
    )


def added_without_rows(lm: LanguageModelConfig, files: Files) -> range:
    """Ids of the tokens that training added and whose rows of the output were never saved.

    OpenFlamingo froze the output of a language model whose output is not its embedding (LLaMA), and saved what it trained: the embedding.
    """
    head = f"{files.family.head}.weight"
    if lm.tied_head or f"lang_encoder.{head}" in files.trained():
        return range(0)
    if f"lang_encoder.{files.family.embedding}.weight" not in files.trained():
        return range(0)
    rows_there = files.language_model.get(head, (files.family.config(files.language_model_config).vocab_size,))[0]
    return range(rows_there, lm.vocab_size)


def _without(tokens: TokenIds, unsaid: range, raw: Mapping[str, Any]) -> TokenIds:
    """Bans the tokens, and lets a text end where the language model's own texts do, since `<|endofchunk|>` cannot end it."""
    eos = raw.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    taken = {*tokens.stops, tokens.image}
    own = [end for end in ends if type(end) is int and 0 <= end < unsaid.start and end not in taken]
    banned = (*tokens.banned, *(token for token in unsaid if token not in tokens.never))
    return msgspec.structs.replace(tokens, banned=banned, ends=(*tokens.ends, *dict.fromkeys(own)))


def recipes(config: ModelConfig, files: Files) -> dict[str, Recipe]:
    """Every tensor of ours, from those of the three files. Raises ConfigError if no file holds the rows of all tokens."""
    assert isinstance(config.vision, ViTConfig)
    trained = files.trained()
    return {
        **_vision(config.vision, files),
        **renamed(_perceiver(config) | _gated(config, files.family), lambda name: trained.get(name, name)),
        **_language_model(config, files, trained),
    }


def ignored(config: ModelConfig, files: Files) -> tuple[tuple[str, str], ...]:
    """IGNORED, second names, and those of the published tensors that checkpoint.pt holds as they were trained."""
    assert isinstance(config.vision, ViTConfig)
    trained = files.trained()
    given_way = [name for name in (*files.language_model, *files.absent) if f"lang_encoder.{name}" in trained]
    if config.language_model.tied_head and f"lang_encoder.{files.family.embedding}.weight" in trained:
        given_way.append(f"{files.family.head}.weight")
    published = source_shapes(clip.recipes_for(config.vision, files.vision) if files.vision else {})
    given_way += published.keys() - source_shapes(_vision(config.vision, files)).keys()
    unneeded = [
        (re.escape(actual), reason)
        for name, actual in files.trained_vision().items()
        for pattern, reason in clip.IGNORED
        if re.fullmatch(pattern, name)
    ]
    return (
        *IGNORED,
        *unneeded,
        *((re.escape(other), f"second name of {kept}") for other, kept in files.twins().items()),
        *((re.escape(name), "trained further: checkpoint.pt has it") for name in given_way),
    )


def _vision(vision: ViTConfig, files: Files) -> dict[str, Recipe]:
    """CLIP from its own file, but for what checkpoint.pt holds of it: that was trained further."""
    published = clip.recipes_for(vision, files.vision) if files.vision else {}
    trained = files.trained_vision()
    if not trained:
        return published
    found = clip.recipes_for(vision, {name: files.checkpoint[actual] for name, actual in trained.items()})
    there = {ours: recipe for ours, recipe in found.items() if not published or all(name in trained for name in recipe.sources)}
    return published | renamed(there, lambda name: trained.get(name, name))


def own_size(files: Files, vision: ViTConfig) -> tuple[ViTConfig, bool]:
    """The image encoder at the size that checkpoint.pt trained it at: as many patches as it has positions; and whether that is another size
    than the published one's."""
    names = (
        "visual.positional_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "embeddings.position_embedding.weight",
    )
    trained = files.trained_vision()
    shape = next((files.checkpoint[trained[name]] for name in names if name in trained), None)
    if shape is None or len(shape) != 2 or shape[0] == vision.grid_size + 1:
        return vision, False
    side = math.isqrt(max(0, shape[0] - 1))
    if side < 1 or side * side != shape[0] - 1:
        raise ConfigError(
            f"checkpoint.pt holds {shape[0]} positions of the image encoder, which are not a square of patches and one more."
        )
    return msgspec.structs.replace(vision, image_size=side * vision.patch_size), True


def tied(config: ModelConfig, files: Files) -> dict[str, str]:
    """Where the output is the embedding: the name that a matrix of its own would have beside the embedding in use, and the embedding's."""
    if not config.language_model.tied_head:
        return {}
    family, trained = files.family, files.trained()
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if f"lang_encoder.{embedding}" not in trained:
        return {head: embedding}
    return {trained.get(f"lang_encoder.{head}", f"lang_encoder.{head}"): trained[f"lang_encoder.{embedding}"]}


def _shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes:
        near = NearestName(shapes).find(name)
        alike = f" (nearest: {near} {shapes[near]})" if near else ""
        raise ConfigError(
            f"checkpoint.pt holds no matrix {name}{alike}; it is not an OpenFlamingo checkpoint, or not all of one."
        )
    if len(shapes[name]) != 2 or min(shapes[name]) < 1:
        raise ConfigError(f"checkpoint.pt: {name} has shape {shapes[name]}, expected a matrix.")
    return shapes[name]


def _gate(shapes: Mapping[str, Shape]) -> Literal["scalar", "none"]:
    """Whether blocks have tanh gates. Where some have and others do not, what is missing is named when tensors are accounted for."""
    return "scalar" if any(name.endswith((".attn_gate", ".ff_gate")) for name in shapes) else "none"


def _heads(name: str, inner: int) -> int:
    if inner % HEAD_SIZE:
        raise ConfigError(f"checkpoint.pt: {name} has {inner} rows, expected a multiple of {HEAD_SIZE}, the size of a head.")
    return inner // HEAD_SIZE


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many numbers a name pattern takes; that none between them is missing shows when tensors are accounted for."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _gated_layers(shapes: Mapping[str, Shape], family: Family, num_layers: int) -> tuple[int, int, str]:
    """every, offset, and the name of the first block: the blocks are before layers i with (i + 1) % every == 0."""
    pattern = rf"lang_encoder\.{re.escape(family.layers)}\.(\d{{1,9}})\.gated_cross_attn_layer\."
    found = sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})
    if not found:
        raise ConfigError(
            f"checkpoint.pt holds no gated block: no tensor is called lang_encoder.{family.layers}.0.gated_cross_attn_layer.... "
            "Is the language model given the one that it was trained with?"
        )
    every = found[0] + 1
    wanted = range(found[0], num_layers, every)
    if len(wanted) != len(found) or found != list(wanted):
        raise ConfigError(
            f"checkpoint.pt has gated blocks before layers {found}, expected every {every}th of {num_layers}. "
            "Is the language model given the one that it was trained with?"
        )
    return every, found[0], f"lang_encoder.{family.layers}.{found[0]}.gated_cross_attn_layer"


# to_kv holds keys and then values; a feed-forward is a sequence of norm, matrix, GELU, matrix.
PERCEIVER = table("""
    latents           latents          R,W    exact
    norm              norm             W      bias
""")
PERCEIVER_FRAMES = table("time_embeddings   frame_embs   T,W   exact")
PERCEIVER_LAYER = table("""
    media_norm        0.norm_media     W      bias
    latent_norm       0.norm_latents   W      bias
    q_proj            0.to_q           I,W
    k_proj            0.to_kv          I,W    part 1 of 2
    v_proj            0.to_kv          I,W    part 2 of 2
    out_proj          0.to_out         W,I
    ffw_norm          1.0              W      bias
    ffw_up            1.1              F,W
    ffw_down          1.3              W,F
""")
GATED = table("""
    norm              attn.norm        W      bias
    q_proj            attn.to_q        I,W
    k_proj            attn.to_kv       I,M    part 1 of 2
    v_proj            attn.to_kv       I,M    part 2 of 2
    out_proj          attn.to_out      W,I
    ffw_norm          ff.0             W      bias
    ffw_up            ff.1             F,W
    ffw_down          ff.3             W,F
""")


def _perceiver(config: ModelConfig) -> dict[str, Recipe]:
    resampler, theirs = config.resampler, "perceiver."
    sizes = {
        "R": resampler.num_latents,
        "T": resampler.num_time_embeddings,
        "W": resampler.width,
        "I": resampler.num_heads * resampler.head_size,
        "F": resampler.ffw_width,
    }
    found = filled(PERCEIVER + (PERCEIVER_FRAMES if resampler.num_time_embeddings else ()), "resampler.", theirs, sizes)
    for i in range(resampler.num_layers):
        found |= filled(PERCEIVER_LAYER, f"resampler.layers.{i}.", f"{theirs}layers.{i}.", sizes)
    return found


def _gated(config: ModelConfig, family: Family) -> dict[str, Recipe]:
    block = config.cross_attention
    sizes = {
        "W": config.language_model.width,
        "M": config.resampler.width,
        "I": block.num_heads * block.head_size,
        "F": block.ffw_width,
    }
    found: dict[str, Recipe] = {}
    for i, layer in enumerate(config.gated_layers):
        ours, theirs = f"cross_attention.{i}.", f"lang_encoder.{family.layers}.{layer}.gated_cross_attn_layer."
        found |= filled(GATED, ours, theirs, sizes)
        if block.gate == "none":
            continue
        found[f"{ours}attention_gate"] = reshaped(f"{theirs}attn_gate", (1,), ())
        found[f"{ours}ffw_gate"] = reshaped(f"{theirs}ff_gate", (1,), ())
    return found


def _language_model(config: ModelConfig, files: Files, trained: Mapping[str, str]) -> dict[str, Recipe]:
    lm, family = config.language_model, files.family

    def place(name: str) -> str:
        """The trained tensor where there is one, else the published."""
        return trained.get(f"lang_encoder.{name}", name)

    found = renamed(language_models.recipes(lm, family), place)
    shapes = {**files.language_model, **files.checkpoint}
    vocabulary = {"embedding": family.embedding} if lm.tied_head else {"embedding": family.embedding, "head": family.head}
    for ours, theirs in vocabulary.items():
        source = place(f"{theirs}.weight")
        shape = shapes.get(source, (lm.vocab_size, lm.width))
        if len(shape) != 2:
            raise ConfigError(f"{source} has shape {shape}, expected {(lm.vocab_size, lm.width)}.")
        if shape[0] < lm.vocab_size and ours == "head" and len(added_without_rows(lm, files)):
            found["head.weight"] = padded(source, (shape[0], lm.width), lm.vocab_size)
            continue
        if shape[0] < lm.vocab_size:
            raise ConfigError(
                f"{source} has {shape[0]} rows for {lm.vocab_size} tokens; no file holds the rows of the tokens that were added. "
                "Bring the checkpoint with the embeddings that were trained."
            )
        make = functools.partial(rows, start=0, stop=lm.vocab_size) if shape[0] > lm.vocab_size else as_is
        found[f"{ours}.weight"] = make(source, shape)
    return {f"language_model.{name}": recipe for name, recipe in found.items()}
