"""Stored tables that a decoder graph takes cut: those of projected distances, of which a step reads what the cache reaches and no more.

The graph has a table's whole as the default of an input. Cut here once, whenever the cache has grown, it need not be copied at each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flamingo_export.backends.base import Array
from flamingo_export.weights import DISTANCE_BLOCK, WeightIndex


class CutTables:
    """Tables [H, D, blocks, DISTANCE_BLOCK] of a bundle, each read from its file as far as it is wanted."""

    def __init__(self, bundle: Path, names: Iterable[str]) -> None:
        index = WeightIndex.read(bundle)
        self._whole = {name: index.read_tensor(bundle, name) for name in names}
        self._blocks = 0

    def fit(self, capacity: int) -> Iterator[tuple[str, Array]]:
        """Name and numbers of each table for a cache of `capacity` slots; nothing where those given before still fit."""
        blocks = -(-capacity // DISTANCE_BLOCK)
        if blocks == self._blocks:
            return
        self._blocks = 0  # until all are given
        for name, whole in self._whole.items():
            yield name, np.ascontiguousarray(whole[:, :, :blocks])
        self._blocks = blocks
