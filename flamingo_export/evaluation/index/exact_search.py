"""Exact search: cosines of queries with every row, a shard at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.index.store import Index
from flamingo_export.evaluation.protocol import Features

Rows = npt.NDArray[np.int64]


def nearest(index: Index, queries: Features, count: int, among: npt.NDArray[np.bool_] | None = None) -> tuple[Rows, Features]:
    """The `count` most similar rows to each query, best first, ties in the order of rows: rows int64 and cosines float32 [Q, count].

    queries: float32 [Q, E], of any length. among: bool [N], the rows that may be found; there are fewer than `count` columns if it
    allows fewer. Memory is that of one shard and Q times count. Raises EvaluationError if the vectors are of another width.
    """
    width = index.record.width
    if queries.ndim != 2 or queries.shape[1] != width:
        raise EvaluationError(f"queries have shape {list(queries.shape)}, the index's features are {width} wide")
    unit = normalised(queries)
    rows, cosines = np.zeros((len(unit), 0), np.int64), np.zeros((len(unit), 0), np.float32)
    for first, block in index.blocks():
        found = unit @ block.T
        places = np.arange(first, first + len(block))
        if among is not None:
            allowed = among[first : first + len(block)]
            found, places = found[:, allowed], places[allowed]
        rows = np.concatenate([rows, np.broadcast_to(places, found.shape)], axis=1)
        cosines = np.concatenate([cosines, found], axis=1)
        # A stable sort keeps earlier rows first where cosines are equal.
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        rows, cosines = np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)
    return rows, cosines


def pairs_alike(one: Index, other: Index, above: float) -> Iterator[tuple[int, int, float]]:
    """(row of `one`, row of `other`, cosine) of all pairs from `above` on: training images that an evaluation would find again."""
    if one.record.bundle != other.record.bundle or one.record.width != other.record.width:
        raise EvaluationError(
            f"{one.folder} and {other.folder} were made by different bundles, so their features cannot be compared"
        )
    for first, block in one.blocks():
        for second, others in other.blocks():
            found = block @ others.T
            for row, column in np.argwhere(found >= above).tolist():
                yield first + row, second + column, float(found[row, column])


def normalised(vectors: Features) -> Features:
    """Each row of length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Features = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit
