"""Results on their way to the host: two sets of pinned memory take turns, so that a run may be asked for before the one before it is read."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from flamingo_export.backends.tensorrt.cuda import Cuda
from flamingo_export.backends.tensorrt.device_memory import DeviceStream, Memory, Pinned
from flamingo_export.backends.tensorrt.dtypes import decode
from flamingo_export.backends.tensorrt.launch import Result
from flamingo_reference.arrays import Array

TOKENS = "token_ids"


class Slot:
    """Pinned memory of one run's results, as large as any before wanted it, and the events of their arrival."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._blocks: dict[str, Pinned] = {}
        self.done, self.chosen = cuda.event(), cuda.event()
        self.held: weakref.ref[DeviceRun] | None = None
        """The run whose results are here, or on their way."""

    def block(self, name: str, size: int) -> Pinned:
        found = self._blocks.get(name)
        if found is None or len(found.bytes) < size:
            found = self._blocks[name] = Pinned(self._cuda, size)
        return found

    def close(self) -> None:
        for event in (self.done, self.chosen):
            self._cuda.destroy_event(event)


class DeviceRun:
    """A run that was asked of a stream."""

    def __init__(self, stream: DeviceStream, slot: Slot, wanted: Sequence[Result], drawn: tuple[int, ...] | None) -> None:
        """drawn: shape of the tokens that were drawn for it on the device; None: none were."""
        self._stream, self._slot, self._wanted, self._drawn = stream, slot, wanted, drawn
        self._found: dict[str, Array] | None = None
        self._tokens: Array | None = None

    def tokens(self) -> Array | None:
        """The tokens it runs, int64 [B, S], where some of them were drawn on the device: waits until they are, not until it is done."""
        if self._drawn is not None and self._tokens is None:
            self._stream.cuda.wait_on_host(self._slot.chosen)
            self._read_tokens()
        return self._tokens

    def result(self) -> dict[str, Array]:
        """Waits until it is done."""
        if self._found is None:
            self._stream.cuda.wait_on_host(self._slot.done)
            self.read()
        assert self._found is not None
        return self._found

    def read(self) -> dict[str, Array]:
        """What has arrived; everything, once the stream was waited for."""
        slot = self._slot
        if self._drawn is not None and self._tokens is None:
            self._read_tokens()
        self._found = {
            result.name: decode(
                slot.block(result.name, result.nbytes).view(result.element.storage, result.shape), result.element
            )
            for result in self._wanted
        }
        return self._found

    def _read_tokens(self) -> None:
        assert self._drawn is not None
        block = self._slot.block(TOKENS, int(np.prod(self._drawn)) * 8)
        self._tokens = block.view(np.dtype(np.int64), self._drawn).copy()


class Arrivals:
    """Both slots of a session."""

    def __init__(self, stream: DeviceStream) -> None:
        self._stream = stream
        self._slots = (Slot(stream.cuda), Slot(stream.cuda))
        self._turn = 0

    def next(self) -> Slot:
        """The slot whose turn it is. What is on its way there is waited for and read."""
        self._turn ^= 1
        slot = self._slots[self._turn]
        before = slot.held() if slot.held is not None else None
        if before is not None:
            before.result()
        slot.held = None
        return slot

    def fetch(
        self, slot: Slot, wanted: Sequence[Result], places: Mapping[str, Memory], drawn: tuple[int, ...] | None
    ) -> DeviceRun:
        """Asks for the results of the run that the stream was asked for last."""
        cuda, stream = self._stream.cuda, self._stream.handle
        for result in wanted:
            cuda.copy(
                slot.block(result.name, result.nbytes).address, places[result.name].address, result.nbytes, "to host", stream
            )
        cuda.record(slot.done, stream)
        run = DeviceRun(self._stream, slot, wanted, drawn)
        slot.held = weakref.ref(run)
        return run

    def close(self) -> None:
        for slot in self._slots:
            slot.close()
