"""What a step's feeds cost on the bus: small ones go together in one copy, large ones stay on the device and are changed where they differ.

    host     | token_ids | phi | ... | updates | choices |        one block of pinned memory, the other one still on its way
                  │ one copy of as many bytes as there are
    device   | token_ids | phi | ... | updates | choices |
                                          │ kernel `update`: eight bytes each
             mask, key_positions <────────┘                       what the host last sent is known, so what differs is

What differs is found by comparing with what was sent last for this step, not by asking who changed what: the device holds what the
host would have sent whole, whatever came between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flamingo_export.backends.tensorrt.device_memory import ALIGNMENT, DeviceStream, Memory, Pinned
from flamingo_export.backends.tensorrt.dtypes import ElementType, encode
from flamingo_export.backends.tensorrt.step_kernels import CHOICE, UPDATE
from flamingo_reference.arrays import Array

KEPT = ("mask", "key_positions")
"""Inputs of a decoder that are as large as a cache is long, and change little from step to step."""
MOST_UPDATES = 4096
"""Of eight bytes each. Where an input differs in more places, or in half of it, it is sent whole."""
_WORD = 8
Updates = npt.NDArray[np.void]


def updates_of(addresses: Array, values: Array) -> Updates:
    """An update for each address, uint64 [n]."""
    found: Updates = np.empty(len(addresses), UPDATE)
    found["where"], found["what"] = addresses, values
    return found


class Kept:
    """An input in memory of its own on the device, and what the host knows to be there."""

    def __init__(self, stream: DeviceStream, shape: tuple[int, ...], element: ElementType) -> None:
        """Raises DeviceMemoryError."""
        self._shape, self._element = shape, element
        self.nbytes = math.prod(shape) * element.size
        self._words = -(-self.nbytes // _WORD)
        self._memory = Memory(stream, self._words * _WORD)
        self._known: npt.NDArray[np.uint64] | None = None

    @property
    def address(self) -> int:
        return self._memory.address

    def changes(self, value: Array, room: int) -> Updates | None:
        """Updates, at most `room`, that make of it what `value` is; None: it is to be sent whole. Either way it is known from now on."""
        fresh = np.zeros(self._words, np.uint64)
        encode(value, fresh.view(np.uint8)[: self.nbytes].view(self._element.storage).reshape(self._shape), self._element)
        known, self._known = self._known, fresh
        if known is None:
            return None
        places = np.flatnonzero(fresh != known)
        if len(places) > min(room, self._words // 2):
            return None
        return updates_of(places.astype(np.uint64) * np.uint64(_WORD) + np.uint64(self.address), fresh[places])

    @property
    def whole(self) -> Array:
        """What it is to hold, as bytes [nbytes]."""
        assert self._known is not None
        return self._known.view(np.uint8)[: self.nbytes]

    def forget(self) -> None:
        """Nothing is known of what is there: a call failed on its way."""
        self._known = None


class Pack:
    """The block in which small feeds, updates and choices go to the device, and two of the host that take turns."""

    def __init__(self, stream: DeviceStream, size: int) -> None:
        """Raises DeviceMemoryError."""
        cuda = stream.cuda
        self._stream = stream
        self._memory = Memory(stream, size)
        self._blocks = [Pinned(cuda, size) for _ in range(2)]
        self._sent = [cuda.event() for _ in range(2)]
        self._busy = [False, False]
        self._turn = 0
        self.size = size

    @property
    def address(self) -> int:
        return self._memory.address

    def block(self) -> Pinned:
        """The host's block whose turn it is, once what it held is sent."""
        self._turn ^= 1
        if self._busy[self._turn]:
            self._stream.cuda.wait_on_host(self._sent[self._turn])
            self._busy[self._turn] = False
        return self._blocks[self._turn]

    def send(self, size: int) -> None:
        """Asks for a copy of the first `size` bytes of the block that `block` gave."""
        cuda, stream = self._stream.cuda, self._stream.handle
        cuda.copy(self.address, self._blocks[self._turn].address, size, "to device", stream)
        cuda.record(self._sent[self._turn], stream)
        self._busy[self._turn] = True

    def close(self) -> None:
        for event in self._sent:
            self._stream.cuda.destroy_event(event)


def places_of(names: Sequence[str], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each of these inputs begins in a pack, aligned as engines want it, and where the next thing may begin."""
    found, at = {}, 0
    for name in names:
        found[name] = at
        at += aligned(sizes[name])
    return found, at


def aligned(size: int) -> int:
    """The next multiple of the alignment of addresses."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def written(block: Pinned, at: int, records: Any) -> int:
    """Writes updates or choices into a block from `at` on; returns where the next thing may begin."""
    if len(records):
        block.bytes[at : at + records.nbytes] = records.view(np.uint8)
    return at + int(records.nbytes)


NO_UPDATES: Updates = np.empty(0, UPDATE)
NO_CHOICES: Updates = np.empty(0, CHOICE)
