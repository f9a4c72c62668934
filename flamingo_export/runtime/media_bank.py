"""The media bank: keys and values of media for every gated layer, each distinct medium once, shared by all requests that show it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from flamingo_export.backends.base import Buffer, Session, Tensor
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.media import Medium

Ints = npt.NDArray[np.int64]


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
        self._rows: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._pins: dict[bytes, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def pinned(self) -> int:
        """Rows that running requests use, or will use."""
        return len(self._pins)

    @property
    def resident(self) -> Mapping[bytes, int]:
        """Digest -> row of what the bank holds, least recently used first."""
        return self._rows

    def check(self, media: Sequence[Medium]) -> None:
        """Raises CapacityError if these media cannot be in the bank together, whatever else were given up."""
        self._check_room({medium.digest for medium in media}, 0)

    def pin(self, media: Sequence[Medium]) -> list[Medium]:
        """Keeps rows for these media until `unpin`, and returns the different ones that are yet to be encoded.

        Raises CapacityError, and pins none, if they have no room beside what is pinned.
        """
        wanted = {medium.digest: medium for medium in media}
        self._check_room(wanted.keys(), len(self._pins.keys() - wanted.keys()))
        for digest in wanted:
            self._pins[digest] = self._pins.get(digest, 0) + 1
            if digest in self._rows:
                self._rows.move_to_end(digest)
        return self.missing(wanted.values())

    def _check_room(self, wanted: Collection[bytes], others: int) -> None:
        if len(wanted) + others > self.capacity:
            beside = f", {others} of them in use by other requests" if others else ""
            raise CapacityError(
                f"{len(wanted)} different images and videos are needed at once, the bank holds {self.capacity}{beside}. "
                "Use fewer shots, or build with more rows (limits=ShapeLimits(bank_rows=...))."
            )

    def unpin(self, media: Sequence[Medium]) -> None:
        """Gives back what `pin` kept. What is in the rows stays until they are needed."""
        for digest in {medium.digest for medium in media}:
            self._pins[digest] -= 1
            if not self._pins[digest]:
                del self._pins[digest]

    def unpin_all(self) -> None:
        """Nothing is in use any more, whatever an interruption has left behind."""
        self._pins.clear()
        self._free = sorted(set(range(self.capacity)) - set(self._rows.values()), reverse=True)

    def missing(self, media: Iterable[Medium]) -> list[Medium]:
        """Those of different media that are not encoded."""
        return [medium for medium in media if medium.digest not in self._rows]

    def room_beside(self, media: Sequence[Medium]) -> int:
        """Rows that may be filled for a later request with these media: neither pinned nor holding one of them already."""
        here = {medium.digest for medium in media} & self._rows.keys()
        for digest in here:
            self._rows.move_to_end(digest)
        return self.capacity - len(self._pins.keys() | here)

    def rows_of(self, media: Sequence[Medium]) -> Ints:
        """Bank row of each of these media, all of them encoded and pinned, int64 [M]; decoder runs from now on see what is there."""
        for buffer in self._buffers.values():
            buffer.publish()
        return np.array([self._rows[medium.digest] for medium in media], np.int64)

    def store(self, medium: Medium, values: Mapping[str, Tensor]) -> None:
        """Takes up a medium's keys and values, media_k.i and media_v.i [Hx, R, Dx], unless they are there."""
        if medium.digest not in self._rows:
            self._store(medium.digest, values)

    def _store(self, digest: bytes, values: Mapping[str, Tensor]) -> None:
        row = self._free.pop() if self._free else self._evict()
        try:
            for name, buffer in self._buffers.items():
                buffer.write(row, values[name])
        except BaseException:
            self._free.append(row)  # half written: nobody may find it
            raise
        self._rows[digest] = row

    def _evict(self) -> int:
        victim = next(digest for digest in self._rows if digest not in self._pins)
        return self._rows.pop(victim)
