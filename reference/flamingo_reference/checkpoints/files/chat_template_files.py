"""The chat template beside a checkpoint, in each of the three files in which it has been published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flamingo_reference.checkpoints.files.failed_downloads import refuse_stand_in
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.tensors import CheckpointError

TEMPLATE_FILE = "chat_template.jinja"
_JSON_FILES = ("chat_template.json", "tokenizer_config.json")
_KEY = "chat_template"
_MAX_BYTES = 1_000_000


def read_chat_template(folder: Path) -> str | None:
    """The template that transformers would take: of chat_template.jinja, else chat_template.json, else tokenizer_config.json; None where
    there is none. Of several by name it is the one called default.

    Raises CheckpointError if a file cannot be read, or something else was downloaded in its place.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        refuse_stand_in(path)  # which would be a template that says the same of every conversation
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_BYTES}. Fetch it again.")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read as text ({error}). Fetch it again.") from error
    for name in _JSON_FILES:
        path = folder / name
        found = read_json(path).get(_KEY) if path.is_file() else None
        if found is not None:
            return _default(found, path)
    return None


def _default(found: Any, path: Path) -> str:
    """One template, or the one called default of a list or an object of them."""
    if isinstance(found, str):
        return found
    named = found
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        named = {entry.get("name"): entry.get("template") for entry in found}
    if isinstance(named, dict) and isinstance(named.get("default"), str):
        return str(named["default"])
    raise CheckpointError(
        f"{path}: {_KEY} is neither a text nor a list with one called default. Fetch the file again, or put {TEMPLATE_FILE} beside it."
    )
