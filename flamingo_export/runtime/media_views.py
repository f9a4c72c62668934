"""Which rows of the media bank the decoder sees, where a run costs what is bound and not what is looked at.

A media row of some models is a tile of an image, with as many keys as a text has tokens. Their decoder multiplies every row that is bound,
where it lies. So the rows that a call looks at are bound and no others: a part of the bank where they lie side by side or nearly so, as the
rows of one image do; else they are taken, that is copied side by side once, and found there by the following calls. Nothing is copied in a
step: the rows that steps look at change when a request joins or leaves, not before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from flamingo_export.backends.base import Buffer, Session, Tensor

MOST_SPAN = 1.5
"""Rows from the first to the last that a call looks at, for each of these, up to which the part of the bank is bound as it is."""


class MediaViews:
    """Binds rows of the bank to the decoder's media inputs, and numbers a call's `media_rows` among those that are bound."""

    def __init__(self, decoder: Session, bank: Mapping[str, Buffer], capacity: int) -> None:
        """bank: the buffers of media inputs, of `capacity` rows each. Copies hold as many rows again at most."""
        self._decoder, self._bank, self._capacity = decoder, bank, capacity
        self._narrow = decoder.reads_bound_media
        self._taken: OrderedDict[tuple[int, ...], dict[str, Buffer]] = OrderedDict()  # least recently used first
        self._bound: tuple[str, tuple[int, ...]] | None = None

    def narrowed(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Feeds of a decoder call, media_rows int64 [B, M] numbered as the rows that are bound from now on.

        Of media that no position of their row looks at, phi being less, any row is named.
        """
        if not self._narrow or "media_rows" not in feeds:
            return dict(feeds)
        rows, phi = np.asarray(feeds["media_rows"]), np.asarray(feeds["phi"])
        looked_at = np.arange(rows.shape[1]) < phi.max(axis=1, keepdims=True)
        wanted = np.unique(rows[looked_at]) if looked_at.any() else np.zeros(1, np.int64)
        rows = np.where(looked_at, rows, wanted[0])
        first, span = int(wanted[0]), int(wanted[-1] - wanted[0]) + 1
        if span <= MOST_SPAN * len(wanted):
            self._bind("bank", (first, span), lambda name: self._bank[name].rows(first, span))
            return {**feeds, "media_rows": rows - first}
        taken = self._take(tuple(wanted.tolist()))
        self._bind("taken", tuple(wanted.tolist()), taken.__getitem__)
        return {**feeds, "media_rows": np.searchsorted(wanted, rows)}

    def written(self, row: int) -> None:
        """A row of the bank holds another medium: copies of the old one are not used again."""
        for rows in [rows for rows in self._taken if row in rows]:
            self._forget(rows)

    def _bind(self, kind: str, rows: tuple[int, ...], part: object) -> None:
        if self._bound == (kind, rows):
            return
        self._bound = None
        for name in self._bank:
            self._decoder.bind(name, part(name))  # type: ignore[operator]
        self._bound = (kind, rows)

    def _take(self, rows: tuple[int, ...]) -> dict[str, Buffer]:
        if rows in self._taken:
            self._taken.move_to_end(rows)
            return self._taken[rows]
        while self._taken and sum(map(len, self._taken)) + len(rows) > self._capacity:
            self._forget(next(iter(self._taken)))
        copies: dict[str, Buffer] = {}
        for name, buffer in self._bank.items():
            copies[name] = self._decoder.allocate(name, (len(rows), *buffer.shape[1:]))
            for place, row in enumerate(rows):
                copies[name].rows(place, 1).copy_from(buffer.rows(row, 1))
        self._taken[rows] = copies
        return copies

    def _forget(self, rows: tuple[int, ...]) -> None:
        del self._taken[rows]
        if self._bound == ("taken", rows):
            self._bound = None
