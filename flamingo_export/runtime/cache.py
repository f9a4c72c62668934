"""The KV cache: one buffer [B, H, C, D] for keys and one for values of each layer, growing in buckets, and what its rows hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flamingo_export.backends.base import Buffer, Session
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.tree import Ints

BUCKET = 128
"""Capacity grows in steps of this many slots: attention reads the whole capacity, growing copies it once. A compiled decoder has one."""

LEAST_COPY = 16
"""Positions that a busy row must hold beyond a free one for them to be copied: fewer are computed as quickly."""

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


@dataclass(eq=False)
class Row:
    """A row of the cache.

    held: keys of the prompt positions that its first slots hold.
    used: slots that are taken; whatever is written next begins there.
    key_positions: int64 [C], the position of what each slot holds, C being the largest capacity.
    """

    index: int
    key_positions: Ints
    held: tuple[Key, ...] = ()
    used: int = 0
    busy: bool = field(default=False)

    def give_up(self, slot: int) -> None:
        """Slots from `slot` on may be overwritten: what they hold is not counted on any more."""
        self.held = self.held[:slot]


class Cache:
    """Buffers bound to the decoder, and what their rows hold.

    Rows are allocated as they are first needed, so that a process which answers one request at a time has one.
    """

    def __init__(self, decoder: Session, limits: ShapeLimits, rows: int) -> None:
        """rows: requests side by side at most."""
        self._decoder = decoder
        self._limits = limits
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

        Raises CapacityError if more than the bundle's max_length is asked for, or there is no memory. In the latter case nothing is held
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
            self._buffers, self.batch, self.capacity, self.lost = {}, 0, 0, True
            for row in self.rows:
                row.held = ()
            if isinstance(error, MemoryError):
                raise CapacityError(
                    f"no memory for a cache of {rows} x {capacity} slots. Use fewer rows (--rows) or shorter prompts."
                ) from error
            raise

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
        return max(min(_common(prompt, row.held), len(prompt) - 1) for row in self.rows)

    def take(self, prompt: Sequence[Key]) -> tuple[Row, int]:
        """A free row for a prompt, and how many of its positions the row holds already.

        That is the row with the longest common beginning; of equals the first. Where a row in use has a longer one, that is copied to the free
        row which has least to lose. The last position is never reused: its logits are wanted. Raises CapacityError.
        """
        most = len(prompt) - 1
        free = [(row, min(_common(prompt, row.held), most)) for row in self.rows if not row.busy]
        row, shared = max(free, key=lambda found: found[1])
        used = [(other, min(_common(prompt, other.held), most)) for other in self.rows if other.busy]
        giver, longer = max(used, key=lambda found: found[1], default=(row, shared))
        if longer >= shared + LEAST_COPY:
            row, shared = min((found[0] for found in free), key=lambda row: len(row.held)), longer
            row.give_up(0)
            self.reserve(row.index + 1, shared)
            for buffer in self._buffers.values():
                buffer.copy_slots(giver.index, row.index, shared)
        row.busy = True
        row.held, row.used = tuple(prompt[:shared]), shared
        return row, shared

    def release(self, row: Row) -> None:
        """The row is free; what it holds of its prompt may serve another."""
        row.busy = False
        row.key_positions[len(row.held) :] = np.arange(len(row.held), len(row.key_positions))


def _common(one: Sequence[Key], other: Sequence[Key]) -> int:
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))
