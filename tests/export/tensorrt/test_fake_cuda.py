"""The device in host memory does what it was asked in order, whenever Python's garbage collector runs."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
from fake_cuda import FakeCuda, Misuse


class Freed:
    """Frees memory when it goes, as tensors do."""

    def __init__(self, cuda: FakeCuda, *, kind: str = "free") -> None:
        address = cuda.malloc(64) if kind == "free" else cuda.malloc_host(64)
        weakref.finalize(self, getattr(cuda, kind), address)


def pipeline(cuda: FakeCuda, middle) -> tuple[int, np.ndarray]:
    """A stream that is asked to work something out and to bring it back, and where it comes to."""
    stream = cuda.stream(first=True)
    device, host = cuda.malloc(8), cuda.malloc_host(8)

    def work() -> None:
        middle()
        cuda.view(device, 8)[:] = 7

    cuda.ask(stream, work)
    cuda.copy(host, device, 8, "to host", stream)
    return stream, cuda.view(host, 8, "pinned")


@pytest.mark.parametrize("kind", ["free", "free_host"])
def test_what_is_freed_within_work_does_not_let_later_work_begin(kind):
    cuda = FakeCuda()
    held = [Freed(cuda, kind=kind)]
    stream, result = pipeline(cuda, held.clear)
    before = cuda.used, len(cuda.machine.blocks)
    cuda.synchronize(stream)
    assert result.tolist() == [7] * 8
    assert len(cuda.machine.blocks) == before[1] - 1
    assert cuda.used == before[0] - (64 if kind == "free" else 0)


def test_a_stream_that_goes_within_work_is_finished_first():
    cuda = FakeCuda()
    other = cuda.stream(first=False)
    done = []
    cuda.ask(other, lambda: done.append("other"))
    stream, result = pipeline(cuda, lambda: cuda.destroy_stream(other))
    cuda.synchronize(stream)
    assert result.tolist() == [7] * 8
    assert done == ["other"]
    with pytest.raises(Misuse, match="not there"):
        cuda.synchronize(other)


def test_what_is_freed_within_work_that_another_stream_waits_for():
    """The host waits for one stream, that one for another, in whose work the collector runs."""
    cuda = FakeCuda()
    held = [Freed(cuda)]
    stream, result = pipeline(cuda, held.clear)
    waiting, event = cuda.stream(first=True), cuda.event()
    cuda.record(event, stream)
    cuda.wait(waiting, event)
    cuda.synchronize(waiting)
    assert result.tolist() == [7] * 8


def test_work_does_not_ask_the_device_to_wait():
    cuda = FakeCuda()
    streams: list[int] = []
    stream, _ = pipeline(cuda, lambda: cuda.synchronize(streams[0]))
    streams.append(stream)
    with pytest.raises(Misuse, match="synchronize was called by what a stream was asked to do"):
        cuda.synchronize(stream)


def test_another_thread_that_frees_waits_for_work_that_has_begun():
    cuda = FakeCuda()
    begun, found = threading.Event(), []

    def frees() -> None:
        begun.wait()
        found.append(Freed(cuda))
        found.clear()

    other = threading.Thread(target=frees)

    def middle() -> None:
        begun.set()
        other.join(0.2)
        assert other.is_alive()

    stream, result = pipeline(cuda, middle)
    other.start()
    cuda.synchronize(stream)
    other.join()
    assert result.tolist() == [7] * 8
