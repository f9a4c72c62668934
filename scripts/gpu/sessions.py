"""Sessions, streams, buffers and graphs of the CUDA runtime, with the phi kernel and a copy into a cache in the place of an engine.

    q, media_rows, phi (fed) ──> kernel ──> y            results against the fp64 oracle, by the kernels' own rule
    bank K, V (bound)        ──┘
    q's first position ──────> past_k.0, slot 0          in place: input and output share a buffer

Each check returns how many cases it tried; what is wrong raises AssertionError with what was found.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flamingo_export.backends.tensorrt.device_memory import DeviceBuffer, DeviceStream, DeviceTensor, Memory
from flamingo_export.backends.tensorrt.dtypes import encode
from flamingo_export.backends.tensorrt.engine_contract import Contract
from flamingo_export.backends.tensorrt.lowering.shapes import Bounds, Profile
from flamingo_export.backends.tensorrt.session import CAPTURED_AT, MAX_GRAPHS, TensorRTSession
from flamingo_export.backends.tensorrt.step_kernels import CHOICE, UPDATE
from flamingo_export.specs import SubgraphSpec, TensorSpec
from gpu import kernel_cases
from gpu.kernel_library import arguments
from gpu.torch_backend import Card, Engine

ROWS, LATENTS, HEADS, CAPACITY, BATCH, MEDIA = 6, 64, 2, 8, 4, 3
Launch = Callable[[Any, int], None]


def contract(head_size: int) -> Contract:
    """Of the kernel as an engine, with the profiles of a decoder: only steps of the second are captured."""
    bank: tuple[Any, ...] = ("N", HEADS, LATENTS, head_size)
    cache: tuple[Any, ...] = ("B", HEADS, "C", head_size)
    spec = SubgraphSpec(
        name="phi kernel",
        inputs=(
            TensorSpec("q", "float", ("B", "S", HEADS, head_size)),
            TensorSpec("media_rows", "int64", ("B", "M")),
            TensorSpec("phi", "int64", ("B", "S")),
            TensorSpec("media_k.0", "float", bank),
            TensorSpec("media_v.0", "float", bank),
            TensorSpec("past_k.0", "float", cache),
        ),
        outputs=(TensorSpec("y", "float", ("B", "S", HEADS, head_size)), TensorSpec("present_k.0", "float", cache)),
        aliases={"present_k.0": "past_k.0"},
    )
    shared = {"B": Bounds(1, 1, BATCH), "N": Bounds(1, ROWS, ROWS)}
    profiles = (
        Profile(name="prefill", bounds={**shared, "S": Bounds(1, 64, 128), "M": Bounds(1, 1, MEDIA)}),
        Profile(name="decode", bounds={**shared, "S": Bounds(1, 3, 16), "M": Bounds(1, 1, 1)}),
    )
    return Contract(spec=spec, profiles=profiles, capacity=CAPACITY, compute="fp16", offered=spec)


@dataclass
class Rig:
    """A session on the kernel, its bank and cache, and a copy on the host of what the bank holds."""

    card: Card
    launch: Launch
    head_size: int = 64
    seed: int = 0
    streams: tuple[DeviceStream, DeviceStream] = field(init=False)
    session: TensorRTSession = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.streams = DeviceStream(self.card.cuda, first=True), DeviceStream(self.card.cuda, first=False)
        agreed = contract(self.head_size)
        self.engine = Engine(self.card, self.streams[0], agreed, self._compute)
        self.session = TensorRTSession(self.engine, agreed, asynchronous=False)
        self.held: dict[str, np.ndarray[Any, Any]] = {}
        self.bank: dict[str, DeviceBuffer] = {}
        for name in ("media_k.0", "media_v.0"):
            self.bank[name] = self.session.allocate(name, (ROWS, HEADS, LATENTS, self.head_size))
            self.held[name] = np.zeros((ROWS, HEADS, LATENTS, self.head_size), np.float16)
            self.session.bind(name, self.bank[name])
        self.cache = self.session.allocate("past_k.0", (BATCH, HEADS, CAPACITY, self.head_size))
        for row in range(ROWS):
            self.write_bank(row)

    def _compute(self, tensors: dict[str, Tensor], stream: int) -> None:
        q, phi, rows = tensors["q"], tensors["phi"], tensors["media_rows"]
        self.launch(arguments(q, tensors["media_k.0"], tensors["media_v.0"], rows, phi, tensors["y"]), stream)
        tensors["past_k.0"][:, :, 0].copy_(q[:, 0])

    def write_bank(self, row: int, stream: DeviceStream | None = None) -> None:
        """Fresh keys and values in a row: from the host, or as a tensor that another stream has."""
        for name, buffer in self.bank.items():
            value = self.random.standard_normal(self.held[name].shape[1:]).astype(np.float16)
            self.held[name][row] = value
            if stream is None:
                buffer.write(row, value)
                continue
            tensor = DeviceTensor.empty(stream, value.shape, buffer.element)
            stored = np.empty(value.shape, np.float16)
            encode(value, stored, buffer.element)
            stream.upload(tensor.address, stored.reshape(-1).view(np.uint8))
            buffer.write(row, tensor)
            buffer.publish()

    def feeds(self, batch: int, positions: int, media: int = 1) -> dict[str, np.ndarray[Any, Any]]:
        return {
            "q": self.random.standard_normal((batch, positions, HEADS, self.head_size)).astype(np.float16),
            "media_rows": self.random.integers(0, ROWS, (batch, media)),
            "phi": np.sort(self.random.integers(0, media + 1, (batch, positions)), axis=1),
        }

    def check(self, feeds: dict[str, np.ndarray[Any, Any]], y: np.ndarray[Any, Any], first: int = 0) -> None:
        """The result and the cache's first slot. Raises AssertionError."""
        given = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in ("q", "media_rows", "phi")]
        bank = [torch.from_numpy(self.held[name]) for name in ("media_k.0", "media_v.0")]
        kernel_cases.compare(kernel_cases.Inputs(given[0], *bank, *given[1:], None, None), torch.from_numpy(y))  # type: ignore[call-arg]
        batch = len(feeds["q"])
        written = self.cache.rows(first, batch).read()[:, :, 0]
        assert np.array_equal(written, feeds["q"][:, 0].astype(np.float32)), "the cache does not hold what was copied into it"

    def step(self, batch: int, positions: int, media: int = 1, *, first: int = 0) -> None:
        """One call of rows `first` on with fresh inputs, checked."""
        self.session.bind("past_k.0", self.cache.rows(first, batch))
        feeds = self.feeds(batch, positions, media)
        self.check(feeds, self.session.run(feeds)["y"].astype(np.float16), first)

    def graphs(self) -> int:
        """Captured graphs that the session holds."""
        return len(self.session._steps)


def shapes(rig: Rig) -> int:
    """Prefills and steps of several shapes, each once: nothing is captured yet."""
    sizes = [(1, 1, 1), (1, 17, 2), (3, 70, 3), (BATCH, 128, 1), (2, 16, 1), (1, 3, 1)]
    for batch, positions, media in sizes:
        rig.step(batch, positions, media)
    return len(sizes)


def capture(rig: Rig) -> int:
    """A step's shape that comes again is captured, and its graph gives the results of fresh inputs, of a changed bank too."""
    before = rig.graphs()
    for _ in range(CAPTURED_AT):
        rig.step(2, 3)
    assert rig.graphs() == before + 1, f"{rig.graphs() - before} graphs after a shape came {CAPTURED_AT} times, expected 1"
    enqueued = rig.engine.enqueued
    for row in range(ROWS):
        rig.step(2, 3)
        rig.write_bank(row)
    assert rig.engine.enqueued == enqueued, "a captured shape was enqueued again, not launched"
    return CAPTURED_AT + ROWS


def joins(rig: Rig) -> int:
    """Rows that come and go between steps: a request is prefilled in a row of its own, the batch grows and shrinks, and the graph of the rows
    that were there before is still launched."""
    for _ in range(CAPTURED_AT):
        rig.step(2, 3)
    enqueued, graphs = rig.engine.enqueued, rig.graphs()
    for _ in range(3):
        rig.step(1, 20, 2, first=2)  # the prompt of the one that joins
        rig.step(3, 3)
        rig.step(2, 3)
    fresh = rig.engine.enqueued - enqueued
    assert fresh <= 3 + CAPTURED_AT + 1, f"{fresh} calls were enqueued, the two rows' steps among them"
    assert rig.graphs() >= graphs, "a join dropped a graph"
    return CAPTURED_AT + 9


def many_graphs(rig: Rig) -> int:
    """More shapes than graphs are kept: the oldest go, and each shape goes on giving right results."""
    sizes = [(batch, positions) for batch in range(1, BATCH + 1) for positions in range(1, 7)]
    for batch, positions in sizes:
        for _ in range(CAPTURED_AT + 1):  # run, captured, launched
            rig.step(batch, positions)
    assert len(rig.session._steps) <= MAX_GRAPHS < len(sizes), f"{len(rig.session._steps)} graphs are kept"
    assert rig.graphs() == MAX_GRAPHS, f"{rig.graphs()} graphs of {MAX_GRAPHS} shapes"
    enqueued = rig.engine.enqueued
    for batch, positions in sizes[-MAX_GRAPHS:]:
        rig.step(batch, positions)
    assert rig.engine.enqueued == enqueued, "a graph that is kept was not launched"
    rig.step(*sizes[0])  # one that went
    return (CAPTURED_AT + 1) * len(sizes) + MAX_GRAPHS + 1


def other_stream(rig: Rig) -> int:
    """Rows of the bank that the other stream wrote are seen by the steps that follow, replayed ones too."""
    for row in range(ROWS):
        rig.write_bank(row, rig.streams[1])
        rig.step(2, 3)
    return ROWS


def rows(rig: Rig) -> int:
    """A buffer that grows keeps its rows; leading rows share its memory."""
    small = rig.session.allocate("past_k.0", (2, HEADS, CAPACITY, rig.head_size))
    values = rig.random.standard_normal((2, HEADS, CAPACITY, rig.head_size)).astype(np.float16)
    for row in range(2):
        small.write(row, values[row])
    grown = rig.session.allocate("past_k.0", (BATCH, HEADS, CAPACITY, rig.head_size))
    grown.copy_from(small)
    assert np.array_equal(grown.rows(0, 2).read(), values.astype(np.float32)), "rows were lost while a buffer grew"
    assert not grown.read()[2:].any(), "fresh rows are not zero"
    grown.rows(2, 2).write(1, values[1])
    assert np.array_equal(grown.read()[3], values[1].astype(np.float32)), "rows do not share memory"
    grown.rows(2, 1).copy_from(grown.rows(0, 1))
    assert np.array_equal(grown.read()[2], values[0].astype(np.float32)), "a row was not copied to another"
    before = rig.cache.read()
    rig.session.bind("past_k.0", rig.cache.rows(1, 2))
    feeds = rig.feeds(2, 3)
    rig.session.run(feeds)
    after = rig.cache.read()
    assert np.array_equal(after[1:3, :, 0], feeds["q"][:, 0].astype(np.float32)), (
        "a call did not write the rows that it was given"
    )
    after[1:3, :, 0] = before[1:3, :, 0]
    assert np.array_equal(after, before), "a call wrote other rows than it was given"
    return 6


def dlpack(rig: Rig) -> int:
    """Results go to PyTorch and PyTorch's tensors come in, without a copy and in the order of the streams."""
    rig.session.bind("past_k.0", rig.cache.rows(0, 2))
    for _ in range(3):
        feeds = rig.feeds(2, 3)
        given: dict[str, Any] = dict(feeds)
        given["q"] = rig.card.foreign(feeds["q"])
        y = torch.from_dlpack(rig.session.compute(given)["y"])  # type: ignore[attr-defined]
        assert y.device.type == rig.card.device.type, f"the result is on {y.device}"
        rig.check(feeds, y.cpu().numpy())
    return 3


def memory(rig: Rig) -> int:
    """What a closed session and dropped buffers had is free again."""
    cuda = rig.card.cuda
    gc.collect()
    for stream in rig.streams:
        cuda.synchronize(stream.handle)  # what was given back in the order of a stream is free now
    before = cuda.free_memory()[0]
    for _ in range(3):
        buffer = rig.session.allocate("media_k.0", (1 << 14, HEADS, LATENTS, rig.head_size))
        taken = before - cuda.free_memory()[0]
        assert taken >= buffer.nbytes, f"{buffer.nbytes} bytes were allocated, {taken} are gone"
        del buffer
    left = before - cuda.free_memory()[0]
    assert left < 1 << 22, f"{left} bytes are not given back"
    return 3


def step_kernels(rig: Rig) -> int:
    """The two kernels of a decoding step, as the driver compiled them: eight bytes given and copied, tokens likeliest and drawn."""
    cuda, stream = rig.card.cuda, rig.streams[0]
    assert cuda.step_kernels, "the driver did not take step.ptx: its log says why"
    memory = Memory(stream, 4096)
    words = np.arange(512, dtype=np.uint64)
    updates = np.zeros(2, UPDATE)
    updates["where"] = [memory.address + 8 * 5, (memory.address + 8 * 6) | 1]
    updates["what"] = [1 << 63, memory.address + 8 * 9]
    given = Memory(stream, updates.nbytes)
    stream.upload(memory.address, words.view(np.uint8))
    stream.upload(given.address, updates.view(np.uint8))
    cuda.update(given.address, 2, stream.handle)
    words[5], words[6] = 1 << 63, 9
    assert np.array_equal(stream.download(memory.address, 4096).view(np.uint64), words), "updates did not change what they name"
    values, ids = np.tile(np.array([3, 2, 1], np.float32), 2), np.array([7, 8, 9, 17, 18, 19])
    choices = np.zeros(3, CHOICE)
    choices["target"] = memory.address + 8 * np.arange(3)
    choices["branch"], choices["top_k"], choices["temperature"] = [0, 1, 1], 3, [0, 1, 1]
    choices["uniform"] = [0.9, 0.0, 0.9999]
    places = [Memory(stream, each.nbytes) for each in (choices, values, ids)]
    for place, each in zip(places, (choices, values, ids), strict=True):
        stream.upload(place.address, each.view(np.uint8))
    cuda.choose(places[0].address, 3, places[1].address, places[2].address, 3, stream.handle)
    found = stream.download(memory.address, 24).view(np.int64).tolist()
    assert found == [7, 17, 19], f"tokens {found} were chosen, expected the likeliest, the first and the last"
    return 5


def overlap(rig: Rig, size: int) -> dict[str, float]:
    """Milliseconds of steps on the first stream, of copies of `size` bytes on the other one, and of both at once, as the host sees them."""
    cuda, (first, second) = rig.card.cuda, rig.streams
    source, target = (DeviceTensor.empty(second, (size,), _BYTES) for _ in range(2))

    def copies() -> None:
        for _ in range(40):
            cuda.copy(target.address, source.address, size, "on device", second.handle)

    def steps() -> None:
        for _ in range(20):
            rig.session.bind("past_k.0", rig.cache.rows(0, 2))
            rig.session.run(rig.feeds(2, 3))

    def both() -> None:
        copies()
        steps()

    def timed(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        cuda.synchronize(first.handle)
        cuda.synchronize(second.handle)
        return round((time.perf_counter() - started) * 1e3, 2)

    for work in (steps, copies):
        work()
    cuda.synchronize(second.handle)
    return {"steps_ms": timed(steps), "copies_ms": timed(copies), "both_ms": timed(both)}


class _Bytes:
    """One byte an element; enough of an ElementType for memory that nobody reads as numbers."""

    size, storage = 1, np.dtype(np.uint8)


_BYTES: Any = _Bytes()
CHECKS: dict[str, Callable[[Rig], int]] = {
    "shapes": shapes,
    "capture and replay": capture,
    "joins": joins,
    "many graphs": many_graphs,
    "rows written by the other stream": other_stream,
    "row ranges": rows,
    "dlpack": dlpack,
    "memory": memory,
    "step kernels": step_kernels,
}


def run(card: Card, launch: Launch, *, head_size: int = 64, seed: int = 0, copied: int = 256 << 20) -> dict[str, Any]:
    """All checks. Returns cases and failures of each, and the times of overlapping work. copied: bytes of a copy there."""
    rig = Rig(card, launch, head_size, seed)
    result: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            result[name] = {"cases": check(rig), "failures": []}
        except AssertionError as error:
            result[name] = {"cases": 0, "failures": [f"{name}: {error}"]}
    result["overlap"] = overlap(rig, copied)
    rig.session.close()
    return result
