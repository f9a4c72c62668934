"""What a run found: scores with intervals by number of shots and group, beside another model's, as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.bootstrap import Estimate, difference, estimate
from flamingo_export.evaluation.metrics.base import Metric, Outcome, Scored
from flamingo_export.evaluation.paper import FIGURES, PaperFigures
from flamingo_export.evaluation.predictions import Prediction
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.task import Item, Task
from flamingo_export.files import write_atomically

ALL = "all"
RESULTS_FILE, TABLE_FILE, SCORES_FILE, PREDICTIONS_FILE, AGAINST_FILE = (
    "results.json", "results.csv", "scores.csv", "predictions.jsonl", "predictions-against.jsonl",
)  # fmt: skip


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A score over `items` of a group with so many shots, and its 95 % interval; the same of the model it is compared with.

    difference: this model minus the other, on the same items; changed: items whose answers differ.
    details: further figures by name, such as R@5.
    """

    shots: int
    group: str
    items: int
    value: float | None
    low: float | None
    high: float | None
    details: dict[str, float] = {}
    against: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    changed: int | None = None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Of an item with so many shots, on average: seconds (of the machine that ran it), tokens generated."""

    shots: int
    seconds: float
    tokens: float


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. `cells` and everything above it follow from only the identity; `costs` do not."""

    schema: int = 1
    task: str
    title: str
    metric: str
    unit: str
    mode: str
    split: str
    paper_split: str
    settings: Settings
    model: dict[str, str]
    against: dict[str, str] | None
    version: str
    data: str
    features: str
    left_out: dict[str, int]
    cells: tuple[Cell, ...]
    paper: PaperFigures | None = None
    costs: tuple[Cost, ...] = ()

    def cell(self, shots: int, group: str = ALL) -> Cell:
        """The cell of so many shots. Raises EvaluationError if there is none."""
        for each in self.cells:
            if (each.shots, each.group) == (shots, group):
                return each
        raise EvaluationError(f"there is no result for {shots} shots of {group}")


def outcomes(predictions: Sequence[Prediction]) -> list[Outcome]:
    """What metrics take."""
    return [Outcome(text=each.text, logprobs=each.logprobs) for each in predictions]


def cells_of(
    metric: Metric,
    settings: Settings,
    items: Sequence[Item],
    predictions: Mapping[int, Sequence[Prediction]],
    others: Mapping[int, Sequence[Prediction]] | None,
) -> tuple[list[Cell], dict[int, tuple[Scored, Scored | None]]]:
    """Cells by shots and group, and the scores that they are made of. predictions: by shots, in the order of the items."""
    groups: dict[str, list[int]] = {ALL: list(range(len(items)))}
    for place, item in enumerate(items):
        for name in item.groups:
            groups.setdefault(name, []).append(place)
    cells: list[Cell] = []
    scored: dict[int, tuple[Scored, Scored | None]] = {}
    for shots, answered in predictions.items():
        one = metric.score(items, outcomes(answered))
        other = metric.score(items, outcomes(others[shots])) if others is not None else None
        scored[shots] = (one, other)
        for name, places in groups.items():
            chosen = np.asarray(places, np.int64)
            found = estimate(one, chosen, seed=settings.seed)
            further: dict[str, Any] = {}
            if other is not None and others is not None:
                paired: Estimate = difference(one, other, chosen, seed=settings.seed)
                further = {
                    "against": other.value(chosen),
                    "difference": paired.value,
                    "difference_low": paired.low,
                    "difference_high": paired.high,
                    "changed": sum(answered[place].text != others[shots][place].text for place in places),
                }
            details = {key: float(values[chosen].mean()) for key, values in one.details.items() if len(chosen)}
            cells.append(
                Cell(
                    shots=shots,
                    group=name,
                    items=len(places),
                    value=found.value,
                    low=found.low,
                    high=found.high,
                    details=details,
                    **further,
                )
            )
    return cells, scored


def costs_of(predictions: Mapping[int, Sequence[Prediction]]) -> tuple[Cost, ...]:
    """Time and tokens of an item, by shots."""
    return tuple(
        Cost(
            shots=shots,
            seconds=float(np.mean([each.seconds for each in found])),
            tokens=float(np.mean([len(each.token_ids) for each in found])),
        )
        for shots, found in predictions.items()
        if found
    )


def paper_of(task: Task) -> PaperFigures | None:
    """The paper's figures of a task."""
    return FIGURES.get(task.name)


def write_results(
    out: Path, results: Results, items: Sequence[Item], scored: Mapping[int, tuple[Scored, Scored | None]]
) -> None:
    """results.json, results.csv and scores.csv (each item's score, where the metric is their mean)."""
    write_atomically(out / RESULTS_FILE, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    columns = [name for name in Cell.__struct_fields__ if name != "details"]
    rows = [[getattr(cell, name) for name in columns] for cell in results.cells]
    marks = [
        results.task,
        results.metric,
        results.model.get("digest", ""),
        results.model.get("precision", ""),
        results.settings.seed,
    ]
    head = ["task", "metric", "model_digest", "precision", "seed", "version"]
    write_atomically(out / TABLE_FILE, _csv([*head, *columns], [[*marks, results.version, *row] for row in rows]))
    lines = []
    for shots, (one, other) in scored.items():
        if one.items is None:
            continue
        seconds = other.items if other is not None and other.items is not None else [None] * len(items)
        lines += [[shots, item.id, float(value), second] for item, value, second in zip(items, one.items, seconds, strict=True)]
    write_atomically(out / SCORES_FILE, _csv(["shots", "id", "score", "against"], lines))


def read_results(folder: Path) -> Results:
    """A finished run. Raises EvaluationError."""
    path = folder / RESULTS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except FileNotFoundError:
        unfinished = (folder / PREDICTIONS_FILE).exists()
        advice = (
            "an evaluation that has not ended; run the same eval command to finish it"
            if unfinished
            else "expected the folder of an evaluation"
        )
        raise EvaluationError(f"{folder} has no {RESULTS_FILE}: {advice}") from None
    except (msgspec.MsgspecError, OSError) as error:
        raise EvaluationError(f"{path} cannot be read as results ({error})") from None


def read_scores(folder: Path) -> dict[int, dict[str, float]]:
    """Each item's score by shots; empty where the metric is not a mean."""
    found: dict[int, dict[str, float]] = {}
    try:
        for row in csv.DictReader(io.StringIO((folder / SCORES_FILE).read_text(encoding="utf-8"))):
            found.setdefault(int(row["shots"]), {})[row["id"]] = float(row["score"])
    except (OSError, KeyError, ValueError) as error:
        raise EvaluationError(f"{folder / SCORES_FILE} cannot be read as scores ({error})") from None
    return found


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return text.getvalue().encode()
