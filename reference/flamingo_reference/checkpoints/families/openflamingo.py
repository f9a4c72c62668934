"""OpenFlamingo v1 and v2 (Awadalla et al. 2023, arXiv 2308.01390): its checkpoint.pt, beside a language model and a CLIP image encoder.
Otter (Li et al. 2023, arXiv 2305.03726) is the same model, all of it in one folder.

    checkpoint       perceiver, gated blocks, and those tensors of the language model and CLIP that were trained (embeddings, mostly)
    language_model   the rest of the language model, as published
    vision           the rest of CLIP, as published; its ln_post is left out, as it was in training

No two of the files have a tensor of the same name. Names in checkpoint.pt vary with how it was saved; `Files` finds them all (PLAIN).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from flamingo_reference.checkpoints.accounting import NearestName
from flamingo_reference.checkpoints.conversions import (
    Recipe,
    Shape,
    as_is,
    padded,
    renamed,
    reshaped,
    rows,
    with_bias,
)
from flamingo_reference.checkpoints.converted import source_shapes
from flamingo_reference.checkpoints.families import clip, language_models
from flamingo_reference.checkpoints.families.language_models import Family, family_of
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
PLAIN = (
    (r"\.decoder_layer\.", r"."),
    (r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", r"lang_encoder.LAYERS.\1."),
    (r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.", r"lang_encoder.LAYERS.\1.gated_cross_attn_layer."),
    (r"\.gated_cross_attn_layer\.feed_forward\.", r".gated_cross_attn_layer.ff."),
    (r"^(perceiver\.layers\.\d+)\.(norm_media|norm_latents|to_q|to_kv|to_out)\.", r"\1.0.\2."),
    (r"^(perceiver\.layers\.\d+)\.feed_forward\.", r"\1.1."),
)
"""What names become in the plainest way of saving, by regular expressions, one after the other: layers below `decoder_layer` (v1 and v2),
second names of layers and gated blocks (v1), Otter's lists of feed-forwards. LAYERS stands for the language model's list of layers."""
ATTENDS = (
    "each token attends to the image last shown before it. Models trained by OpenFlamingo 0.0.x without use_media_placement_augmentation "
    "attend to the next image, which their files do not tell"
)
"""What a user of a model of this family should know."""
_VISION = "vision_encoder."


def plain_name(name: str) -> str:
    """A tensor's name without what depends on how the model was put together: the `lang_encoder.` that OpenFlamingo puts the language model
    in, the `decoder_layer` that it puts each of its layers in; gated blocks as in a list of their own."""
    for pattern, plain in PLAIN[:1] + PLAIN[3:]:
        name = re.sub(pattern, plain, name)
    return re.sub(r"^.*\.(\d+)\.gated_cross_attn_layer\.", r"gated_cross_attn_layers.\1.", name.removeprefix("lang_encoder."))


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes of the tensors in each of the three files, and the language model's config.json. absent: names of the language model's tensors
    whose files are not there. Where one file holds all (Otter), the others have no tensors."""

    checkpoint: Mapping[str, Shape]
    language_model: Mapping[str, Shape]
    vision: Mapping[str, Shape]
    language_model_config: Mapping[str, Any]
    absent: frozenset[str] = frozenset()

    @property
    def family(self) -> Family:
        """How the language model is read."""
        return family_of(self.language_model_config)

    def trained(self) -> dict[str, str]:
        """Names of checkpoint.pt by the name they would have in the plainest way of saving.

        That is perceiver., lang_encoder.LAYERS.i.gated_cross_attn_layer. and lang_encoder.NAME for tensors of the language model.
        """
        return {plain: names[0] for plain, names in self._by_plain_name().items()}

    def twins(self) -> dict[str, str]:
        """Second names of checkpoint.pt's tensors, each with the name in use (`trained`)."""
        return {other: names[0] for names in self._by_plain_name().values() for other in names[1:]}

    def _by_plain_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.checkpoint:
            plain = name
            for pattern, replacement in PLAIN:
                plain = re.sub(pattern, replacement.replace("LAYERS", self.family.layers), plain)
            found.setdefault(plain, []).append(name)
        return found

    def trained_vision(self) -> dict[str, str]:
        """CLIP's tensors in checkpoint.pt by the names that they would have in CLIP's own file: OpenFlamingo keeps open_clip's `visual`,
        Otter transformers' CLIPVisionModel."""
        inner = {name.removeprefix(_VISION): name for name in self.checkpoint if name.startswith(_VISION)}
        if any(name.startswith(("visual.", "vision_model.", "embeddings.", "encoder.")) for name in inner):
            return inner
        return {f"visual.{name}": actual for name, actual in inner.items()}


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
    said = raw.get("eos_token_id")
    ends = said if isinstance(said, list) else [said]
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


def tied(config: ModelConfig, files: Files) -> dict[str, str]:
    """Where the output is the embedding: the name that a matrix of its own would have beside the embedding in use, and the embedding's."""
    if not config.language_model.tied_head:
        return {}
    family, trained = files.family, files.trained()
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if f"lang_encoder.{embedding}" not in trained:
        return {head: embedding}
    return {trained.get(f"lang_encoder.{head}", f"lang_encoder.{head}"): trained[f"lang_encoder.{embedding}"]}


def otter_text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """text_config of Otter's config.json, whose model_type is left out or that of an own class in some: `architectures` tells then."""
    named = raw.get("architectures")
    found = {"MPTForCausalLM": "mpt", "MosaicGPT": "mosaic_gpt", "LlamaForCausalLM": "llama"}
    by_class = [found[name] for name in named if isinstance(name, str) and name in found] if isinstance(named, list) else []
    return {**raw, "model_type": by_class[0]} if by_class else raw


def _shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes:
        near = NearestName(shapes).find(name)
        alike = f" (nearest: {near} {shapes[near]})" if near else ""
        raise ConfigError(f"checkpoint.pt holds no matrix {name}{alike}; it is no OpenFlamingo checkpoint, or not all of one.")
    if len(shapes[name]) != 2 or min(shapes[name]) < 1:
        raise ConfigError(f"checkpoint.pt: {name} has shape {shapes[name]}, expected a matrix.")
    return shapes[name]


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


def _attention(ours: str, theirs: str, inner: int, width: int, media: int) -> dict[str, Recipe]:
    """to_kv holds keys and then values."""
    return {
        f"{ours}q_proj.weight": as_is(f"{theirs}.to_q.weight", (inner, width)),
        f"{ours}k_proj.weight": rows(f"{theirs}.to_kv.weight", (2 * inner, media), 0, inner),
        f"{ours}v_proj.weight": rows(f"{theirs}.to_kv.weight", (2 * inner, media), inner, 2 * inner),
        f"{ours}out_proj.weight": as_is(f"{theirs}.to_out.weight", (width, inner)),
    }


def _feed_forward(ours: str, theirs: str, width: int, inner: int) -> dict[str, Recipe]:
    """A sequence of norm, matrix, GELU, matrix."""
    return {
        **with_bias(f"{ours}ffw_norm", f"{theirs}.0", (width,)),
        f"{ours}ffw_up.weight": as_is(f"{theirs}.1.weight", (inner, width)),
        f"{ours}ffw_down.weight": as_is(f"{theirs}.3.weight", (width, inner)),
    }


def _perceiver(config: ModelConfig) -> dict[str, Recipe]:
    resampler = config.resampler
    width, inner = resampler.width, resampler.num_heads * resampler.head_size
    found = {"latents": as_is("perceiver.latents", (resampler.num_latents, width))}
    if resampler.num_time_embeddings:
        found["time_embeddings"] = as_is("perceiver.frame_embs", (resampler.num_time_embeddings, width))
    for i in range(resampler.num_layers):
        ours, theirs = f"layers.{i}.", f"perceiver.layers.{i}"
        found |= with_bias(f"{ours}media_norm", f"{theirs}.0.norm_media", (width,))
        found |= with_bias(f"{ours}latent_norm", f"{theirs}.0.norm_latents", (width,))
        found |= _attention(ours, f"{theirs}.0", inner, width, width)
        found |= _feed_forward(ours, f"{theirs}.1", width, resampler.ffw_width)
    found |= with_bias("norm", "perceiver.norm", (width,))
    return {f"resampler.{name}": recipe for name, recipe in found.items()}


def _gated(config: ModelConfig, family: Family) -> dict[str, Recipe]:
    block, width, media = config.cross_attention, config.language_model.width, config.resampler.width
    found: dict[str, Recipe] = {}
    for i, layer in enumerate(config.gated_layers):
        ours, theirs = f"cross_attention.{i}.", f"lang_encoder.{family.layers}.{layer}.gated_cross_attn_layer"
        found |= with_bias(f"{ours}norm", f"{theirs}.attn.norm", (width,))
        found |= _attention(ours, f"{theirs}.attn", block.num_heads * block.head_size, width, media)
        found |= _feed_forward(ours, f"{theirs}.ff", width, block.ffw_width)
        found[f"{ours}attention_gate"] = reshaped(f"{theirs}.attn_gate", (1,), ())
        found[f"{ours}ffw_gate"] = reshaped(f"{theirs}.ff_gate", (1,), ())
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
