"""How each family's files become a model: its configuration, names, ignored tensors and input format, from what its own module knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flamingo_reference.checkpoints.accounting import Ignored
from flamingo_reference.checkpoints.conversions import setting
from flamingo_reference.checkpoints.converted import Adopted, PartFiles, Parts
from flamingo_reference.checkpoints.families import clip, idefics, native, openflamingo
from flamingo_reference.checkpoints.files.tensors import CheckpointError, Shape
from flamingo_reference.config import TokenIds
from flamingo_reference.input_format import IDEFICS, IDEFICS_INSTRUCT, OPENFLAMINGO, with_bos
from flamingo_reference.names import expected_tensors

_LLAMA_BOS = "<s>"
_LLAMA_TAGS = (_LLAMA_BOS, "</s>")


def adopt_native(parts: Parts) -> Adopted:
    """Our own format: names are ours already."""
    config = native.read_config(parts.model.path / "config.json")
    return Adopted(config=config, expected=expected_tensors(config))


def adopt_idefics(parts: Parts) -> Adopted:
    """IDEFICS v1. One tuned on instructions is told by the token that ends its turns."""
    settings, ids = _settings(parts.model), parts.token_ids
    turn = ids.get(IDEFICS_INSTRUCT.tags.eoc)
    inputs = IDEFICS if turn is None else IDEFICS_INSTRUCT
    config = idefics.config_from(
        settings, image=ids.get(inputs.tags.image), eoc=turn, around_image=ids.get(inputs.tags.around_image or "")
    )
    config.validate()
    more = setting(settings, "additional_vocab_size", int, 0)
    first, last = config.language_model.vocab_size - more, config.language_model.vocab_size - 1
    misplaced = [
        f"{tag} is {ids[tag]}" for tag in inputs.tags.all if tag not in _LLAMA_TAGS and more and ids.get(tag, first) < first
    ]
    misfit = (
        f"the tokenizer is of another model than {parts.model.path}: {', '.join(misplaced)}, and tokens that were added have ids {first} to "
        f"{last} by config.json. Bring the tokenizer that the model was trained with."
    )
    return Adopted(
        config=config,
        expected=expected_tensors(config),
        recipes=idefics.recipes(config, additional_vocab=more),
        ignored=_rules(idefics.IGNORED),
        inputs=inputs,
        misfit=misfit if misplaced else "",
    )


def adopt_openflamingo(parts: Parts) -> Adopted:
    """OpenFlamingo v2, of its checkpoint.pt, language model and CLIP. Raises CheckpointError if there is no tokenizer: the ids of the tokens
    that were added stand nowhere else."""
    lm, vision, ids = parts.language_model, parts.vision_encoder, parts.token_ids
    assert lm is not None
    assert vision is not None
    eoc, image = ids.get(OPENFLAMINGO.tags.eoc), ids.get(OPENFLAMINGO.tags.image)
    if eoc is None or image is None:
        raise CheckpointError(
            f"no tokenizer is beside {parts.model.path} or {lm.path}, and the ids of <image> and <|endofchunk|> follow from it. "
            "Name the language model's: --tokenizer FILE"
        )
    lm_settings = _settings(lm)
    bos = setting(lm_settings, "bos_token_id", int, eoc) if lm_settings.get("bos_token_id") is not None else eoc
    pad = ids.get("<PAD>")
    files = openflamingo.Files(
        checkpoint={name: parts.model.reader.shape(name) for name in parts.model.reader.names()},
        language_model=_shapes(lm),
        vision=_shapes(vision),
        absent=frozenset(lm.absent),
        language_model_config=lm_settings,
    )
    config = openflamingo.config_from(
        files,
        tokens=TokenIds(pad=eoc if pad is None else pad, bos=bos, eoc=eoc, image=image),
        # OpenAI's own file has no config.json: what its tensors do not tell is as in every model that it published.
        vision=clip.config_from(vision.settings) if vision.settings else None,
    )
    # Training gave its embedding as many rows as there were tokens then, unless it left it as it was published.
    rows, size = config.language_model.vocab_size, 1 + max(ids.values())
    if rows not in (size, setting(lm_settings, "vocab_size", int)):
        raise CheckpointError(
            f"the tokenizer has {size} tokens, those that training added included, and the embedding in {parts.model.path} has {rows} rows. "
            "Bring the tokenizer of the language model that it was trained with: --tokenizer FILE"
        )
    config.validate()
    return Adopted(
        config=config,
        expected=expected_tensors(config),
        recipes=openflamingo.recipes(config, files),
        ignored=_rules(openflamingo.ignored(files)),
        inputs=with_bos(OPENFLAMINGO, _LLAMA_BOS) if lm.family == "llama" else OPENFLAMINGO,
    )


def _settings(part: PartFiles) -> Mapping[str, Any]:
    """The part's config.json. Raises CheckpointError if there is none: tensors do not tell how they are computed with."""
    if not part.settings:
        raise CheckpointError(
            f"{part.path} has no config.json, which this kind of model needs. Give the folder that holds both."
        )
    return part.settings


def _shapes(part: PartFiles) -> dict[str, Shape]:
    absent = frozenset(part.absent)
    return {name: part.reader.shape(name) for name in part.reader.names() if name not in absent}


def _rules(pairs: Iterable[tuple[str, str]]) -> tuple[Ignored, ...]:
    return tuple(Ignored(*pair) for pair in pairs)
