"""JSON files that came with a checkpoint: untrusted, so bounded in size and checked in type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flamingo_reference.checkpoints.files.failed_downloads import refuse_stand_in
from flamingo_reference.checkpoints.files.tensors import CheckpointError

MAX_BYTES = 10_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if it cannot be read, is larger than MAX_BYTES or holds something else."""
    refuse_stand_in(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {MAX_BYTES}: it is not a description of a model.")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Fetch it again.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def repeated_keys(text: str | bytes) -> list[str]:
    """The keys that any object of a JSON text has more than once, sorted, each once. Nothing where it is not JSON, which others say."""
    try:
        return sorted(set(decode_once(text)[1]))
    except (ValueError, RecursionError):
        return []


def decode_once(text: str | bytes) -> tuple[Any, list[str]]:
    """What a JSON text says, and the keys that any of its objects has more than once, of which readers commonly take the last.

    Raises ValueError or RecursionError if it is none.
    """
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                repeated.append(key)
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=once), repeated
