"""The KV cache: one buffer [B, H, C, D] for keys and one for values of each layer, growing in buckets, and what its rows hold.

A row serves one request, or several whose prompts begin alike: then the beginning is stored and read once, and each request has its own
slots behind it, in whatever order they were written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flamingo_export.backends.base import Buffer, Session
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import CapacityError, NoMemory
from flamingo_reference.arrays import Ints

BUCKET = 128
"""Capacity grows in steps of this many slots: attention reads the whole capacity, growing copies it once. A compiled decoder has one."""

LEAST_COPY = 16
"""Positions that a busy row must hold beyond a free one for them to be copied: fewer are computed as quickly. So many at least are shared."""
COMPUTED = 256
"""What a prompt position costs to compute, in slots that a step reads: measured on the 110M decoder."""

Key = int | bytes
"""What decides a prompt position's keys and values, besides the positions before it: its token id, or its medium's digest at an `<image>`."""


def slots_for(*, prompt: int, width: int, new_tokens: int) -> int:
    """Cache slots that a request needs at most: decoding writes `width` slots a step after the prompt."""
    return prompt + width * new_tokens


def check_capacity(*, prompt: int, width: int, new_tokens: int, limits: ShapeLimits) -> None:
    """Raises CapacityError, before any work, if a request cannot fit, saying by how much and what would."""
    needed = slots_for(prompt=prompt, width=width, new_tokens=new_tokens)
    if needed <= limits.max_length:
        return
    room = max(0, limits.max_length - prompt) // width
    hint = f"Generate at most {room} tokens, use fewer beams" if room else "Use fewer shots"
    raise CapacityError(
        f"a prompt of {prompt} tokens with {width} beams of {new_tokens} new tokens needs {needed} cache slots, "
        f"the bundle allows {limits.max_length}. {hint}, or build with a larger --max-length."
    )


def check_positions(*, prompt: int, new_tokens: int, position_limit: int | None) -> None:
    """Raises CapacityError, before any work, if a request reaches beyond the positions that the model has (None: it has all)."""
    if position_limit is not None and prompt + new_tokens > position_limit:
        room = max(0, position_limit - prompt)
        raise CapacityError(
            f"a prompt of {prompt} tokens with {new_tokens} new ones needs {prompt + new_tokens} positions, the model has {position_limit}. "
            + (f"Generate at most {room} tokens, or use fewer shots." if room else "Use fewer shots.")
        )


@dataclass(eq=False, kw_only=True)
class Seat:
    """A request's place in a row.

    columns: of each of its decoding steps; 0 for one that does not decode.
    left: slots that it may yet take.
    looks: bank rows that its steps look at, those of a range in order.
    settled: whether it stays in this row; before, nobody joins it there.
    """

    row: Row
    columns: int
    left: int
    looks: tuple[int, ...] = ()
    settled: bool = False

    def take(self, slots: int) -> None:
        """The next slots of the row are this request's."""
        self.row.used += slots
        self.left -= slots

    def give_back(self, slots: int) -> None:
        """The last ones taken hold nothing that is seen. They are written again unless others have slots behind them."""
        if len(self.row.seats) == 1:
            self.row.used -= slots
        self.left += slots


@dataclass(eq=False)
class Row:
    """A row of the cache.

    held: keys of the prompt positions that its first slots hold.
    used: slots that are taken; whatever is written next begins there.
    key_positions: int64 [C], the position of what each slot holds, C being the largest capacity.
    seats: of the requests that use it.
    """

    index: int
    key_positions: Ints
    held: tuple[Key, ...] = ()
    used: int = 0
    seats: list[Seat] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether a request uses it."""
        return bool(self.seats)

    @property
    def promised(self) -> int:
        """Slots that are taken, or may yet be by those who are here."""
        return self.used + sum(seat.left for seat in self.seats)

    def give_up(self, slot: int) -> None:
        """Slots from `slot` on may be overwritten: what they hold is not counted on any more."""
        self.held = self.held[:slot]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How far requests share rows.

    columns, media: of a step of a shared row at most, None for any number: what an engine was built for.
    dense: whether a step's cost grows with the slots that its columns could see, as in attentions that compute what a mask then hides. The
        slots of the requests themselves are then at most as many as those of the beginning they share.
    """

    columns: int | None = None
    media: int | None = None
    dense: bool = True


class Cache:
    """Buffers bound to the decoder, and what their rows hold.

    Rows are allocated as they are first needed, so that a process which answers one request at a time has one.
    """

    def __init__(self, decoder: Session, limits: ShapeLimits, rows: int) -> None:
        """rows: requests side by side at most."""
        self._decoder = decoder
        self._limits = limits
        # An engine has bounds, and attention that reads a slot once for all columns; other decoders have neither.
        bounded = "S" in decoder.largest
        ranges = any(tensor.name == "first_media" for tensor in decoder.spec.inputs)
        media = min(limits.branch_media * (limits.max_tiles if ranges else 1), decoder.largest.get("M", 1))
        self.sharing = Sharing(columns=limits.branches, media=media, dense=False) if bounded else Sharing()
        self._shapes = {
            tensor.name: tensor.shape for tensor in decoder.spec.inputs if tensor.name.startswith(("past_k.", "past_v."))
        }
        self._buffers: dict[str, Buffer] = {}
        self._bound: tuple[int, int] | None = None
        places = np.arange(limits.max_length, dtype=np.int64)
        self.rows = [Row(index, places.copy()) for index in range(rows)]
        self.batch = 0
        """Rows that are allocated."""
        self.capacity = 0
        self.lost = False
        """Whether what rows held is gone since this was last set."""

    def bind(self, first: int, count: int) -> None:
        """From now on the decoder sees rows first .. first + count - 1, of those that `reserve` made."""
        if self._bound == (first, count):
            return
        self._bound = None
        for name, buffer in self._buffers.items():
            self._decoder.bind(name, buffer.rows(first, count))
        self._bound = (first, count)

    def reserve(self, batch: int, slots: int) -> None:
        """Makes room for `batch` rows of `slots` slots. Grown buffers keep what the old ones held.

        Raises CapacityError if more than the bundle's max_length is asked for, NoMemory if there is none. In the latter case nothing is held
        any more where the slots were to grow.
        """
        if slots > self._limits.max_length:
            raise CapacityError(
                f"{slots} cache slots are needed, the bundle allows {self._limits.max_length}. Build with a larger --max-length."
            )
        if slots <= self.capacity and batch <= self.batch:
            return
        bucket = self._decoder.largest.get("C") or min(-(-slots // BUCKET) * BUCKET, self._limits.max_length)
        capacity = max(self.capacity, bucket)
        # Rows come in powers of two, so that a busy engine does not move its cache for each of them.
        rows = self.batch if batch <= self.batch else min(len(self.rows), 1 << (batch - 1).bit_length())
        try:
            self._reallocate(rows, capacity)
        except BaseException as error:
            # Some buffers are grown and some are not: none can be used, the next call begins anew.
            held = sum(buffer.nbytes for buffer in self._buffers.values())
            self._buffers, self.batch, self.capacity, self.lost = {}, 0, 0, True
            for row in self.rows:
                row.held = ()
            if isinstance(error, MemoryError):
                raise NoMemory(self._short(rows, capacity, error, held)) from error
            raise

    def _short(self, rows: int, capacity: int, error: MemoryError, held: int) -> str:
        """How much was needed, and what would fit. held: bytes of buffers that are given back."""
        text = f"no memory for a cache of {rows} x {capacity} slots"
        asked, free = (getattr(error, name, None) for name in ("asked", "free"))
        if asked and free is not None:
            needed, left = asked * len(self._shapes), free + held  # keys and values of all layers are alike
            fitting = left * rows // needed
            text += f": it takes {needed / 2**20:.0f} MiB, of which {left / 2**20:.0f} MiB are there, enough for {fitting} rows"
        return f"{text}. Use fewer rows (--rows) or shorter prompts."

    def _reallocate(self, batch: int, capacity: int) -> None:
        self._bound = None
        kept = [row.index for row in self.rows[: self.batch] if row.held or row.busy]
        for name, shape in self._shapes.items():
            _, heads, _, head_size = shape
            fresh = self._decoder.allocate(name, (batch, int(heads), capacity, int(head_size)))
            for index in kept:
                fresh.rows(index, 1).copy_from(self._buffers[name].rows(index, 1))
            # One buffer at a time: the old one goes before the next is made, so that growing never holds two caches.
            self._buffers[name] = fresh
            self._decoder.bind(name, fresh)
        self.batch, self.capacity = batch, capacity

    def known(self, prompt: Sequence[Key]) -> int:
        """Positions of a prompt that some row holds."""
        return max(self._known(prompt, row) for row in self.rows)

    def _known(self, prompt: Sequence[Key], row: Row) -> int:
        return min(_common(prompt, row.held), len(prompt) - 1)

    def take(self, prompt: Sequence[Key], *, slots: int, columns: int = 0) -> Seat:
        """A free row for a request: the one with the longest common beginning, of equals the first; where a row in use has a longer one, the
        one that has least to lose.

        slots: that the request takes at most, its whole prompt among them. columns: of its decoding steps.
        """
        free = [(row, self._known(prompt, row)) for row in self.rows if not row.busy]
        row, shared = max(free, key=lambda found: found[1])
        if max((self._known(prompt, other) for other in self.rows if other.busy), default=0) >= shared + LEAST_COPY:
            row, shared = min(free, key=lambda found: len(found[0].held))
        row.held, row.used = tuple(prompt[:shared]), shared
        seat = Seat(row=row, columns=columns, left=slots - shared)
        row.seats.append(seat)
        return seat

    def settle(self, seat: Seat, prompt: Sequence[Key], *, slots: int, looks: Sequence[int] = (), steps: int = 0) -> int:
        """Where the request's prompt is about to be computed: how many of its positions are in its row already, which may be another now.

        It moves to a row in use where the two beginnings are alike, there is room, and it pays (`_shared`). Else a longer beginning is copied
        from another row, in use or left since the request got its own. The last position is never reused: its logits are wanted.

        slots: as `take` was given them. looks: bank rows that its steps look at. steps: that it decodes at most. Raises CapacityError.
        """
        own = seat.row
        seat.looks, seat.settled = tuple(looks), True
        shared = self._known(prompt, own)
        others = [(row, self._known(prompt, row)) for row in self.rows if row is not own]
        joins = [found for found in others if found[0].busy and self._shared(*found, seat, slots, shared, steps)]
        if joins:
            self.release(seat)
            seat.row, shared = max(joins, key=lambda found: found[1])
            seat.row.seats.append(seat)
        elif others:
            giver, longer = max(others, key=lambda found: found[1])
            if longer < shared + LEAST_COPY:
                giver, longer = own, shared
            # Who joined another left a hole; rows decode in one call where they are side by side.
            closes = any(len(row.seats) > 1 for row in self.rows)
            self.release(seat)
            target = next(row for row in self.rows if not row.busy) if closes else own
            seat.row = target  # before anything can fail: who leaves is looked for there
            target.seats.append(seat)
            if giver is not target:
                target.give_up(0)
                self.reserve(target.index + 1, longer)
                for buffer in self._buffers.values() if longer else ():
                    buffer.copy_slots(giver.index, target.index, longer)
            shared = longer
            target.held, target.used = tuple(prompt[:longer]), longer
        seat.left = slots - shared
        return shared

    def _shared(self, row: Row, length: int, seat: Seat, slots: int, here: int, steps: int) -> bool:
        """Whether a request may use a busy row whose first `length` slots begin as its prompt does, and should.

        slots: that it takes at most, all in all. here: positions that the row holds which it has; there they would be computed again.
        """
        bounds, own = self.sharing, slots - length
        if not all(other.settled for other in row.seats):
            return False
        if length < LEAST_COPY or row.promised + own > self._limits.max_length:
            return False
        if bounds.columns is not None and sum(other.columns for other in row.seats) + seat.columns > bounds.columns:
            return False
        if bounds.media is not None and sum(map(len, {seat.looks, *(other.looks for other in row.seats)})) > bounds.media:
            return False
        if bounds.dense and row.promised + own > 2 * length:
            return False
        return (here - length) * COMPUTED <= length * steps

    def release(self, seat: Seat) -> None:
        """A request leaves its row. When the last one has left, the row is free; what it holds of a prompt may serve another."""
        row = seat.row
        row.seats.remove(seat)
        if not row.seats:
            _emptied(row)

    def clear(self) -> None:
        """No row is in use any more, whatever an interruption has left behind."""
        for row in self.rows:
            row.seats.clear()
            _emptied(row)


def _emptied(row: Row) -> None:
    """Slots behind a row's beginning are nobody's."""
    row.key_positions[len(row.held) :] = np.arange(len(row.held), len(row.key_positions))


def _common(one: Sequence[Key], other: Sequence[Key]) -> int:
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))
