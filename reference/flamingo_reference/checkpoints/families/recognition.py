"""Which family a checkpoint is of, from its files only: config.json, and the names of its tensors. Never from the name of a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flamingo_reference.checkpoints.families.clip import OPEN_CLIP_CONFIG
from flamingo_reference.checkpoints.families.known import FAMILIES, Family
from flamingo_reference.checkpoints.files.folder import INDEX_SUFFIX, NAMES, OPEN_CLIP_NAMES, open_tensors
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.tensors import CheckpointError, FileReader, refuse_emptied
from flamingo_reference.checkpoints.lora import CONFIG as ADAPTER_CONFIG
from flamingo_reference.checkpoints.lora import PREFIX as ADAPTER_PREFIX

CONFIG = "config.json"
_PACKED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_packed", ".weight_scale")
"""Ends of the names that GPTQ, AWQ, bitsandbytes and compressed-tensors give to the parts of a quantised matrix."""
_ORIGINAL = (
    "Bring the checkpoint that it was made of, in 16 or 32 bits; build it with --int4, --int8 or --fp8 to have fewer bits."
)


class Recognised(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint's family, by what it was recognised, its config.json (empty where there is none), and its tensors."""

    path: Path
    family: Family
    evidence: tuple[str, ...]
    settings: Mapping[str, Any]
    reader: FileReader


def recognise(path: Path, families: Sequence[Family] = FAMILIES, *, may_be_absent: bool = False) -> Recognised:
    """The family of a checkpoint folder or file. may_be_absent: shards that an index names need not be there.

    Raises CheckpointError if its files cannot be read, config.json and the tensors' names speak of different families, or it is of none
    that is known: all that was looked for is listed then.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. A checkpoint is a folder with config.json and tensors, or a file of tensors."
        )
    settings = _config_settings(path, families)
    _refuse_quantised(path, settings)
    by_config, evidence = _by_config(path, settings, families)
    try:
        names_first = OPEN_CLIP_NAMES if _is_open_clips(path, settings) else ()
        reader = open_tensors(path, dict.fromkeys((*names_first, *NAMES)), may_be_absent=may_be_absent).plainly_named()
    except CheckpointError as error:
        if by_config is None:
            raise
        raise CheckpointError(
            f"{path} is {by_config.title} by its {CONFIG}, but its tensors cannot be read: {error}"
        ) from error
    refuse_emptied(reader, path)
    names = reader.names()
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file() and names and all(name.startswith(ADAPTER_PREFIX) for name in names):
        raise CheckpointError(
            f"{path} holds an adapter, which changes a model that lies elsewhere. Give both: --checkpoint MODEL --lora {path}"
        )
    packed = next((name for name in names if name.endswith(_PACKED)), None)
    if packed is not None:
        raise CheckpointError(f"{path} holds {packed}: its matrices are published quantised. {_ORIGINAL}")
    shown = next((family for family in families if not _lacking(family, names)), None)
    # The first mark tells most.
    shown = shown or next((family for family in families if family.marks[0] not in _lacking(family, names)), None)
    # One mark that is there is enough: what else is missing is named with all the rest when tensors are accounted for.
    if by_config is not None and len(_lacking(by_config, names)) == len(by_config.marks):
        others = f"look like {shown.title}" if shown is not None else f"are {_some(names)}"
        raise CheckpointError(
            f"{path / CONFIG} says {evidence}, but the tensors {others}, and none is called {' or '.join(_lacking(by_config, names))}. "
            "Bring the config.json and the tensors of one model."
        )
    family = by_config or shown
    if family is None:
        raise CheckpointError(_unknown(path, settings, names, families))
    found = [evidence] if evidence else []
    found += [name for mark in family.marks if (name := next(filter(re.compile(mark).fullmatch, names), None)) is not None]
    return Recognised(path=path, family=family, evidence=tuple(found), settings=settings, reader=reader)


def _refuse_quantised(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a checkpoint whose config.json says that it was published quantised, or a folder of GGUF files."""
    how = settings.get("quantization_config")
    if how is not None:
        method = how.get("quant_method", how) if isinstance(how, Mapping) else how
        raise CheckpointError(
            f"{path / CONFIG}: quantization_config says {str(method)[:80]!r}: its matrices are published quantised. {_ORIGINAL}"
        )
    if path.is_dir():
        gguf = next(path.glob("*.gguf"), None)
        if gguf is not None and not any(
            (path / name).exists() for name in (*NAMES, *(f"{name}{INDEX_SUFFIX}" for name in NAMES))
        ):
            raise CheckpointError(f"{gguf} is GGUF, llama.cpp's format. {_ORIGINAL}")
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                raise CheckpointError(f"{path} is GGUF, llama.cpp's format. {_ORIGINAL}")


def _config_settings(path: Path, families: Sequence[Family]) -> dict[str, Any]:
    """config.json of a folder; of a file, none: what lies beside it may be of another model."""
    if not path.is_dir():
        return {}
    if (path / CONFIG).is_file():
        return read_json(path / CONFIG)
    if not any(path.iterdir()):
        raise CheckpointError(f"{path} is empty. " + _looked_for(families))
    return {}


def _is_open_clips(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder is open_clip's, in which a model.safetensors beside open_clip's file would be of another library (timm)."""
    return path.is_dir() and (path / OPEN_CLIP_CONFIG).is_file() and settings.get("model_type") is None


def _by_config(path: Path, settings: Mapping[str, Any], families: Sequence[Family]) -> tuple[Family | None, str]:
    """The family that config.json names, and in which words."""
    model_type = settings.get("model_type")
    if model_type is not None:
        for family in families:
            if model_type in family.model_types:
                return family, f"model_type {model_type!r}"
        raise CheckpointError(
            f"{path / CONFIG} says model_type {str(model_type)[:80]!r}, which is not known. " + _looked_for(families)
        )
    for family in families:
        if family.settings and all(key in settings for key in family.settings):
            return family, f"{CONFIG} with {', '.join(family.settings)}"
    return None, ""


def _lacking(family: Family, names: Sequence[str]) -> list[str]:
    return [mark for mark in family.marks if not any(re.fullmatch(mark, name) for name in names)]


def _unknown(path: Path, settings: Mapping[str, Any], names: Sequence[str], families: Sequence[Family]) -> str:
    described = f"{CONFIG} has no model_type" if settings else f"there is no {CONFIG}"
    return f"{path} is of no known family: {described}, and its tensors are {_some(names)}. {_looked_for(families)}"


def _looked_for(families: Sequence[Family]) -> str:
    lines = []
    for family in families:
        config = f"model_type {' or '.join(family.model_types)}" if family.model_types else ""
        config = config or (f"{CONFIG} with {', '.join(family.settings)}" if family.settings else "no config.json needed")
        lines.append(f"{family.title} ({config}; tensors {' and '.join(family.marks)})")
    return f"Looked for: {'; '.join(lines)}; in files {', '.join(NAMES)} or their shards."


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
