"""The media bank: keys and values of media for every gated layer, each distinct medium once, shared by all requests that show it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flamingo_export.backends.base import Buffer, Session, Tensor
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.media import Medium

Encode = Callable[[Sequence[Medium]], Iterator[tuple[Medium, Mapping[str, Tensor]]]]
"""Media -> each of them with its media_k.i / media_v.i [Hx, R, Dx], in any order."""


@dataclass(frozen=True, kw_only=True)
class BankUse:
    """What a lease found: how many distinct media had to be encoded, and how many were there already."""

    encoded: int
    reused: int


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
    def resident(self) -> Mapping[bytes, int]:
        """Digest -> row of what the bank holds, least recently used first."""
        return self._rows

    def check(self, media: Sequence[Medium]) -> None:
        """Raises CapacityError if these media cannot be in the bank together, whatever else were given up but what is pinned."""
        wanted = {medium.digest for medium in media}
        pinned = sum(digest not in wanted for digest in self._pins)
        if len(wanted) + pinned > self.capacity:
            others = f", {pinned} of them in use by other requests" if pinned else ""
            raise CapacityError(
                f"{len(wanted)} different images and videos are needed at once, the bank holds {self.capacity}{others}. "
                "Use fewer shots or smaller batches, or build with more rows (limits=ShapeLimits(bank_rows=...))."
            )

    @contextmanager
    def lease(self, media: Sequence[Medium], encode: Encode) -> Iterator[tuple[dict[bytes, int], BankUse]]:
        """Digest -> row of these media for the length of a `with` block, what is missing encoded first. Raises CapacityError before work."""
        self.check(media)
        wanted = {medium.digest: medium for medium in media}
        missing = [medium for digest, medium in wanted.items() if digest not in self._rows]
        for digest in wanted:
            self._pins[digest] = self._pins.get(digest, 0) + 1
            if digest in self._rows:
                self._rows.move_to_end(digest)
        try:
            if missing:
                for medium, values in encode(missing):
                    self._store(medium.digest, values)
            for buffer in self._buffers.values():
                buffer.publish()
            rows = {digest: self._rows[digest] for digest in wanted}
            yield rows, BankUse(encoded=len(missing), reused=len(wanted) - len(missing))
        finally:
            for digest in wanted:
                self._pins[digest] -= 1
                if not self._pins[digest]:
                    del self._pins[digest]

    def prefetch(self, media: Sequence[Medium], encode: Encode) -> Iterator[None]:
        """Encodes media of a later request a few at a time, pausing (yield) after each, as far as rows are not in use.

        Nothing is pinned, and what it gives up is neither in use nor among `media`: a lease finds what is left, and encodes what is not.
        """
        wanted = {medium.digest: medium for medium in media}
        for digest in wanted.keys() & self._rows.keys():
            self._rows.move_to_end(digest)
        kept = self._pins.keys() | (wanted.keys() & self._rows.keys())
        missing = [medium for digest, medium in wanted.items() if digest not in self._rows][: self.capacity - len(kept)]
        for medium, values in encode(missing):
            if medium.digest not in self._rows:
                self._store(medium.digest, values)
            yield

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
