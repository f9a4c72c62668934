"""Finished runs side by side: `eval --compare a/ b/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.bootstrap import difference
from flamingo_export.evaluation.metrics.base import Mean
from flamingo_export.evaluation.results import ALL, Cell, Results, read_results, read_scores


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One point of a curve in every run. cells: by run, None where it has none. differences: from the first run, on the items that both asked;
    None where the metric is not a mean or there are no such items."""

    shots: int
    group: str
    cells: tuple[Cell | None, ...]
    differences: tuple[tuple[float, float, float] | None, ...]
    shared_items: tuple[int, ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Runs and their points."""

    runs: tuple[str, ...]
    results: tuple[Results, ...]
    rows: tuple[Compared, ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """Lays runs of one task side by side. Raises EvaluationError for fewer than two, or runs of several tasks."""
    if len(folders) < 2:
        raise EvaluationError("two or more folders of evaluations are compared; give them: eval --compare a/ b/")
    found = [read_results(folder) for folder in folders]
    if len({(each.task, each.metric) for each in found}) > 1:
        named = ", ".join(f"{folder}: {each.task} by {each.metric}" for folder, each in zip(folders, found, strict=True))
        raise EvaluationError(f"the runs are of different tasks ({named}). Compare runs of one task.")
    scores = [read_scores(folder) for folder in folders]
    keys = list(dict.fromkeys((cell.shots, cell.group) for each in found for cell in each.cells))
    rows = []
    for shots, group in sorted(keys, key=lambda key: (key[1] != ALL, key[1], key[0])):
        cells = tuple(next((cell for cell in each.cells if (cell.shots, cell.group) == (shots, group)), None) for each in found)
        differences: list[tuple[float, float, float] | None] = [None] * len(found)
        shared = [0] * len(found)
        if group == ALL:
            first = scores[0].get(shots, {})
            for place in range(1, len(found)):
                mine = scores[place].get(shots, {})
                both = [name for name in first if name in mine]
                shared[place] = len(both)
                if both:
                    differences[place] = _difference([mine[name] for name in both], [first[name] for name in both], found[0])
        rows.append(Compared(shots=shots, group=group, cells=cells, differences=tuple(differences), shared_items=tuple(shared)))
    return Comparison(runs=tuple(str(folder) for folder in folders), results=tuple(found), rows=tuple(rows))


def _difference(one: Sequence[float], other: Sequence[float], results: Results) -> tuple[float, float, float]:
    first, second = (Mean(items=np.asarray(values, np.float64)) for values in (one, other))
    found = difference(first, second, np.arange(len(one)), seed=results.settings.seed)
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    return found.value, found.low, found.high
