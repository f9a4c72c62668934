"""How each family's files become a model: its configuration, names, ignored tensors and input format, from what its own module knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.accounting import Ignored
from flamingo_reference.checkpoints.conversions import renamed, setting
from flamingo_reference.checkpoints.converted import ComponentFiles, Components, Converted
from flamingo_reference.checkpoints.families import (
    clip,
    clip_towers,
    idefics,
    llama_vision,
    native,
    openflamingo,
    openflamingo_files,
)
from flamingo_reference.checkpoints.families.preprocessor import BILINEAR, Images, read_images
from flamingo_reference.checkpoints.files.chat_template_files import read_chat_template
from flamingo_reference.checkpoints.files.folder import OPEN_CLIP_NAMES
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.config import TokenIds, ViTConfig
from flamingo_reference.input_format import (
    IDEFICS,
    IDEFICS_INSTRUCT,
    LLAMA_VISION,
    LLAMA_VISION_INSTRUCT,
    OPENFLAMINGO,
    OTTER,
    InputFormat,
    with_bos,
    with_template,
)
from flamingo_reference.names import expected_tensors

_LLAMA_BOS, _LLAMA_EOS = "<s>", "</s>"
_LLAMA_TAGS = (_LLAMA_BOS, _LLAMA_EOS)


def convert_native(components: Components) -> Converted:
    """Our own format: names are ours already."""
    config = native.read_config(components.model.path / "config.json")
    tied = {"language_model.head.weight": "language_model.embedding.weight"} if config.language_model.tied_head else {}
    return _with_twins(Converted(config=config, expected=expected_tensors(config), tied=tied), components.model, {})


def convert_idefics(components: Components) -> Converted:
    """IDEFICS v1. One tuned on instructions is recognised by the token that ends its turns."""
    settings, ids = _settings_of(components.model), components.token_ids
    turn = ids.get(IDEFICS_INSTRUCT.tags.eoc)
    inputs = IDEFICS if turn is None else IDEFICS_INSTRUCT
    config = idefics.config_from(
        settings,
        image=ids.get(inputs.tags.image),
        eoc=turn,
        around_image=ids.get(inputs.tags.around_image or ""),
        reset=ids.get(_LLAMA_EOS),
    )
    config.validate()
    images = read_images(components.model.path, config.vision.image_size, Images(mean=config.pixel_mean, std=config.pixel_std))
    config = msgspec.structs.replace(config, pixel_mean=images.mean, pixel_std=images.std)
    more = setting(settings, "additional_vocab_size", int, 0)
    first, last = config.language_model.vocab_size - more, config.language_model.vocab_size - 1
    misplaced = [
        f"{tag} is {ids[tag]}" for tag in inputs.tags.all if tag not in _LLAMA_TAGS and more and ids.get(tag, first) < first
    ]
    misfit = (
        f"the tokenizer is of another model than {components.model.path}: {', '.join(misplaced)}, and tokens that were added have ids "
        f"{first} to {last} by config.json. Bring the tokenizer that the model was trained with."
    )
    converted = Converted(
        config=config,
        expected=expected_tensors(config),
        recipes=idefics.recipes(config, additional_vocab=more),
        ignored=_rules(idefics.IGNORED),
        inputs=inputs,
        misfit=misfit if misplaced else "",
        tied=idefics.TIED if config.language_model.tied_head else {},
    )
    return _with_twins(converted, components.model, {})


def convert_llama_vision(components: Components) -> Converted:
    """Llama 3.2 Vision, by published names or those of transformers' live model.

    One tuned on instructions is recognised by its chat template, or by the token that ends a turn among those that end its texts.
    """
    settings, ids, folder = _settings_of(components.model), components.token_ids, components.model.path
    template = read_chat_template(folder) if folder.is_dir() else None
    config = llama_vision.config_from(settings)
    turn = ids.get(LLAMA_VISION_INSTRUCT.tags.eoc, llama_vision.TURN)
    instruct = template is not None or turn in config.tokens.stops
    if instruct and turn < config.language_model.vocab_size:
        config = llama_vision.config_from(settings, ends=(turn, *config.tokens.stops))
    config.validate()
    assert config.tiled is not None
    given = Images(mean=config.pixel_mean, std=config.pixel_std)
    half = (0.5, 0.5, 0.5)
    images = read_images(
        folder,
        config.vision.image_size,
        given,
        unsaid=Images(mean=half, std=half),
        resample=BILINEAR,
        tiles=config.tiled.max_tiles,
    )
    config = msgspec.structs.replace(config, pixel_mean=images.mean, pixel_std=images.std)
    inputs = LLAMA_VISION_INSTRUCT if instruct else LLAMA_VISION
    wrong = [
        f"{tag} is {ids[tag]}, config.json says {expected}"
        for tag, expected in ((inputs.tags.image, config.tokens.image), (inputs.tags.bos or "", config.tokens.bos))
        if ids.get(tag, expected) != expected
    ]
    recipes = llama_vision.recipes(config)
    if llama_vision.has_live_names(components.model.reader.names()):
        recipes = renamed(recipes, llama_vision.live_name)
    return Converted(
        config=config,
        expected=expected_tensors(config),
        recipes=recipes,
        ignored=_rules(llama_vision.IGNORED),
        inputs=inputs if template is None else with_template(inputs, template),
        misfit=f"the tokenizer is of another model than {folder}: {'; '.join(wrong)}. Bring the model's own." if wrong else "",
        notes=llama_vision.NOTES,
    )


def convert_openflamingo(components: Components) -> Converted:
    """OpenFlamingo, of its checkpoint.pt, language model and CLIP. Raises CheckpointError if there is no tokenizer: the ids of the tokens
    that were added stand nowhere else."""
    lm, vision = components.language_model, components.vision_encoder
    assert lm is not None
    assert vision is not None
    files = openflamingo_files.Files(
        checkpoint=_shapes(components.model),
        language_model=_shapes(lm),
        vision=_shapes(vision),
        absent=frozenset(lm.absent),
        language_model_config=_settings_of(lm),
    )
    open_clip = _open_clip_config(vision.path)
    encoder = clip.encoder_of(files.vision, vision.settings, open_clip, path=vision.path)
    inputs = with_bos(OPENFLAMINGO, _LLAMA_BOS) if lm.family == "llama" else OPENFLAMINGO
    converted = _openflamingo(components, files, encoder, inputs, where=f"{components.model.path} or {lm.path}")
    if files.trained_vision():  # what was trained further is no longer the text tower's counterpart
        return converted
    return _with_towers(
        converted, files.vision, clip_towers.towers_of(files.vision, vision.settings, open_clip, encoder.vision)
    )


def convert_otter(components: Components) -> Converted:
    """Otter, and OpenFlamingo as Otter's authors converted it: all components in one folder. Raises CheckpointError as
    `convert_openflamingo`."""
    raw = _settings_of(components.model)
    text = setting(raw, "text_config", dict)
    files = openflamingo_files.Files(
        checkpoint=_shapes(components.model),
        language_model={},
        vision={},
        language_model_config=openflamingo_files.otter_text_config(text),
    )
    encoder = clip.transformers_encoder(setting(raw, "vision_config", dict), components.model.path)
    llama = files.language_model_config.get("model_type") == "llama"
    inputs = OTTER if raw.get("model_type") == "otter" else OPENFLAMINGO
    converted = _openflamingo(
        components, files, encoder, with_bos(inputs, _LLAMA_BOS) if llama else inputs, where=str(components.model.path)
    )
    every = setting(raw, "cross_attn_every_n_layers", int, 4)
    if every != converted.config.cross_attention.every:
        raise CheckpointError(
            f"{components.model.path}: config.json says a gated block every {every} layers, the tensors have one every "
            f"{converted.config.cross_attention.every}. Bring the config.json and the tensors of one model."
        )
    if raw.get("only_attend_previous", True) is not True:
        note = "config.json says only_attend_previous false, which is not applied: each token attends to the image last shown before it"
        return msgspec.structs.replace(converted, notes=(*converted.notes, note))
    return converted


def _openflamingo(
    components: Components, files: openflamingo_files.Files, encoder: clip.Encoder, inputs: InputFormat, *, where: str
) -> Converted:
    """The model of OpenFlamingo's files. where: the places at which a tokenizer was looked for."""
    ids = components.token_ids
    own = _llamas_tokens(files.language_model_config, ids)
    files = msgspec.structs.replace(files, language_model_config={**files.language_model_config, **own})
    lm_settings = files.language_model_config
    vision, resized = openflamingo.own_size(files, encoder.vision)
    eoc, image = ids.get(inputs.tags.eoc), ids.get(inputs.tags.image)
    if eoc is None or image is None:
        raise CheckpointError(
            f"no tokenizer is beside {where}, and the ids of <image> and <|endofchunk|> follow from it. "
            "Name the language model's: --tokenizer FILE"
        )
    bos = setting(lm_settings, "bos_token_id", int, eoc) if lm_settings.get("bos_token_id") is not None else eoc
    pad = ids.get("<PAD>")
    config = openflamingo.config_from(
        files,
        tokens=TokenIds(pad=eoc if pad is None else pad, bos=bos, eoc=eoc, image=image),
        vision=vision,
    )
    config = msgspec.structs.replace(config, pixel_mean=encoder.pixel_mean, pixel_std=encoder.pixel_std)
    # Training gave its embedding as many rows as there were tokens then, unless it left it as it was published.
    rows, size = config.language_model.vocab_size, 1 + max(ids.values())
    if rows not in (size, setting(lm_settings, "vocab_size", int, rows)):
        padded = (
            f" The embedding may have been padded to a multiple when tokens were added (pad_to_multiple_of): then save it with {size} rows, "
            "those behind being of no token."
            if rows > size and rows % 8 == 0
            else ""
        )
        raise CheckpointError(
            f"the tokenizer has {size} tokens, those that training added included, and the embedding in {components.model.path} has "
            f"{rows} rows. Bring the tokenizer of the language model that it was trained with: --tokenizer FILE{'.' if padded else ''}{padded}"
        )
    config.validate()
    unsaid = openflamingo.added_without_rows(config.language_model, files)
    notes = [openflamingo.ATTENDS]
    if own:
        notes.append(
            f"config.json of the language model names other tokens that begin and end a text than its tokenizer: the tokenizer's "
            f"{_LLAMA_BOS} ({ids[_LLAMA_BOS]}) and {_LLAMA_EOS} ({ids[_LLAMA_EOS]}) are used"
        )
    if config.cross_attention.gate == "none":
        notes.append("checkpoint.pt holds no tanh gates: what the gated blocks give is added as it is")
    if unsaid:
        notes.append(
            f"tokens {unsaid.start} to {unsaid.stop - 1} were added in training and have no rows of the output in the files: they are never "
            "generated, and a text ends where the language model ends its own"
        )
    if files.vision and files.trained_vision():
        notes.append("the checkpoint holds a vision encoder that was trained further: it is used in place of the one given")
    if resized:
        notes.append(
            f"the vision encoder was trained further at another size: it has {vision.grid_size} patches of {vision.patch_size} pixels, so "
            f"images are made {vision.image_size} pixels wide. Pixels beyond the last whole patch, which training may have had, are read by none"
        )
    converted = Converted(
        config=config,
        expected=expected_tensors(config),
        recipes=openflamingo.recipes(config, files),
        ignored=_rules(openflamingo.ignored(config, files)),
        inputs=msgspec.structs.replace(inputs, fit=encoder.fit),
        tied=openflamingo.tied(config, files),
        notes=tuple(notes),
    )
    return _with_twins(converted, components.model, files.twins())


def _llamas_tokens(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """bos_token_id and eos_token_id of a LLaMA's tokenizer, where its config.json says others: the first conversion of LLaMA, on which
    OpenFlamingo 0.0.x was trained, had 0 and 1 there, which are `<unk>` and `<s>`."""
    if settings.get("model_type") != "llama" or not {_LLAMA_BOS, _LLAMA_EOS} <= ids.keys():
        return {}
    bos, eos = ids[_LLAMA_BOS], ids[_LLAMA_EOS]
    said = settings.get("eos_token_id", eos)
    if settings.get("bos_token_id", bos) == bos and eos in (said if isinstance(said, list) else [said]):
        return {}
    return {"bos_token_id": bos, "eos_token_id": eos}


def _with_towers(converted: Converted, shapes: Mapping[str, Shape], towers: clip_towers.Towers) -> Converted:
    """Adds the contrastive encoder that CLIP's file holds, or why it is left out."""
    if towers.config is None:
        note = f"CLIP's projections and text encoder are left out: {towers.note.removesuffix('.')}"
        return msgspec.structs.replace(converted, notes=(*converted.notes, note)) if towers.note else converted
    vision = converted.config.vision
    assert isinstance(vision, ViTConfig)
    config = msgspec.structs.replace(converted.config, contrastive=towers.config)
    return msgspec.structs.replace(
        converted,
        config=config,
        expected=expected_tensors(config),
        recipes={**(converted.recipes or {}), **clip_towers.recipes(towers.config, vision, shapes)},
    )


def _with_twins(converted: Converted, model: ComponentFiles, twins: Mapping[str, str]) -> Converted:
    """Adds second names: those given, and an output that is the embedding saved by a name of its own."""
    held = set(model.reader.names())
    heads = {head: embedding for head, embedding in converted.tied.items() if head in held and embedding in held}
    rules = _rules((re.escape(head), f"the output is the embedding: second name of {name}") for head, name in heads.items())
    return msgspec.structs.replace(converted, twins={**twins, **heads}, ignored=(*rules, *converted.ignored))


def _open_clip_config(path: Path) -> Mapping[str, Any]:
    """open_clip_config.json of a folder, or of one of open_clip's files by its published name; nothing where there is none."""
    if path.is_dir():
        beside = path / clip.OPEN_CLIP_CONFIG
    elif path.name in OPEN_CLIP_NAMES:
        beside = path.with_name(clip.OPEN_CLIP_CONFIG)
    else:
        return {}
    return read_json(beside) if beside.is_file() else {}


def _settings_of(component: ComponentFiles) -> Mapping[str, Any]:
    """The component's config.json. Raises CheckpointError if there is none: tensors do not tell how they are computed with."""
    if not component.settings:
        raise CheckpointError(
            f"{component.path} has no config.json, which this kind of model needs. Give the folder that holds both."
        )
    return component.settings


def _shapes(component: ComponentFiles) -> dict[str, Shape]:
    absent = frozenset(component.absent)
    return {name: component.reader.shape(name) for name in component.reader.names() if name not in absent}


def _rules(pairs: Iterable[tuple[str, str]]) -> tuple[Ignored, ...]:
    return tuple(Ignored(*pair) for pair in pairs)
