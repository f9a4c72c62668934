"""A checkpoint of any known family, as our model: its configuration, and each tensor read when it is wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flamingo_reference.checkpoints.accounting import account
from flamingo_reference.checkpoints.conversions import renamed
from flamingo_reference.checkpoints.converted import (
    ComponentFiles,
    Components,
    Conversion,
    Converted,
    ConvertedReader,
    JoinedReader,
    TwinReader,
    UntiedReader,
    source_shapes,
)
from flamingo_reference.checkpoints.families.known import FAMILIES, Component, Family
from flamingo_reference.checkpoints.families.recognition import Recognised, recognise
from flamingo_reference.checkpoints.files.tensors import CheckpointError, TensorReader
from flamingo_reference.checkpoints.files.tokenizer_file import NAMES as TOKENIZERS
from flamingo_reference.checkpoints.files.tokenizer_file import added_ids, open_tokenizer
from flamingo_reference.checkpoints.generation import GENERATION_CONFIG, Generation, read_generation
from flamingo_reference.checkpoints.lora import CONFIG as ADAPTER_CONFIG
from flamingo_reference.checkpoints.lora import LoraReader
from flamingo_reference.config import ConfigError, ModelConfig
from flamingo_reference.input_format import InputFormat
from flamingo_reference.names import expected_tensors

TEXT_TOKENIZER = "tokenizer.json"
TOWER_TOKENIZER = "tokenizer/text_tower.json"
"""Of a text tower in our own format whose vocabulary is not the language model's."""
OPTIONS: Mapping[Component, str] = {"language_model": "--lm", "vision_encoder": "--vision"}


class CheckpointFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model lies: its checkpoint, the components that some families leave to other files, LoRA adapters to merge, its tokenizer where
    that is not beside one of them."""

    path: Path
    language_model: Path | None = None
    vision_encoder: Path | None = None
    adapters: tuple[Path, ...] = ()
    tokenizer: Path | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint whose every tensor is accounted for.

    reader: our tensors. ignored: tensors of the files that are not needed, each with the reason. files: all files that the numbers are read
    from. tokenizer: a tokenizer.json or tokenizer.model, golden: a folder of golden values, None where there is none.
    settings: config.json as published. published: the files' own tensors, adapters merged in; recipes: how ours are made of them, None where
    names are ours already. absent: files that an index names and that are not there. generation: what generation_config.json says; notes:
    what a user of the model should know.
    """

    family: Family
    evidence: tuple[str, ...]
    config: ModelConfig
    reader: TensorReader
    inputs: InputFormat
    ignored: Mapping[str, str]
    files: tuple[Path, ...]
    tokenizer: Path | None
    golden: Path | None
    settings: Mapping[str, Any]
    published: TensorReader
    recipes: Mapping[str, Conversion] | None
    absent: tuple[Path, ...] = ()
    generation: Generation = Generation()
    notes: tuple[str, ...] = ()
    text_tokenizer: Path | None = None
    """tokenizer.json of the text tower, where there is one and it lies beside the tower's tensors."""


def load(files: CheckpointFiles, families: Sequence[Family] = FAMILIES, *, may_be_absent: bool = False) -> Checkpoint:
    """A checkpoint as our model, no number read yet. may_be_absent: shards that an index names need not be there, for a plan say; of their
    tensors, only names are checked, and reading one raises CheckpointError.

    Raises CheckpointError if files are missing, damaged, of an unknown family, of the wrong component, or do not fit each other: every tensor
    that is missing, unknown, misshapen, held twice or no float is named.
    """
    model = recognise(files.path, families, may_be_absent=may_be_absent)
    given: dict[Component, Path | None] = {"language_model": files.language_model, "vision_encoder": files.vision_encoder}
    _check_components(model, given)
    if model.family.convert is None:
        raise CheckpointError(
            f"{files.path} is {model.family.title} ({model.evidence[0]}), which this version cannot build yet."
        )
    recognised: dict[Component, Recognised] = {"model": model}
    for component, path in given.items():
        if path is not None:
            recognised[component] = _component(path, component, families, may_be_absent)
    tokenizer = find_tokenizer(files)
    components = Components(
        **{
            component: ComponentFiles(
                path=found.path,
                family=found.family.name,
                settings=found.settings,
                reader=found.reader,
                absent=tuple(found.reader.absent),
            )
            for component, found in recognised.items()
        },
        token_ids=added_ids(open_tokenizer(tokenizer, model.family.inputs.tags.added)) if tokenizer is not None else {},
    )
    try:
        converted = model.family.convert(components)
        converted.config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{files.path}: {error}") from error
    where = ", ".join(str(found.path) for found in recognised.values())
    absent = {name: path for found in recognised.values() for name, path in found.reader.absent.items()}
    base = TwinReader(_joined(recognised, where), _unlike(converted.twins, recognised))
    converted, published, adapters = _adapted(converted, base, files.adapters, model.family)
    reader, ignored = _accounted(converted, published, where, absent)
    if converted.misfit:
        raise CheckpointError(converted.misfit)
    config, generation = _with_generation(files, converted.config)
    used = [path for adapter in adapters for path in adapter.files]
    golden = files.path / "golden"
    return Checkpoint(
        family=model.family,
        evidence=model.evidence,
        config=config,
        reader=reader,
        inputs=converted.inputs,
        ignored=ignored,
        files=tuple(sorted({*used, *(path for found in recognised.values() for path in found.reader.files)})),
        tokenizer=tokenizer,
        golden=golden if golden.is_dir() else None,
        settings=model.settings,
        published=published,
        recipes=converted.recipes,
        absent=tuple(sorted(set(absent.values()))),
        generation=generation,
        notes=(*converted.notes, *(note for adapter in adapters for note in adapter.notes), *_not_merged(files)),
        text_tokenizer=_text_tokenizer(files, config, tokenizer),
    )


def _text_tokenizer(files: CheckpointFiles, config: ModelConfig, tokenizer: Path | None) -> Path | None:
    """The text tower's tokenizer: beside CLIP's file, in our own format beside the model's (or the same, for the same vocabulary)."""
    if config.contrastive is None or config.contrastive.text is None:
        return None
    if files.vision_encoder is not None:
        folder = files.vision_encoder if files.vision_encoder.is_dir() else files.vision_encoder.parent
        beside = folder / TEXT_TOKENIZER
    else:
        beside = files.path / TOWER_TOKENIZER
        if not beside.is_file() and config.contrastive.text.vocab_size == config.language_model.vocab_size:
            return tokenizer
    return beside if beside.is_file() else None


def find_tokenizer(files: CheckpointFiles) -> Path | None:
    """The tokenizer given, or the one beside the checkpoint, or beside its language model."""
    if files.tokenizer is not None:
        if not files.tokenizer.exists():
            raise CheckpointError(f"{files.tokenizer} does not exist. Give a tokenizer.json, or the folder that holds it.")
        if files.tokenizer.is_file():
            return files.tokenizer
    places = [files.tokenizer] if files.tokenizer is not None else [files.path, files.language_model]
    for place in places:
        if place is None:
            continue
        folder = place if place.is_dir() else place.parent
        for name in TOKENIZERS:
            if (folder / name).is_file():
                return folder / name
    if files.tokenizer is not None:
        raise CheckpointError(f"{files.tokenizer} has none of {', '.join(TOKENIZERS)}.")
    return None


def _check_components(model: Recognised, given: Mapping[Component, Path | None]) -> None:
    """Raises CheckpointError if a component is missing, or given and not wanted."""
    family = model.family
    if family.advice:
        raise CheckpointError(f"{model.path} is {family.title} ({model.evidence[0]}). {family.advice}")
    if family.component != "model":
        raise CheckpointError(
            f"{model.path} is {family.title} ({model.evidence[0]}), a component of a model. Give the model's own checkpoint, and this one "
            f"with it: --checkpoint MODEL {OPTIONS[family.component]} {model.path}"
        )
    missing = [component for component in family.needs if given[component] is None]
    if missing:
        names = " and ".join(component.replace("_", " ") for component in missing)
        options = " ".join(f"{OPTIONS[component]} FOLDER" for component in missing)
        raise CheckpointError(f"{model.path} is {family.title}, which leaves its {names} to other files. Add {options}.")
    extra = [component for component, path in given.items() if path is not None and component not in family.needs]
    if extra:
        names = " and ".join(component.replace("_", " ") for component in extra)
        raise CheckpointError(
            f"{model.path} is {family.title}, which holds its {names} itself. Leave out {', '.join(OPTIONS[p] for p in extra)}."
        )


def _component(path: Path, component: Component, families: Sequence[Family], may_be_absent: bool) -> Recognised:
    found = recognise(path, families, may_be_absent=may_be_absent)
    if found.family.component != component:
        raise CheckpointError(f"{OPTIONS[component]} {path} is {found.family.title}, expected a {component.replace('_', ' ')}.")
    return found


def _unlike(twins: Mapping[str, str], components: Mapping[Component, Recognised]) -> dict[str, str]:
    """Second names whose numbers must be compared: not those that stand for the same bytes of a file, nor those of files that are absent."""
    readers = [found.reader for found in components.values()]
    absent = {name for reader in readers for name in reader.absent}
    return {
        other: kept
        for other, kept in twins.items()
        if not ({other, kept} & absent or any(reader.same_place(other, kept) for reader in readers))
    }


def _adapted(
    converted: Converted, base: TensorReader, folders: Sequence[Path], family: Family
) -> tuple[Converted, TensorReader, list[LoraReader]]:
    """The tensors of all components with each adapter merged in, and the adapters.

    An output that is the embedding becomes a matrix of its own where an adapter changes one of the two: in training the other stayed as it
    was. Raises CheckpointError if an adapter cannot be merged.
    """
    heads = {head: embedding for head, embedding in converted.tied.items() if embedding in base.names()}
    whole = {*heads, *heads.values(), *_vocabulary(converted)}
    adapters: list[LoraReader] = []

    def merged(start: TensorReader) -> TensorReader:
        adapters.clear()
        for folder in folders:
            adapters.append(LoraReader(start, folder, family.plain_name, vocabulary=whole, second_names=converted.twins))
            start = adapters[-1]
        return start

    untied = merged(UntiedReader(base, heads))
    changed = {name for adapter in adapters for name in adapter.changed}
    if not changed & {*heads, *heads.values()}:
        return converted, merged(base), adapters
    both = [str(folder) for folder, adapter in zip(folders, adapters, strict=True) if adapter.keeps_tied]
    if both:
        raise CheckpointError(
            f"{', '.join(both)}: ensure_weight_tying is set, so embedding and output were trained as one. Merge it with PEFT "
            "(merge_and_unload) and build from the result."
        )
    lm = msgspec.structs.replace(converted.config.language_model, tied_head=False)
    config = msgspec.structs.replace(converted.config, language_model=lm)
    recipes = converted.recipes
    if recipes is not None:
        of_head = {embedding: head for head, embedding in heads.items()}
        embedding = {"language_model.head.weight": recipes["language_model.embedding.weight"]}
        recipes = {**recipes, **renamed(embedding, lambda name: of_head.get(name, name))}
    note = "an adapter changes one of embedding and output, which were one matrix: each is a matrix of its own now, as it was in training"
    converted = msgspec.structs.replace(
        converted, config=config, expected=expected_tensors(config), recipes=recipes, notes=(*converted.notes, note)
    )
    return converted, untied, adapters


def _not_merged(files: CheckpointFiles) -> list[str]:
    """Says of each folder that an adapter lies in it beside the weights, as transformers would load with them."""
    folders = [folder for folder in (files.path, files.language_model) if folder is not None]
    given = {folder.resolve() for folder in files.adapters}
    return [
        f"{folder} holds an adapter beside the weights ({ADAPTER_CONFIG}), which is not merged; --lora {folder} merges it"
        for folder in folders
        if (folder / ADAPTER_CONFIG).is_file() and folder.resolve() not in given
    ]


def _vocabulary(converted: Converted) -> set[str]:
    """Published names of embedding and output, of which PEFT saves whole copies."""
    ours = ("language_model.embedding.weight", "language_model.head.weight")
    if converted.recipes is None:
        return set(ours)
    return {source for name in ours if name in converted.recipes for source in converted.recipes[name].sources}


def _with_generation(files: CheckpointFiles, config: ModelConfig) -> tuple[ModelConfig, Generation]:
    """The config with the tokens that generation_config.json ends texts with and bans: of the model, and of a language model that lies in a
    folder of its own, which `generate` of OpenFlamingo goes by but for what ends a text."""
    whole = Generation()
    for folder, of_part in ((files.path, False), (files.language_model, True)):
        if folder is None:
            continue
        tokens = config.tokens
        found = read_generation(folder, tokens, config.language_model.vocab_size, of_part=of_part)
        tokens = msgspec.structs.replace(tokens, ends=(*tokens.ends, *found.ends), banned=(*tokens.banned, *found.banned))
        config = msgspec.structs.replace(config, tokens=tokens)
        try:
            config.validate()
        except ConfigError as error:
            raise CheckpointError(f"{folder / GENERATION_CONFIG}: {error}") from error
        whole = Generation(
            ends=(*whole.ends, *found.ends),
            banned=(*whole.banned, *found.banned),
            not_applied={**found.not_applied, **whole.not_applied},
        )
    return config, whole


def _joined(components: Mapping[Component, Recognised], where: str) -> TensorReader:
    """All components' tensors by their published names. Raises CheckpointError naming those that two components hold."""
    owners: dict[str, list[str]] = {}
    for component, found in components.items():
        for name in found.reader.names():
            owners.setdefault(name, []).append(component.replace("_", " "))
    twice = [f"{name} (in {', '.join(places)})" for name, places in owners.items() if len(places) > 1]
    if twice:
        raise CheckpointError(
            f"{where}: tensors held by more than one component: {'; '.join(twice)}. Remove those that do not belong."
        )
    return JoinedReader([found.reader for found in components.values()])


def _accounted(
    converted: Converted, joined: TensorReader, where: str, absent: Collection[str]
) -> tuple[TensorReader, dict[str, str]]:
    """The reader of our tensors, and what is left out. Raises CheckpointError as `account` does."""
    name = converted.config.name
    if converted.recipes is None:
        return joined, account(converted.expected, joined, where=where, model=name, ignored=converted.ignored, absent=absent)
    ignored = account(
        source_shapes(converted.recipes), joined, where=where, model=name, ignored=converted.ignored, absent=absent
    )
    unmade = sorted(set(converted.expected) ^ set(converted.recipes))
    if unmade:
        raise AssertionError(f"tensors without a recipe, or the other way round: {', '.join(unmade)}")
    return ConvertedReader(joined, converted.expected, converted.recipes), ignored
