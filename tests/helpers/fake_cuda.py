"""CUDA devices in host memory, for tests on machines without one: what a stream is asked is done when somebody waits for it, not before.

It refuses what a device would do wrong without a word or crash on: memory that was freed or never allocated, sizes beyond an allocation,
asynchronous copies from or to memory that is not pinned, a stream or event that is gone, allocating or waiting during a capture. A machine may
have several devices: memory, streams and events of one are refused by another, but for what CUDA lets it do with them.

Work that has begun is finished before anything else of its stream: a device is not interrupted by what happens on the host. Python's garbage
collector may run in the middle of work that is computed here, and what it frees waits for the device, as on a real one; so it is freed once that
work is done. Threads take turns for the same reason.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flamingo_export.backends.tensorrt.cuda import CudaError, DeviceMemoryError, Direction

Work = Callable[[], None]
_KINDS = {"to device": ("pinned", "device"), "to host": ("device", "pinned"), "on device": ("device", "device")}


class Misuse(AssertionError):
    """What a program must never do with a device."""


@dataclass(eq=False)
class _Stream:
    device: int
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    first: bool = False


@dataclass
class _Event:
    device: int
    stream: _Stream | None = None
    done: bool = True
    in_capture: bool = False


_WITHIN_WORK = ("free", "free_host", "free_async", "destroy_stream", "destroy_event", "use", "view")
"""What finalizers call, which may run in the middle of anything, and how work looks at memory."""


def _taking_turns(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the host's: threads make theirs one after the other."""

    @functools.wraps(method)
    def call(self: FakeCuda, *args: Any, **kwargs: Any) -> Any:
        with self.machine.turn:
            if self.machine.working and method.__name__ not in _WITHIN_WORK:
                raise Misuse(f"{method.__name__} was called by what a stream was asked to do")
            return method(self, *args, **kwargs)

    return call


class Machine:
    """What devices of one machine share. peers: whether they reach each other's memory."""

    def __init__(self, *memory: int, peers: bool = True) -> None:
        """memory: bytes of each device; none, where a device is put into it that is made by itself."""
        self.peers = peers
        self.turn = threading.RLock()
        self.working = 0
        """Pieces of work that were begun and are not finished: one, or more where one waits for another stream."""
        self.postponed: list[Work] = []
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, _Event] = {}
        self.handles = 1000
        self.blocks: dict[int, tuple[str, np.ndarray, int]] = {}
        """Address -> kind of memory, its bytes, and the device that took it."""
        self.thread = threading.local()
        self.devices: list[FakeCuda] = []
        for size in memory:
            FakeCuda(size, machine=self)

    @property
    def current(self) -> FakeCuda:
        """The device that libraries called by this thread work on: 0 until another is set."""
        return self.devices[getattr(self.thread, "device", 0)]


class FakeCuda:
    """Implements backends.tensorrt.cuda.Cuda. `crossed` counts bytes by direction as they are copied, `log` names calls in order."""

    def __init__(self, memory: int = 1 << 32, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.index = len(self.machine.devices)
        self.machine.devices.append(self)
        self.dlpack_device = (2, self.index)
        """As a GPU's. Its memory is the host's, (1, 0), for those who look into it through DLPack."""
        self.memory = memory
        self.used = 0
        self.crossed: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, BaseException] = {}
        """Name of a call -> what it raises from now on."""
        self._graphs: dict[int, list[Work]] = {}

    # Memory.

    @_taking_turns
    def use(self) -> None:
        self._call("use", allowed_in_capture=True)

    @_taking_turns
    def free_memory(self) -> tuple[int, int]:
        return self.memory - self.used, self.memory

    @_taking_turns
    def malloc(self, size: int) -> int:
        self._call("malloc")
        return self._allocate("device", size)

    @_taking_turns
    def malloc_async(self, size: int, stream: int) -> int:
        self._call("malloc_async")
        self._stream(stream)
        return self._allocate("device", size)

    @_taking_turns
    def malloc_host(self, size: int) -> int:
        self._call("malloc_host")
        return self._allocate("pinned", size)

    @_taking_turns
    def free(self, address: int) -> None:
        self._call("free")
        self._when_done(lambda: self._release("device", address))

    @_taking_turns
    def free_async(self, address: int, stream: int) -> None:
        self._call("free_async", allowed_in_capture=True)
        self._ask(stream, lambda: self._release("device", address))

    @_taking_turns
    def free_host(self, address: int) -> None:
        self._call("free_host")
        self._when_done(lambda: self._release("pinned", address))

    @_taking_turns
    def view(self, address: int, size: int, kind: str = "device") -> np.ndarray:
        """The bytes of an allocation from `address` on. Raises Misuse."""
        for start, (found, block, device) in self.machine.blocks.items():
            if start <= address < start + max(len(block), 1):
                if found != kind:
                    raise Misuse(f"{found} memory at {address:#x} was used as {kind} memory")
                if kind == "device" and device != self.index:
                    raise Misuse(f"memory of device {device} at {address:#x} was used on device {self.index}")
                if address + size > start + len(block):
                    raise Misuse(f"{size} bytes at {address:#x} go beyond an allocation of {len(block)}")
                return block[address - start : address - start + size]
        raise Misuse(f"{address:#x} is not allocated, or not any more")

    @_taking_turns
    def copy(self, target: int, source: int, size: int, direction: Direction, stream: int) -> None:
        self._call("copy", allowed_in_capture=True)
        read, written = _KINDS[direction]
        self.view(source, size, read), self.view(target, size, written)

        def work() -> None:
            self.view(target, size, written)[:] = self.view(source, size, read)
            self.crossed[direction] += size

        self._ask(stream, work)

    @_taking_turns
    def reaches(self, index: int) -> bool:
        return self.machine.peers and index != self.index

    @_taking_turns
    def copy_peer(self, target: int, source: int, size: int, index: int, stream: int) -> None:
        self._call("copy_peer", allowed_in_capture=True)
        if not self.machine.peers:
            raise Misuse(f"device {self.index} does not reach device {index}")
        other = self.machine.devices[index]
        other.view(source, size), self.view(target, size)

        def work() -> None:
            self.view(target, size)[:] = other.view(source, size)
            self.crossed["from peer"] += size

        self._ask(stream, work)

    @_taking_turns
    def fill(self, address: int, byte: int, size: int, stream: int) -> None:
        self._call("fill", allowed_in_capture=True)
        self._ask(stream, lambda: self.view(address, size).fill(byte))

    # Streams and events.

    @_taking_turns
    def stream(self, *, first: bool) -> int:
        self._call("stream")
        return self._new(self.machine.streams, _Stream(self.index, first=first))

    @_taking_turns
    def destroy_stream(self, stream: int) -> None:
        self._stream(stream)
        self._when_done(lambda: self.machine.streams.pop(stream))  # type: ignore[arg-type]

    @_taking_turns
    def synchronize(self, stream: int) -> None:
        self._call("synchronize")
        self._run(self._stream(stream))

    @_taking_turns
    def event(self) -> int:
        self._call("event")
        return self._new(self.machine.events, _Event(self.index))

    @_taking_turns
    def destroy_event(self, event: int) -> None:
        self._event(event)
        del self.machine.events[event]

    @_taking_turns
    def record(self, event: int, stream: int) -> None:
        found, lane = self._event(event), self._stream(stream)
        if found.device != self.index:
            raise Misuse(f"an event of device {found.device} was recorded on device {self.index}")
        found.in_capture = lane.captured is not None
        # What waited for the event as it was recorded before goes on waiting for that.
        self.machine.events[event] = fresh = _Event(self.index, lane, done=False)
        fresh.in_capture = found.in_capture
        self._ask(stream, lambda: setattr(fresh, "done", True))

    @_taking_turns
    def wait(self, stream: int, event: int) -> None:
        found = self._event(event)
        self._ask(stream, lambda: self._until(found))

    @_taking_turns
    def wait_on_host(self, event: int) -> None:
        self._call("wait_on_host")
        found = self._event(event)
        if found.in_capture:
            raise Misuse("the event was recorded during a capture: it cannot be waited for")
        self._until(found)

    # Graphs.

    @_taking_turns
    def begin_capture(self, stream: int) -> None:
        self._call("begin_capture")
        self._stream(stream).captured = []

    @_taking_turns
    def end_capture(self, stream: int) -> int:
        found = self._stream(stream)
        recorded, found.captured = found.captured, None
        assert recorded is not None, "no capture was begun"
        self._call("end_capture")
        return self._new(self._graphs, recorded)

    @_taking_turns
    def abandon_capture(self, stream: int) -> None:
        self._stream(stream).captured = None

    @_taking_turns
    def launch(self, graph: int, stream: int) -> None:
        self._call("launch")
        if graph not in self._graphs:
            raise Misuse("a graph that is not there was launched")
        for work in self._graphs[graph]:
            self._ask(stream, work)

    @_taking_turns
    def destroy_graph(self, graph: int) -> None:
        del self._graphs[graph]

    # Our kernels: what they are to do, written down once more.

    step_kernels = True

    @_taking_turns
    def update(self, updates: int, count: int, stream: int) -> None:
        self._call("update", allowed_in_capture=True)

        def work() -> None:
            for where, what in self.view(updates, 16 * count).view(np.uint64).reshape(count, 2).tolist():
                target = self.view(where & ~1, 8)
                target[:] = self.view(what, 8) if where & 1 else np.array([what], np.uint64).view(np.uint8)

        self._ask(stream, work)

    @_taking_turns
    def choose(self, choices: int, count: int, values: int, ids: int, n: int, stream: int) -> None:
        self._call("choose", allowed_in_capture=True)

        def work() -> None:
            given = self.view(choices, 56 * count)
            numbers, parameters = given.view(np.int64).reshape(count, 7), given.view(np.float64).reshape(count, 7)
            for (target, branch, top_k, *_), (*_, temperature, top_p, min_p, uniform) in zip(
                numbers.tolist(), parameters.tolist(), strict=True
            ):
                own = self.view(values + 4 * n * branch, 4 * n).view(np.float32)[: min(top_k, n)].astype(np.float64)
                place = 0
                if temperature:
                    weights = np.exp(own / temperature - own[0] / temperature)
                    weights /= weights.sum()
                    if top_p:
                        weights = weights[: int(np.searchsorted(np.cumsum(weights), top_p)) + 1]
                    if min_p:
                        weights = weights[weights >= min_p * weights[0]]
                    mass = np.cumsum(weights)
                    place = int(np.searchsorted(mass, uniform * mass[-1], side="right"))
                self.view(target, 8)[:] = self.view(ids + 8 * (n * branch + place), 8)

        self._ask(stream, work)

    @property
    def graphs(self) -> int:
        """Graphs that are alive."""
        return len(self._graphs)

    @_taking_turns
    def ask(self, stream: int, work: Work) -> None:
        """What an engine asks of a stream."""
        self._ask(stream, work)

    # Within.

    def _call(self, name: str, *, allowed_in_capture: bool = False) -> None:
        self.calls[name] += 1
        self.machine.thread.device = self.index  # as `CudaRuntime` sets it before each call
        if name in self.fail:
            raise self.fail[name]
        capturing = any(stream.captured is not None for stream in self.machine.streams.values())
        if not allowed_in_capture and name != "begin_capture" and capturing:
            raise CudaError("cudaErrorStreamCaptureUnsupported", f"{name} was called during a capture")

    def _allocate(self, kind: str, size: int) -> int:
        if size < 1:
            raise Misuse(f"{size} bytes were asked for")
        if kind == "device":
            if self.used + size > self.memory:
                message = f"CUDA is out of memory ({size} bytes)"
                raise DeviceMemoryError("cudaErrorMemoryAllocation", message, asked=size, free=self.memory - self.used)
            self.used += size
        block = np.full(size + 256, 0xCD, np.uint8)  # what was not written is not zero
        skipped = -block.ctypes.data % 256
        block = block[skipped : skipped + size]
        self.machine.blocks[block.ctypes.data] = (kind, block, self.index)
        return int(block.ctypes.data)

    def _release(self, kind: str, address: int) -> None:
        found, _, device = self.machine.blocks.get(address, ("", None, self.index))
        if found != kind:
            raise Misuse(f"{address:#x} was freed, which is no {kind} memory, or not any more")
        if device != self.index:
            raise Misuse(f"memory of device {device} at {address:#x} was freed on device {self.index}")
        _, block, _ = self.machine.blocks.pop(address)
        if kind == "device":
            self.used -= len(block)

    def _ask(self, stream: int, work: Work) -> None:
        found = self._stream(stream)
        (found.queue if found.captured is None else found.captured).append(work)

    def _stream(self, handle: int) -> _Stream:
        if handle not in self.machine.streams:
            raise Misuse("a stream that is not there was used")
        found = self.machine.streams[handle]
        if found.device != self.index:
            raise Misuse(f"a stream of device {found.device} was used on device {self.index}")
        return found

    def _event(self, handle: int) -> _Event:
        if handle not in self.machine.events:
            raise Misuse("an event that is not there was used")
        return self.machine.events[handle]

    def _until(self, event: _Event) -> None:
        while not event.done:
            assert event.stream is not None
            assert event.stream.queue, "an event that never comes"
            self._perform(event.stream)

    def _run(self, stream: _Stream) -> None:
        while stream.queue:
            self._perform(stream)

    def _perform(self, stream: _Stream) -> None:
        """The next piece of work of a stream, and then what was to wait for it."""
        machine, work = self.machine, stream.queue.pop(0)
        machine.working += 1
        try:
            work()
        finally:
            machine.working -= 1
        while machine.postponed and not machine.working:
            self._when_done(machine.postponed.pop(0))

    def _when_done(self, last: Work) -> None:
        """Does all that the streams were asked, then `last`; in the middle of a piece of work, once that is finished."""
        if self.machine.working:
            self.machine.postponed.append(last)
            return
        for stream in list(self.machine.streams.values()):
            if stream.device == self.index:
                self._run(stream)
        last()

    def _new(self, kind: dict, value: object) -> int:  # type: ignore[type-arg]
        self.machine.handles += 1
        kind[self.machine.handles] = value
        return self.machine.handles
