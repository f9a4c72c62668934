"""An index in FAISS (extra `faiss`): exact inner products, for many queries against an index that stays in memory."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from flamingo_export.errors import EvaluationError, pip_install
from flamingo_export.evaluation.index.exact_search import Rows, normalised
from flamingo_export.evaluation.index.store import Index
from flamingo_export.evaluation.protocol import Features


class FaissIndex:
    """`IndexFlatIP` over all rows of an index: as exact as `search.nearest`, and all of it in memory."""

    def __init__(self, index: Index) -> None:
        """Reads all shards. Raises EvaluationError if FAISS is not installed or a shard is damaged."""
        if importlib.util.find_spec("faiss") is None:
            raise EvaluationError(f"FAISS is not installed: {pip_install('faiss')}. Search without it finds the same.")
        import faiss

        self._index: Any = faiss.IndexFlatIP(index.record.width)
        self._width = index.record.width
        for _, block in index.blocks():
            self._index.add(np.ascontiguousarray(block, np.float32))

    def nearest(self, queries: Features, count: int) -> tuple[Rows, Features]:
        """The `count` most similar rows to each query, best first: rows int64 and cosines float32 [Q, count]. Ties are in the order of rows.

        Raises EvaluationError if the vectors are of another width.
        """
        if queries.ndim != 2 or queries.shape[1] != self._width:
            raise EvaluationError(f"queries have shape {list(queries.shape)}, the index's features are {self._width} wide")
        cosines, rows = self._index.search(normalised(queries), min(count, self._index.ntotal))
        order = np.lexsort((rows, -cosines), axis=1)
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)
