"""A decoder in parts on engines: the same tokens, each part's step one graph, and hidden states that never leave the device. All fakes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from engine_steps import decode, request, same, submitted, until_prefilled
from fake_gpu import LIMITS, add_engines

import flamingo_export
from flamingo_export.backends.tensorrt.session import MAX_GRAPHS
from flamingo_export.errors import InputError
from flamingo_export.precision import Precision, StorageType
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Request
from flamingo_export.sources import LiveSource

Load = Callable[..., tuple[Model, Model]]


@pytest.fixture
def both(gpu, tiny_model, bundle_writer, tmp_path) -> Iterator[Load]:
    """The tiny model: its parts on engines, the whole decoder on ONNX Runtime."""
    with ExitStack() as stack:

        def load(parts: int, storage: StorageType = "fp32") -> tuple[Model, Model]:
            source, precision = LiveSource(tiny_model), Precision(storage=storage)
            cut = bundle_writer(source, tmp_path / f"cut-{parts}.bundle", parts=parts, precision=precision)
            engines = add_engines(cut, tmp_path / f"engines-{parts}.bundle", **LIMITS)
            whole = bundle_writer(source, tmp_path / f"whole-{parts}.bundle", precision=precision)
            opened = [
                flamingo_export.load(bundle, backend=name, threads=1)
                for bundle, name in ((engines, "tensorrt-rtx"), (whole, "onnxruntime"))
            ]
            for model in opened:
                stack.enter_context(model)
            return opened[0], opened[1]

        yield load


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 1},
        {"beams": 3, "num_return": 3},
        {"beams": 6},  # wider than the profile of steps, and more candidates than the engine finds
        {"temperature": 0.7, "top_k": 4, "seed": 6, "num_return": 3},
        {"temperature": 1.0, "seed": 5, "num_return": 2},
    ],
)
def test_the_same_tokens_as_the_whole_on_onnxruntime(both: Load, parts, settings):
    engines, host = both(parts)
    for seed, length, media in ((0, 9, 1), (1, 40, 5), (2, 3, 0)):
        asked = request(seed, length, media)
        same(engines.generate(asked, max_new_tokens=8, **settings), host.generate(asked, max_new_tokens=8, **settings))


@pytest.mark.parametrize("parts", [2, 3])
def test_several_requests_a_second_question_and_scores(both: Load, parts):
    engines, host = both(parts)
    assert dict(engines.engines.decoder.largest) == {"B": 3, "S": 16, "M": 8, "N": 8, "K": 16, "C": 96}
    requests = [request(10 + seed, 5 + 7 * seed, seed % 3) for seed in range(7)]
    for beams in (1, 3):
        found, expected = (model.generate(requests, beams=beams, max_new_tokens=6, batch_size=8) for model in (engines, host))
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    first = request(20, 30, 3)
    second = Request(prompt=[*first.prompt, 20, 21], media=first.media)
    for asked in (first, second, second):
        mine, other = (model.generate(asked, beams=3, max_new_tokens=5) for model in (engines, host))
        same(mine, other)
        assert mine.timings.reused_tokens == other.timings.reused_tokens
    candidates = [[5], [6, 7, 8], list(range(10, 26)), [9, 2]]
    for score, wanted in zip(engines.score(first, candidates), host.score(first, candidates), strict=True):
        np.testing.assert_allclose(score.token_logprobs, wanted.token_logprobs, atol=1e-4)
    with pytest.raises(InputError, match="17 beams or samples of a request were asked for, the engine takes 16"):
        engines.generate(request(60, 5, 0), beams=17)


def test_parts_in_16_bits(both: Load):
    """Hidden states pass in the engines' type; against the same weights in fp32."""
    engines, host = both(3, "fp16")
    asked = request(70, 20, 2)
    found, expected = (model.score(asked, [[5, 6, 7], [30, 2]]) for model in (engines, host))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=2e-2)


def test_a_step_is_a_graph_a_part_one_wait_and_no_hidden_state_on_the_host(both: Load, gpu):
    engines, _ = both(3)
    lm = engines.config.language_model
    for width in (1, 3):
        loop = submitted(engines, request(80 + width, 30, 2), width)
        decode(loop, 3)  # run, run, captured
        before, calls, enqueued = gpu.cuda.crossed.copy(), gpu.cuda.calls.copy(), gpu.trt.enqueued
        steps = 4
        decode(loop, steps)
        moved, called = gpu.cuda.crossed - before, gpu.cuda.calls - calls
        # In each part positions and the write index, in two of them phi and rows, in one tokens, in one logit positions; each in a place of 256
        # bytes. Of mask and key positions what differs, 16 bytes for 8: own slots, and what parents see, of beams that change places.
        small = steps * 256 * (3 * 2 + 2 * 2 + 2)
        assert small < moved["to device"] <= small + steps * 3 * 16 * (2 * width + 2 * width * width)
        assert moved["to host"] == steps * width * ((LIMITS["beams"] + 1) * (4 + 8) + 4)
        assert moved["on device"] == 0
        assert moved["to host"] / steps < 4 * width * lm.width
        assert (called["launch"], called["synchronize"], gpu.trt.enqueued) == (3 * steps, steps, enqueued)
        loop.abandon(None)


def test_prefill_in_chunks_moves_no_hidden_state_and_no_logits(both: Load, gpu):
    engines, _ = both(2)
    asked = request(90, 40, 0)  # chunks of 16, 16 and 8
    before = gpu.cuda.crossed.copy()
    until_prefilled(submitted(engines, asked, 2))
    moved = gpu.cuda.crossed - before
    assert moved["to host"] == (LIMITS["beams"] + 1) * (4 + 8) + 4
    assert moved["on device"] == 0


@pytest.mark.slow
def test_hidden_states_lie_in_one_place_whatever_the_shape(both: Load, gpu):
    engines, _ = both(2)
    decoder: Any = engines.engines.decoder
    ((hidden, read),) = decoder._hidden
    assert read is hidden
    lm = engines.config.language_model
    assert hidden.shape == (3, 16, lm.width)
    first, last = decoder._parts
    for seed, length in ((0, 3), (1, 20), (2, 40)):
        engines.generate(request(seed, length, 0), beams=2, max_new_tokens=3)
        assert decoder._hidden == [(hidden, hidden)]
        assert first._bound["hidden_out"] is last._bound["hidden"]
        assert first._bound["hidden_out"].address == hidden.address
    assert first._stream is last._stream  # one stream: what the second part reads the first has written


@pytest.mark.slow
def test_graphs_of_many_shapes_go_one_after_the_other(both: Load, gpu):
    """Batches of 1 to 3 rows and 1 to 4 beams, several steps each: captured, dropped and captured again without a wrong token."""
    engines, host = both(2)
    for _ in range(2):
        for rows in (1, 2, 3):
            for beams in (1, 2, 3, 4):
                asked = [request(200 + row, 4 + row, 0) for row in range(rows)]
                found, expected = (model.generate(asked, beams=beams, max_new_tokens=5) for model in (engines, host))
                for one, other in zip(found, expected, strict=True):
                    same(one, other)
    assert gpu.cuda.graphs <= 2 * MAX_GRAPHS


def test_where_capture_fails_every_part_is_run_all_the_same(both: Load, gpu, caplog):
    engines, host = both(2)
    gpu.trt.refuse_capture = True
    asked = request(100, 12, 1)
    same(engines.generate(asked, beams=3, max_new_tokens=6), host.generate(asked, beams=3, max_new_tokens=6))
    said = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert [text.split(":")[0] for text in said] == ["decoder.0", "decoder.1"]


def test_closing_gives_everything_back(gpu, tiny_model, bundle_writer, tmp_path):
    bundle = add_engines(bundle_writer(LiveSource(tiny_model), tmp_path / "a.bundle", parts=3), tmp_path / "b.bundle", **LIMITS)
    with flamingo_export.load(bundle, backend="tensorrt-rtx") as model:
        model.generate(request(110, 12, 2), beams=3, max_new_tokens=6)
        assert gpu.cuda.used
        assert gpu.cuda.graphs
    del model
    gc.collect()
    assert (gpu.cuda.used, gpu.cuda.graphs) == (0, 0)


def test_an_engine_of_a_part_that_is_missing_is_named_and_fallback_runs_the_parts(gpu, tiny_model, bundle_writer, tmp_path):
    import msgspec

    from flamingo_export.bundle.manifest import read_manifest, write_manifest
    from flamingo_export.errors import IncompatibleEngine

    bundle = add_engines(bundle_writer(LiveSource(tiny_model), tmp_path / "a.bundle", parts=2), tmp_path / "b.bundle", **LIMITS)
    manifest = read_manifest(bundle)
    kept = tuple(engine for engine in manifest.engines if engine.graph != "decoder.1")
    write_manifest(bundle, msgspec.structs.replace(manifest, engines=kept))
    with pytest.raises(IncompatibleEngine, match=r"no tensorrt-rtx engine of decoder\.1 .* --parts 2 "):
        flamingo_export.load(bundle, backend="tensorrt-rtx")
    gc.collect()
    assert gpu.cuda.used == 0
    with flamingo_export.load(bundle, backend="tensorrt-rtx", fallback="onnxruntime") as model:
        assert model.backend.name == "onnxruntime"
        assert model.generate(request(120, 12, 1), max_new_tokens=3).token_ids


def test_an_output_that_is_bound(both: Load):
    """Its buffer must have the shape of the call; results do not have it."""
    engines, _ = both(2)
    engines.generate(request(130, 5, 1), beams=1, max_new_tokens=2)
    decoder: Any = engines.engines.decoder
    first, last = decoder._parts
    width, capacity = engines.config.language_model.width, engines.manifest.limits.max_length
    ones = np.zeros((1, 2), np.int64)
    feeds = {
        "token_ids": ones, "positions": ones, "media_rows": ones[:, :1], "phi": ones, "write_index": ones[0, :1],
        "mask": (np.arange(capacity) < 2) & np.ones((1, 1, 2, 1), np.bool_), "key_positions": np.arange(capacity)[None],
    }  # fmt: skip
    with pytest.raises(InputError, match=r"hidden_out is bound to a buffer of shape \(1, 1, \d+\)"):
        first.compute(feeds)
    buffer = last.allocate("hidden", (4, 2, width))
    first.bind("hidden_out", buffer.view((1, 2, width)))
    assert first.run(feeds) == {}
    assert np.abs(buffer.read()[0]).max() > 0.1
    assert not buffer.read()[1:].any()
    with pytest.raises(InputError, match="no room for the shape"):
        buffer.view((5, 2, width))
    with pytest.raises(InputError, match=r"present_k\.0 is not an input, nor an output with memory of its own"):
        first.bind("present_k.0", buffer)
