"""The items of a run: read, drawn by the seed, checked for their media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.media_files import missing_file
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.runtime.videos import Video

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run asks and shows: queries in the order in which they are asked, examples, and what was left out of both, counted."""

    queries: tuple[Item, ...]
    examples: tuple[Item, ...]
    split: str
    left_out: dict[str, int] = field(default_factory=dict)


def read_data(
    task: Task,
    settings: Settings,
    data: Path | str | None,
    support: Path | str | None,
    split: str | None,
    *,
    skip_missing: bool = False,
) -> Data:
    """Queries and examples. Raises EvaluationError naming what is missing."""
    if data is None and task.needs_data:
        if not task.source:  # a task of one's own
            raise EvaluationError(f"task {task.name} reads its items from a file: give --data FILE, {task.files}")
        raise EvaluationError(
            f"task {task.name} reads its files from a folder: give --data. Expected there: {task.files}. From {task.source}"
        )
    place = Path(data) if data is not None else Path()
    asked = task.read(place, split or task.split)
    left_out = dict(asked.left_out)
    shown = Split(items=())
    if settings.needs_examples():
        if support is None and not task.support:
            raise EvaluationError(
                f"task {task.name} names no examples. Give some (--support FILE), or ask without: --shots 0 --zero-shot nothing"
            )
        shown = task.read(Path(support) if support is not None else place, task.support or task.split)
    _refuse_twins(asked.items)
    queries = _sampled(asked.items, settings)
    queries, gone = _there(queries, skip_missing)
    # With 0 shots only texts are shown: their media need not exist.
    examples, gone_examples = _there(shown.items, skip_missing) if any(settings.shots) else (list(shown.items), 0)
    for name, count in (("queries whose media are gone", gone), ("examples whose media are gone", gone_examples)):
        if count:
            left_out[name] = count
    spoken = [item for item in examples if item.answer.strip()]
    if len(spoken) < len(examples):
        left_out["examples without an answer that can be shown"] = len(examples) - len(spoken)
    if not queries:
        raise EvaluationError(f"task {task.name} has no items to ask")
    queries, examples = ([_looked_at(item, settings) for item in items] for items in (queries, spoken))
    return Data(queries=tuple(queries), examples=tuple(examples), split=split or task.split, left_out=left_out)


def _looked_at(item: Item, settings: Settings) -> Item:
    """The item with its video, if it is one in a file, looked at as the settings say."""
    video = item.medium
    if (
        (settings.fps is None and settings.num_frames is None)
        or not isinstance(video, Video)
        or not isinstance(video.source, str | Path)
    ):
        return item
    fps = None if Path(video.source).is_dir() else settings.fps
    return replace(item, medium=replace(video, fps=fps, num_frames=settings.num_frames))


def _sampled(items: Sequence[Item], settings: Settings) -> list[Item]:
    """The items in a random order of the seed's, the first `limit` of them."""
    order = np.random.default_rng([settings.seed, 1]).permutation(len(items))
    return [items[int(place)] for place in order[: settings.limit]]


def _refuse_twins(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise EvaluationError(f"id {item.id} occurs twice among the items")
        seen.add(item.id)


def _there(items: Sequence[Item], skip: bool) -> tuple[list[Item], int]:
    """The items whose media exist, and how many do not. Raises EvaluationError naming them unless they are to be skipped."""
    known: dict[str, bool] = {}
    kept, gone = [], []
    for item in items:
        medium = item.medium.source if isinstance(item.medium, Video) else item.medium
        if isinstance(medium, str | Path):
            name = str(medium)
            if name not in known:
                known[name] = missing_file(item) is None
            if not known[name]:
                gone.append(name)
                continue
        kept.append(item)
    if gone and not skip:
        names = "\n".join(f"  {name}" for name in gone[:_SHOWN])
        more = f"\n  and {len(gone) - _SHOWN} more" if len(gone) > _SHOWN else ""
        raise EvaluationError(
            f"the media of {len(gone)} of {len(items)} items are not there, or are empty files:\n{names}{more}\n"
            "Bring them, or leave these items out: --skip-missing"
        )
    return kept, len(gone)
