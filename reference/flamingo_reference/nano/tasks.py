"""Held-out captions and questions about scenes, by which the accuracy of a nano bundle is measured: the same items at every call.

`answers.json` holds what the reference itself, in PyTorch, says to the first COUNT of them (`python -m flamingo_export.validate.accuracy`
writes it). Scenes come from seeds beyond those that training, evaluation and examples use. No torch import.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from flamingo_reference.nano import pictures

SEED = 9_000_000
COUNT = 400
ANSWERS = Path(__file__).parent / "answers.json"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A medium uint8 RGB [64, 64, 3], what is asked about it (without the `<image>` before) and what is right."""

    kind: Literal["caption", "question"]
    frame: pictures.Pixels
    asked: str
    expected: str


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What the reference says to the first tasks, greedily. weights_sha256: of the checkpoint, as in a bundle's manifest."""

    weights_sha256: str
    said: list[str]


def tasks(count: int) -> list[Task]:
    """The first `count` tasks: a caption and a question of each scene."""
    found: list[Task] = []
    for task in _all():
        if len(found) == count:
            break
        found.append(task)
    return found


def _all() -> Iterator[Task]:
    number = 0
    while True:
        item = pictures.scene(SEED + number, split="test")
        question, answer = item.questions[number % len(item.questions)]
        yield Task(kind="caption", frame=item.frames[0], asked="Output:", expected=item.caption)
        yield Task(kind="question", frame=item.frames[0], asked=f"Question: {question} Answer:", expected=answer)
        number += 1


def read_answers() -> Answers:
    """What was recorded."""
    return msgspec.json.decode(ANSWERS.read_bytes(), type=Answers)
