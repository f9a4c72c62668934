"""The media bank: keys and values of media for every gated layer, each distinct medium once, shared by all requests that show it.

A medium has a row, or one for each tile: side by side where there is room, so that they can be bound as they lie (`media_views.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from flamingo_export.backends.base import Buffer, Session, Tensor
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.media_views import MediaViews
from flamingo_reference.arrays import Ints


class MediaBank:
    """A fixed number of rows, addressed by the digest of decoded pixels.

    Rows of a running request are pinned; of the others the least recently used is given up first.
    """

    def __init__(self, decoder: Session, capacity: int) -> None:
        """Allocates the rows and binds them to the decoder's media inputs. Memory is taken as rows are first written."""
        self.capacity = capacity
        self._buffers: dict[str, Buffer] = {}
        for tensor in decoder.spec.inputs:
            if tensor.name.startswith(("media_k.", "media_v.")):
                shape = (capacity, *(int(size) for size in tensor.shape[1:]))
                buffer = self._buffers[tensor.name] = decoder.allocate(tensor.name, shape)
                decoder.bind(tensor.name, buffer)
        self._views = MediaViews(decoder, self._buffers, capacity)
        self._rows: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()  # least recently used first
        self._pins: dict[bytes, int] = {}
        self._sizes: dict[bytes, int] = {}
        """Rows of each pinned medium."""
        self._free = set(range(capacity))

    @property
    def pinned(self) -> int:
        """Rows that running requests use, or will use."""
        return sum(self._sizes.values())

    @property
    def filled(self) -> int:
        """Rows that hold something."""
        return self.capacity - len(self._free)

    @property
    def resident(self) -> Mapping[bytes, tuple[int, ...]]:
        """Digest -> rows of what the bank holds, least recently used first."""
        return self._rows

    def check(self, media: Sequence[Medium]) -> None:
        """Raises CapacityError if these media cannot be in the bank together, whatever else were given up."""
        self._check_room({medium.digest: medium.rows for medium in media}, 0)

    def pin(self, media: Sequence[Medium]) -> list[Medium]:
        """Keeps rows for these media until `unpin`, and returns the different ones that are yet to be encoded.

        Raises CapacityError, and pins none, if they have no room beside what is pinned.
        """
        wanted = {medium.digest: medium for medium in media}
        sizes = {digest: medium.rows for digest, medium in wanted.items()}
        self._check_room(sizes, sum(size for digest, size in self._sizes.items() if digest not in wanted))
        for digest in wanted:
            self._pins[digest] = self._pins.get(digest, 0) + 1
            if digest in self._rows:
                self._rows.move_to_end(digest)
        self._sizes |= sizes
        return self.missing(wanted.values())

    def _check_room(self, wanted: Mapping[bytes, int], others: int) -> None:
        rows = sum(wanted.values())
        if rows + others <= self.capacity:
            return
        beside = f", {others} of them in use by other requests" if others else ""
        tiles = f" of {rows} tiles" if rows > len(wanted) else ""
        raise CapacityError(
            f"{len(wanted)} different images and videos{tiles} are needed at once, the bank holds {self.capacity}{beside}. "
            "Use fewer shots, or build with more rows (limits=ShapeLimits(bank_rows=...))."
        )

    def unpin(self, media: Sequence[Medium]) -> None:
        """Gives back what `pin` kept. What is in the rows stays until they are needed."""
        for digest in {medium.digest for medium in media}:
            self._pins[digest] -= 1
            if not self._pins[digest]:
                del self._pins[digest], self._sizes[digest]

    def unpin_all(self) -> None:
        """Nothing is in use any more, whatever an interruption has left behind."""
        self._pins.clear()
        self._sizes.clear()
        self._free = set(range(self.capacity)).difference(*self._rows.values())

    def missing(self, media: Iterable[Medium]) -> list[Medium]:
        """Those of different media that are not encoded."""
        return [medium for medium in media if medium.digest not in self._rows]

    def fitting_beside(self, media: Sequence[Medium]) -> list[Medium]:
        """Of these different media of a later request, those to encode that have room: in rows neither pinned nor holding one of them."""
        here = [medium.digest for medium in media if medium.digest in self._rows]
        for digest in here:
            self._rows.move_to_end(digest)
        room = self.capacity - self.pinned - sum(len(self._rows[digest]) for digest in here if digest not in self._pins)
        fitting = []
        for medium in self.missing(media):
            room -= medium.rows if medium.digest not in self._pins else 0
            if room < 0:
                break
            fitting.append(medium)
        return fitting

    def rows_of(self, media: Sequence[Medium]) -> Ints:
        """Bank rows of each of these media, all of them encoded and pinned, after each other, int64 [M]; decoder runs from now on see what is
        there."""
        for buffer in self._buffers.values():
            buffer.publish()
        return np.array([row for medium in media for row in self._rows[medium.digest]], np.int64)

    def narrowed(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Feeds of a decoder call with `media_rows` as the decoder now sees the bank (`MediaViews.narrowed`)."""
        return self._views.narrowed(feeds)

    def store(self, medium: Medium, values: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes up a medium's keys and values, media_k.i and media_v.i [Hx, R, Dx] of each of its rows, unless they are there."""
        if medium.digest not in self._rows:
            self._store(medium.digest, values)

    def _store(self, digest: bytes, values: Sequence[Mapping[str, Tensor]]) -> None:
        while len(self._free) < len(values):
            self._evict()
        rows = _side_by_side(self._free, len(values))
        self._free.difference_update(rows)
        try:
            for row, each in zip(rows, values, strict=True):
                self._views.written(row)
                for name, buffer in self._buffers.items():
                    buffer.write(row, each[name])
        except BaseException:
            self._free.update(rows)  # half written: nobody may find it
            raise
        self._rows[digest] = rows

    def _evict(self) -> None:
        victim = next(digest for digest in self._rows if digest not in self._pins)
        self._free.update(self._rows.pop(victim))


def _side_by_side(free: Collection[int], count: int) -> tuple[int, ...]:
    """`count` of the free rows: the first that lie side by side, or else the first ones."""
    rows = sorted(free)
    for place in range(len(rows) - count + 1):
        if rows[place + count - 1] - rows[place] == count - 1:
            return tuple(rows[place : place + count])
    return tuple(rows[:count])
