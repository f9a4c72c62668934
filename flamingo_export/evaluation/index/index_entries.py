"""What an index is made of: a file of shots, or the examples of a task's published files; and shots retrieved for one medium."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.index.exact_search import nearest
from flamingo_export.evaluation.index.similarity import medium_of
from flamingo_export.evaluation.index.store import Index
from flamingo_export.evaluation.protocol import HasFeatures
from flamingo_export.evaluation.task import Item
from flamingo_export.evaluation.tasks import task_of
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.prompts import Shot, read_shots

_SAME_PICTURE = 1 - 1e-6
_SPARE = 16


def examples_of(data: Path, task: str | None, split: str | None) -> tuple[Item, ...]:
    """Items to index. data: a file of shots without a task, else the task's folder. Raises EvaluationError or PromptError."""
    if task is None:
        if split is not None:
            raise EvaluationError("a file of shots has no splits; --split goes with --task")
        return tuple(
            Item(id=str(number), medium=shot.medium, question=shot.question, answer=shot.answer, references=(shot.answer,))
            for number, shot in enumerate(read_shots(data), start=1)
        )
    chosen = task_of(task)
    items = chosen.read(data, split or chosen.support or chosen.split).items
    return tuple(item for item in items if item.answer.strip())


def retrieved_shots(model: Any, folder: Path, medium: MediumSource, count: int) -> list[Shot]:
    """The `count` examples of an index that are most like a medium, the most similar last (RICES); the medium itself is left out.

    model: one with features and the identity of the bundle that made the index. Raises EvaluationError if it is another, or there are too few.
    """
    if not isinstance(model, HasFeatures):
        raise EvaluationError("this model has no visual features to find examples by")
    index = Index(folder)
    index.check_bundle(model.identity["digest"], model.identity["name"])  # type: ignore[attr-defined]
    items = index.items()
    rows, cosines = nearest(index, model.features([medium]), min(len(items), count + _SPARE))
    chosen: Sequence[int] = [
        row
        for row, cosine in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)
        if cosine < _SAME_PICTURE and items[row].answer
    ][:count]
    if len(chosen) < count:
        raise EvaluationError(f"{count} examples are wanted, the index {folder} has {len(chosen)} beside the picture itself")
    return [
        Shot(answer=items[row].answer, question=items[row].question, medium=medium_of(items[row], folder))
        for row in reversed(chosen)
    ]
