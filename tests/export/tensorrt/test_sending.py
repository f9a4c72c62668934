"""Feeds that stay on the device: after each step it holds to the bit what the host would have sent whole, and less crosses the bus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from engine_steps import decode, request, submitted
from fake_gpu import LIMITS, add_engines

import flamingo_export
from flamingo_export.backends.tensorrt.device_memory import DeviceStream
from flamingo_export.backends.tensorrt.dtypes import ELEMENT_TYPES
from flamingo_export.backends.tensorrt.feeds import Feeds
from flamingo_export.backends.tensorrt.sending import Kept
from flamingo_export.errors import BackendError
from flamingo_export.runtime.model import Model


@pytest.fixture
def opened(gpu, tiny_bundle, tmp_path) -> Iterator[Callable[[], Model]]:
    with ExitStack() as stack:
        bundle = add_engines(tiny_bundle, tmp_path / "x.bundle", **LIMITS)
        yield lambda: stack.enter_context(flamingo_export.load(bundle, backend="tensorrt-rtx"))


@pytest.fixture
def watched(monkeypatch, gpu) -> list[str]:
    """Each large feed of a captured step is compared with what the device holds once the stream has come to it; their names."""
    seen: list[str] = []
    differing = Feeds.differing

    def and_look(self, sent, call, feeds, hand):
        differing(self, sent, call, feeds, hand)
        for name, kept in sent.kept.items():
            wanted = np.ascontiguousarray(feeds[name]).reshape(-1).view(np.uint8).copy()

            def look(address=kept.address, wanted=wanted, name=name) -> None:
                assert np.array_equal(gpu.cuda.view(address, len(wanted)), wanted), name
                seen.append(name)

            gpu.cuda.ask(self._stream.handle, look)

    monkeypatch.setattr(Feeds, "differing", and_look)
    return seen


def answers(model: Model) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Lone requests and batches that grow and shrink, of several widths."""
    requests = [request(200 + seed, 6 + 5 * seed, seed % 3) for seed in range(6)]
    found = [model.generate(requests[0], beams=3, max_new_tokens=9)]
    for settings in ({"beams": 1}, {"beams": 3}, {"beams": 4}, {"temperature": 1.0, "top_k": 3, "seed": 2, "num_return": 3}):
        found += model.generate(requests, max_new_tokens=9, batch_size=3, **settings)
    return [(one.token_ids, one.token_logprobs) for one in found]


def test_the_device_holds_what_would_be_sent_whole(opened, watched, gpu):
    """And answers are the same to the bit where there are no kernels and masks are sent whole."""
    by_changes = answers(opened())
    assert set(watched) == {"mask", "key_positions"}
    assert gpu.cuda.calls["update"]
    some = len(watched)
    gpu.cuda.step_kernels = False
    updates = gpu.cuda.calls["update"]
    assert answers(opened()) == by_changes
    assert len(watched) > some
    assert gpu.cuda.calls["update"] == updates


def test_a_request_that_joins_a_known_step_changes_its_rows_alone(opened, watched, gpu):
    """Another prompt in the same row: what differs is sent, or the whole where that is more than half."""
    model = opened()
    for seed, length in ((210, 30), (211, 9), (212, 31)):
        loop = submitted(model, request(seed, length, 1), 1)
        decode(loop, 5)
        loop.abandon(None)
    assert len(model.engines.decoder._steps) == 1
    assert len(watched) > 10


def test_after_a_failure_feeds_are_sent_whole(opened, watched, gpu, monkeypatch):
    model = opened()
    loop = submitted(model, request(220, 12, 1), 1)
    decode(loop, 4)
    monkeypatch.setattr(gpu.cuda, "update", lambda *rest: (_ for _ in ()).throw(BackendError("lost on its way")))
    before = loop.counts["failed"]
    while loop.counts["failed"] == before:
        assert loop.tick()
    monkeypatch.undo()
    loop = submitted(model, request(220, 12, 1), 1)
    decode(loop, 4)  # the same step, whose graph is still there
    loop.abandon(None)


@pytest.mark.parametrize("shape", [(1, 1, 1, 96), (3, 1, 2, 13), (1, 1, 1, 3)])
def test_what_differs_is_found_at_any_size(gpu, shape):
    """Also where the bytes are no whole number of words."""
    cuda = gpu.cuda
    stream, random = DeviceStream(cuda, first=True), np.random.default_rng(1)
    kept, value = Kept(stream, shape, ELEMENT_TYPES["bool"]), np.zeros(shape, np.bool_)
    assert kept.changes(value, 100) is None  # nothing is known of fresh memory
    cuda.view(kept.address, kept.nbytes)[:] = kept.whole
    for _ in range(20):
        value = value ^ (random.random(shape) < 0.02)
        changes = kept.changes(value, 100)
        if changes is None:
            cuda.view(kept.address, kept.nbytes)[:] = kept.whole
        else:
            for where, what in changes.tolist():
                cuda.view(where, 8)[:] = np.array([what], np.uint64).view(np.uint8)
        assert np.array_equal(cuda.view(kept.address, kept.nbytes).view(np.bool_).reshape(shape), value)
    assert len(kept.changes(value, 0)) == 0  # type: ignore[arg-type]
    assert kept.changes(~value, 0) is None
