"""Stored tables that a decoder graph takes cut: those of projected distances, of which a step reads what the cache reaches and no more.

The graph has a table's whole as the default of an input. Cut here once, whenever the cache has grown, it need not be copied at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flamingo_export.errors import BundleError
from flamingo_export.weights import DISTANCE_BLOCK, WeightIndex
from flamingo_reference.arrays import Array


class CutTables:
    """Tables [H, D, blocks, DISTANCE_BLOCK] of a bundle, and their beginnings that are bound."""

    def __init__(self, bundle: Path, names: Sequence[str]) -> None:
        """Raises BundleError if one of the tables is not among the bundle's weights."""
        index = WeightIndex.read(bundle)
        if missing := [name for name in names if name not in index]:
            raise BundleError(
                f"{bundle}: its decoder reads {', '.join(missing)}, and its weights have no such tables. Build it again."
            )
        self._whole = {name: index.read_tensor(bundle, name) for name in names}
        self._cut: dict[str, Array] = {}
        self._blocks = 0

    def fit(self, capacity: int, bind: Callable[[str, Array], None]) -> None:
        """Binds each table as far as a cache of `capacity` slots reaches, unless that many blocks are bound already.

        What is bound stays in memory until something else is; one table at a time, so that no two sets of copies are there at once.
        """
        blocks = -(-capacity // DISTANCE_BLOCK)
        if blocks == self._blocks:
            return
        self._blocks = 0  # some tables are of one length and some of another until all are bound
        for name, whole in self._whole.items():
            table = np.ascontiguousarray(whole[:, :, :blocks])
            bind(name, table)
            self._cut[name] = table
        self._blocks = blocks
