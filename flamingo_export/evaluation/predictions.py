"""Predictions as JSON Lines: the first line says of what run they are, then whole units, each written at once and synced.

After a kill at any moment what is left is a beginning of the file that would have been: complete units are kept, the rest is cut off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from flamingo_export.errors import EvaluationError
from flamingo_export.files import disk_errors, write_atomically


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a model made of an item, and how.

    examples: ids in the order of the first prompt; prompt: the first one of an ensemble. text: the answer, or the likeliest candidate.
    logprobs: log-likelihood of each candidate, averaged over the ensemble. candidates: of a closed task, only where they are few; of an open
    one with an ensemble, what its prompts found. seconds: the unit's time over its items.
    """

    shots: int
    unit: int
    id: str
    examples: tuple[str, ...]
    prompt: str
    text: str
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    finished: bool = True
    candidates: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    seconds: float = 0.0


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """Items that run together."""

    shots: int
    number: int
    ids: tuple[str, ...]


class PredictionFile:
    """A run's predictions on the disk. Whoever opens one holds a lock."""

    def __init__(self, path: Path, units: Sequence[Unit], identity: dict[str, Any]) -> None:
        """Opens the file of an interrupted run, or begins one.

        Raises EvaluationError if the file is of another run, naming what differs.
        """
        self.path, self._units = path, units
        self.done: list[Prediction] = []
        self.finished_units = 0
        if path.exists():
            self._resume(identity)
        else:
            write_atomically(path, msgspec.json.encode(identity) + b"\n", locked=True)

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Adds the next unit, whole. Raises EvaluationError where the disk is full."""
        data = b"".join(msgspec.json.encode(each) + b"\n" for each in predictions)
        with disk_errors(self.path.parent, EvaluationError), self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.done += predictions
        self.finished_units += 1

    def _resume(self, identity: dict[str, Any]) -> None:
        lines = self.path.read_bytes().split(b"\n")
        kept = len(lines[0]) + 1
        try:
            found = msgspec.json.decode(lines[0])
        except msgspec.MsgspecError:
            raise EvaluationError(f"{self.path} does not begin as predictions do. Give another --out, or remove it.") from None
        if differing := _differences(found, identity):
            raise EvaluationError(
                f"{self.path.parent} holds results of another run: {'; '.join(differing)}. Give another --out, or --overwrite them."
            )
        rows = lines[1:-1]  # what stands behind the last line end was never whole
        at = 0
        for unit in self._units:
            batch = rows[at : at + len(unit.ids)]
            try:
                predictions = [msgspec.json.decode(row, type=Prediction) for row in batch]
            except msgspec.MsgspecError:
                break
            if [(each.shots, each.unit, each.id) for each in predictions] != [
                (unit.shots, unit.number, name) for name in unit.ids
            ]:
                break
            self.done += predictions
            self.finished_units += 1
            at += len(unit.ids)
            kept += sum(len(row) + 1 for row in batch)
        with self.path.open("r+b") as file:
            file.truncate(kept)
            file.flush()
            os.fsync(file.fileno())


def read_predictions(path: Path) -> tuple[dict[str, Any], list[Prediction]]:
    """Identity and predictions of a finished run. Raises EvaluationError."""
    try:
        lines = path.read_bytes().splitlines()
        identity = msgspec.json.decode(lines[0], type=dict[str, Any])
        return identity, [msgspec.json.decode(line, type=Prediction) for line in lines[1:]]
    except FileNotFoundError:
        raise EvaluationError(f"{path.parent} has no {path.name}; expected the folder of an evaluation (eval --out)") from None
    except (msgspec.MsgspecError, IndexError, OSError) as error:
        raise EvaluationError(f"{path} cannot be read as predictions ({error})") from None


def _differences(found: Any, wanted: dict[str, Any], place: str = "") -> list[str]:
    """What differs between two identities, named."""
    if not isinstance(found, dict):
        return [f"{place or 'identity'} is {found!r}"]
    differing = []
    for key in sorted({*found, *wanted}):
        one, other = found.get(key), wanted.get(key)
        name = f"{place}{key}"
        if isinstance(other, dict) and isinstance(one, dict):
            differing += _differences(one, other, f"{name}.")
        elif msgspec.json.encode(one) != msgspec.json.encode(other):
            differing.append(f"{name} was {one!r}, is {other!r}")
    return differing
