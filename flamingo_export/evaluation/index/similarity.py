"""Examples by visual likeness, as the selection asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.index.exact_search import nearest
from flamingo_export.evaluation.index.store import Index, IndexedItem, build_index
from flamingo_export.evaluation.protocol import Features, HasFeatures
from flamingo_export.evaluation.task import Item
from flamingo_export.progress import Progress
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.videos import Video

_FIRST = 128
"""Rows that are looked for at first; all of them only where these do not do."""
_ENCODED_TOGETHER = 256


class IndexedSimilarity:
    """Examples in an index, queries encoded when they are asked about."""

    def __init__(self, model: HasFeatures, index: Index) -> None:
        self._model, self._index = model, index
        self._vectors: dict[str, Features] = {}
        self._first: dict[str, list[tuple[int, float]]] = {}

    def prepare(self, queries: Sequence[Item], among: Sequence[int]) -> None:
        """Encodes queries of one pool together and finds their first rows in one pass over the index."""
        for start in range(0, len(queries), _ENCODED_TOGETHER):
            batch = queries[start : start + _ENCODED_TOGETHER]
            vectors = self._model.features([_shown(item) for item in batch])
            rows, cosines = nearest(self._index, vectors, min(_FIRST, len(among)), self._mask(among))
            for item, vector, found, values in zip(batch, vectors, rows.tolist(), cosines.tolist(), strict=True):
                self._vectors[item.id] = vector[None]
                self._first[item.id] = list(zip(found, values, strict=True))

    def nearest(self, query: Item, among: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Examples at these positions, the most similar first."""
        if query.id not in self._first:
            self.prepare([query], among)
        first = self._first[query.id]
        yield from first
        if len(first) < len(among):
            rows, cosines = nearest(self._index, self._vectors[query.id], len(among), self._mask(among))
            yield from zip(rows[0, len(first) :].tolist(), cosines[0, len(first) :].tolist(), strict=True)

    def _mask(self, among: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        if len(among) == self._index.record.count:
            return None
        allowed = np.zeros(self._index.record.count, np.bool_)
        allowed[list(among)] = True
        return allowed


def _shown(item: Item) -> MediumSource:
    if item.medium is None:
        raise EvaluationError(
            f"item {item.id} has no image or video, so no similar examples can be found. Choose --select random."
        )
    return item.medium


def index_of(model: Any, examples: Sequence[Item], folder: Path, *, overwrite: bool = False, progress: Progress) -> Index:
    """The index of these examples in `folder`, made or finished if need be. Raises EvaluationError."""
    if bare := [item.id for item in examples if item.medium is None]:
        raise EvaluationError(
            f"example {bare[0]} has no image or video, so it cannot be found by likeness. Choose --select random."
        )

    def encode(rows: Sequence[int]) -> Iterator[Features]:
        for start in range(0, len(rows), _ENCODED_TOGETHER):
            media = [examples[row].medium for row in rows[start : start + _ENCODED_TOGETHER]]
            yield from model.features([medium for medium in media if medium is not None])

    return build_index(
        folder,
        [indexed(item, folder) for item in examples],
        encode,
        bundle=model.identity.get("digest", ""),
        features=model.features_of,
        overwrite=overwrite,
        progress=progress,
    )


def indexed(item: Item, folder: Path) -> IndexedItem:
    """An example as an index keeps it."""
    medium, clip = item.medium, None
    video = isinstance(medium, Video)
    if isinstance(medium, Video):
        clip = medium.clip
        medium = medium.source if isinstance(medium.source, str | Path) else None
    path = os.path.relpath(medium, folder) if isinstance(medium, str | Path) else None
    return IndexedItem(
        id=item.id,
        image=None if video else path,
        video=path if video else None,
        clip=clip,
        question=item.question,
        answer=item.answer,
    )


def medium_of(item: IndexedItem, folder: Path) -> MediumSource:
    """Where an indexed item's picture lies. Raises EvaluationError if it was never a file."""
    if item.image is not None:
        return folder / item.image
    if item.video is not None:
        return Video(source=folder / item.video, clip=item.clip)
    raise EvaluationError(f"item {item.id} of the index {folder} was not indexed from a file, so it cannot be shown")
