"""The runtime on engines: the same tokens as on ONNX Runtime, and what crosses the bus meanwhile. The GPU and TensorRT are fakes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_steps import decode, pictures, request, submitted, until_prefilled
from fake_gpu import LIMITS, add_engines

import flamingo_export
from flamingo_export.errors import BackendError, InputError
from flamingo_export.precision import Precision
from flamingo_export.runtime.jobs import Group
from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.runtime.videos import Video
from flamingo_export.sources import LiveSource

Load = Callable[..., tuple[Model, Model]]


@pytest.fixture
def both(gpu, tiny_bundle, tmp_path) -> Iterator[Load]:
    """The tiny bundle on engines and on ONNX Runtime."""
    with ExitStack() as stack:
        numbers = iter(range(100))

        def load(bundle: Path = tiny_bundle, **limits: int) -> tuple[Model, Model]:
            made = add_engines(bundle, tmp_path / f"{next(numbers)}.bundle", **{**LIMITS, **limits})
            opened = [flamingo_export.load(made, backend=name, threads=1) for name in ("tensorrt-rtx", "onnxruntime")]
            for model in opened:
                stack.enter_context(model)
            return opened[0], opened[1]

        yield load


def same(found, expected, tolerance: float = 1e-4) -> None:
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, atol=tolerance)
    assert [other.token_ids for other in found.alternatives] == [other.token_ids for other in expected.alternatives]


@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 1},
        {"beams": 3, "num_return": 3},
        {"beams": 4, "length_penalty": 1.0},
        {"beams": 6},  # wider than the profile of steps, and more candidates than the engine finds
        {"temperature": 1.0, "seed": 5, "num_return": 2},
        {"temperature": 0.7, "top_k": 4, "seed": 6, "num_return": 3},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 7},
    ],
)
def test_the_same_tokens_as_onnxruntime(both: Load, settings):
    engines, host = both()
    for seed, length, media in ((0, 9, 1), (1, 40, 5), (2, 3, 0)):
        asked = request(seed, length, media)
        same(engines.generate(asked, max_new_tokens=8, **settings), host.generate(asked, max_new_tokens=8, **settings))


def test_batches_of_more_requests_than_an_engine_takes(both: Load, gpu):
    engines, host = both()
    requests = [request(10 + seed, 5 + 7 * seed, seed % 3) for seed in range(8)]
    for beams in (1, 3):
        for found, expected in zip(
            engines.generate(requests, beams=beams, max_new_tokens=6, batch_size=8),
            host.generate(requests, beams=beams, max_new_tokens=6, batch_size=8),
            strict=True,
        ):
            same(found, expected)


def test_a_second_question_and_a_stream(both: Load):
    engines, host = both()
    first = request(20, 30, 3)
    second = Request(prompt=[*first.prompt, 20, 21], media=first.media)
    for asked in (first, second, second):
        found, expected = (model.generate(asked, beams=3, max_new_tokens=5) for model in (engines, host))
        same(found, expected)
        assert (found.timings.reused_tokens, found.timings.media_reused) == (
            expected.timings.reused_tokens,
            expected.timings.media_reused,
        )


def test_videos_and_images_in_one_prompt(both: Load):
    engines, host = both()
    frames = pictures(30, 12)
    for count in (2, 3, 4, 9, 12):
        asked = Request(
            prompt=[1, 3, 10, 3, 11, 3, 12],
            media=[Video(source=frames[:count], num_frames=count), frames[0], Video(source=frames[-count:], num_frames=count)],
        )
        same(engines.generate(asked, beams=1, max_new_tokens=3), host.generate(asked, beams=1, max_new_tokens=3))
    too_long = Video(source=pictures(31, 13), num_frames=13)
    with pytest.raises(InputError, match="a video of 13 frames was given, the engines take 12"):
        engines.generate(Request(prompt=[1, 3, 4], media=[too_long]))


def test_one_image_shown_more_often_than_the_bank_has_rows(both: Load):
    engines, host = both(bank_rows=2)
    asked = Request(prompt=[1, *[3] * 14, 5], media=[*pictures(40, 2), *pictures(40, 2) * 6])
    same(engines.generate(asked, beams=2, max_new_tokens=4), host.generate(asked, beams=2, max_new_tokens=4))


def test_chunks_that_look_at_more_media_than_an_engine_takes_are_cut(both: Load):
    """Two requests side by side, whose chunks end at other positions; the first is all media."""
    engines, host = both(chunk_media=3)
    asked = [Request(prompt=[1, *[3] * 8, 5], media=pictures(41, 8)), request(42, 37, 5)]
    for found, expected in zip(*(model.generate(asked, beams=2, max_new_tokens=4) for model in (engines, host)), strict=True):
        same(found, expected)


def test_scores(both: Load):
    engines, host = both()
    asked = request(50, 20, 2)
    candidates = [[5], [6, 7, 8], list(range(10, 26)), [9, 2]]
    for found, expected in zip(engines.score(asked, candidates), host.score(asked, candidates), strict=True):
        np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, atol=1e-4)
    with pytest.raises(InputError, match="a candidate of 18 tokens was given, the engine takes 17"):
        engines.score(asked, [list(range(10, 28))])


def test_what_the_engine_cannot_take_is_refused_before_work(both: Load):
    engines, _ = both()
    with pytest.raises(InputError, match="17 beams or samples of a request were asked for, the engine takes 16"):
        engines.generate(request(60, 5, 0), beams=17)


@pytest.mark.parametrize("storage", ["fp16"])
def test_engines_in_16_bits(both: Load, tiny_model, bundle_writer, tmp_path, storage):
    """Against the same weights in fp32: tokens may part where two are nearly equal, so the first logits are compared."""
    bundle = bundle_writer(LiveSource(tiny_model), tmp_path / f"{storage}.bundle", precision=Precision(storage=storage))
    engines, host = both(bundle)
    asked = request(70, 20, 2)
    found, expected = (model.score(asked, [[5, 6, 7], [30, 2]]) for model in (engines, host))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=2e-2)
    assert engines.generate(asked, beams=3, max_new_tokens=5).token_ids


SMALL = ("token_ids", "positions", "media_rows", "phi", "write_index", "logit_positions")
"""Feeds of a step that go whole, one copy for all; each begins where engines want an address to be."""


def differing(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> int:
    """Words of eight bytes in which the large feeds of two steps differ."""
    found = 0
    for name in ("mask", "key_positions"):
        one, other = (feeds[name].tobytes() for feeds in (before, after))
        found += sum(one[at : at + 8] != other[at : at + 8] for at in range(0, len(one), 8))
    return found


def test_a_step_is_one_graph_and_moves_few_bytes(both: Load, gpu, monkeypatch):
    """Greedy and beams: nothing of the vocabulary's size comes back, nothing of the cache's or the bank's goes anywhere, and of the mask
    what differs."""
    engines, _ = both()
    lm, decoder, fed = engines.config.language_model, engines.engines.decoder, []
    ask = decoder._start  # type: ignore[attr-defined]

    def noted(feeds, *rest):
        fed.append({name: value.copy() for name, value in feeds.items()})
        return ask(feeds, *rest)

    monkeypatch.setattr(decoder, "_start", noted)
    for width in (1, 3):
        asked = request(80 + width, 30, 2)
        loop = submitted(engines, asked, width)
        decode(loop, 3)  # run, run, captured
        graphs, launches, fetched = gpu.cuda.graphs, gpu.cuda.calls["launch"], gpu.cuda.calls["synchronize"]
        before, enqueued, contexts = gpu.cuda.crossed.copy(), gpu.trt.enqueued, gpu.trt.contexts
        steps = 4
        decode(loop, steps)
        moved = gpu.cuda.crossed - before
        candidates, ahead = LIMITS["beams"] + 1, width == 1
        if ahead:
            fed.pop()  # asked for before the last one was read, and not done
        changed = sum(differing(*pair) for pair in zip(fed[-steps - 1 : -1], fed[-steps:], strict=True))
        handed = steps * ahead  # tokens that pass from step to step on the device
        assert moved["to device"] == steps * len(SMALL) * 256 + 16 * (changed + handed)
        assert changed <= steps * (
            2 * width + 2 * width * width
        )  # own slots, and what parents see, of beams that change places
        assert moved["to host"] == steps * width * (candidates * (4 + 8) + 4)
        assert moved["on device"] == 0
        assert moved["to host"] / steps < 4 * lm.vocab_size * width
        assert (gpu.cuda.graphs, gpu.trt.enqueued, gpu.trt.contexts) == (graphs, enqueued, contexts)
        assert gpu.cuda.calls["launch"] == launches + steps
        assert gpu.cuda.calls["synchronize"] == fetched + (0 if ahead else steps)
        loop.abandon(None)


def test_media_pass_from_encoder_to_bank_on_the_device(both: Load, gpu):
    engines, _ = both()
    before = gpu.cuda.crossed.copy()
    one = request(90, 5, 1)
    options = GenerateOptions(temperature=1.0, max_new_tokens=12)  # which wants the logits of the whole vocabulary
    engines.engine.submit(engines.prepare(one), options, wake=False)
    until_prefilled(engines.engine.loop)
    moved = gpu.cuda.crossed - before
    block, side = engines.config.cross_attention, engines.config.vision.image_size
    kept = 2 * len(engines.config.gated_layers) * block.num_heads * engines.config.resampler.num_latents * block.head_size * 4
    assert moved["on device"] == kept
    assert moved["to host"] == 4 * engines.config.language_model.vocab_size
    pixels, weights = 4 * 3 * side * side, 4 * engines.config.resampler.num_time_embeddings
    capacity = engines.manifest.limits.max_length
    prompt = 5 * (8 + 8 + 8 + capacity) + 8 + 8 + 8 * capacity + 8
    assert moved["to device"] == pixels + weights + prompt


def test_where_capture_fails_steps_are_run_and_it_is_said_once(both: Load, gpu, caplog):
    engines, host = both()
    gpu.trt.refuse_capture = True
    for seed in (100, 101):
        asked = request(seed, 12, 1)
        same(engines.generate(asked, beams=3, max_new_tokens=6), host.generate(asked, beams=3, max_new_tokens=6))
    assert gpu.cuda.graphs == 0
    said = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert len(said) == 1
    assert "not capturable" in said[0]


def test_closing_gives_everything_back(gpu, tiny_bundle, tmp_path):
    bundle = add_engines(tiny_bundle, tmp_path / "x.bundle", **LIMITS)
    with flamingo_export.load(bundle, backend="tensorrt-rtx") as model:
        model.generate(request(110, 12, 2), beams=3, max_new_tokens=6)
        assert gpu.cuda.used
        assert gpu.cuda.graphs
    del model
    gc.collect()
    assert (gpu.cuda.used, gpu.cuda.graphs) == (0, 0)


def test_media_of_the_next_batch_are_encoded_meanwhile(both: Load, gpu):
    """While steps run, and as far as rows are free: three rows, two of them in use, so one of the next two media comes early."""
    engines, host = both(bank_rows=3)
    requests = [request(120 + seed, 12, 2) for seed in range(4)]
    found = engines.generate(requests, beams=3, max_new_tokens=6, batch_size=1)
    expected = host.generate(requests, beams=3, max_new_tokens=6, batch_size=1)
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    assert [one.timings.media_encoded for one in expected] == [2, 2, 2, 2]
    assert [one.timings.media_encoded for one in found] == [2, 1, 1, 1]


def test_prefetching_neither_waits_nor_disturbs_the_stream_of_steps(both: Load, gpu):
    engines, _ = both()
    group, options = Group(1), GenerateOptions(beams=1, max_new_tokens=12)
    loop = engines.engine.loop

    def submit(seed: int) -> Ticket[Outcome]:
        return engines.engine.submit(engines.prepare(request(seed, 12, 2)), options, wake=False, group=group)

    first = submit(130)
    decode(loop, 3)
    second = submit(131)
    loop._take_in()
    encoder: Any = engines.engines.vision_encoder
    encoding = encoder._stream.handle
    waited, pinned = gpu.cuda.calls["synchronize"], dict(loop.bank._pins)
    loop._prefetch()
    assert gpu.cuda.calls["synchronize"] == waited
    asked = len(gpu.machine.streams[encoding].queue)
    assert asked
    loop.step(loop._plan()[0])
    assert len(gpu.machine.streams[encoding].queue) == asked  # the step did not wait for it
    assert loop.bank._pins == pinned
    loop._leave(loop._jobs[first], None)
    engines.engine.complete(second)
    assert second.timings.media_encoded < 2


def test_tensors_on_the_device_are_fed_as_they_are(both: Load, gpu):
    """Results of one session, and those of other libraries through DLPack."""
    engines, host = both()
    pixels = np.random.default_rng(0).normal(size=(2, 3, 24, 24)).astype(np.float32)
    weights = np.eye(1, engines.config.resampler.num_time_embeddings, dtype=np.float32)
    vision, resampler = engines.engines.vision_encoder, engines.engines.resampler
    features = vision.compute({"pixels": pixels})["features"]
    before = gpu.cuda.crossed["to device"]  # the fake copies when somebody waits, so the pixels are still to come
    found = resampler.run({"features": features.reshape(2, 1, *features.shape[1:]), "time_weights": weights})["latents"]
    expected_features = host.engines.vision_encoder.run({"pixels": pixels})["features"]
    expected = host.engines.resampler.run({"features": expected_features[:, None], "time_weights": weights})["latents"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert gpu.cuda.crossed["to device"] - before == pixels.nbytes + weights.nbytes

    shaped = features.reshape(2, 1, *features.shape[1:])

    class Foreign:
        """Passes our capsule on, as another library's tensor would its own."""

        shape, dtype = shaped.shape, shaped.dtype
        __dlpack__, __dlpack_device__ = shaped.__dlpack__, shaped.__dlpack_device__

    latents = resampler.run({"features": Foreign(), "time_weights": weights})["latents"]  # type: ignore[dict-item]
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    with pytest.raises(InputError, match="lies on a device, and this backend takes arrays of the host"):
        host.engines.resampler.run({"features": shaped, "time_weights": weights})


def test_feeds_that_do_not_fit_are_named(both: Load):
    engines, _ = both()
    engines.generate(request(140, 5, 1), beams=1, max_new_tokens=2)
    decoder, vision = engines.engines.decoder, engines.engines.vision_encoder
    ones = np.zeros((1, 1), np.int64)
    feeds = {
        "token_ids": ones, "positions": ones, "media_rows": ones, "phi": ones, "write_index": ones[0], "logit_positions": ones,
        "mask": (np.arange(96) < 1)[None, None, None], "key_positions": np.arange(96)[None],
    }  # fmt: skip
    decoder.run(feeds)
    cache = np.zeros((1, 4, 96, 10), np.float32)
    for wrong, words in (
        ({"past_k.0": cache}, r"past_k\.0 is updated in place: bind a buffer"),
        ({"token_ids": ones.astype(np.int32)}, "token_ids is int32, expected int64"),
        ({"mask": np.ones((1, 1, 1, 90), np.bool_)}, r"key_positions has shape \(1, 96\)"),
        ({"nonsense": ones}, "nonsense is not an input"),
    ):
        with pytest.raises(InputError, match=words):
            decoder.run({**feeds, **wrong})
    with pytest.raises(InputError, match="tokens is not an output"):
        decoder.run(feeds, outputs=("tokens",))
    with pytest.raises(InputError, match=r"F 5 were asked for, the engine takes F 1 to 4\. Build it with larger limits"):
        vision.run({"pixels": np.zeros((5, 3, 24, 24), np.float32)})
    with pytest.raises(InputError, match="allocate it with this session"):
        decoder.bind("past_k.0", object())  # type: ignore[arg-type]
    vision.close()
    with pytest.raises(BackendError, match="the session is closed"):
        vision.run({"pixels": np.zeros((2, 3, 24, 24), np.float32)})


def test_the_garbage_collector_does_not_run_within_a_capture(both: Load, gpu, monkeypatch):
    """It would free device memory there, which ends a capture."""
    engines, _ = both()
    seen = []
    begin = gpu.cuda.begin_capture
    monkeypatch.setattr(gpu.cuda, "begin_capture", lambda stream: (seen.append(gc.isenabled()), begin(stream)))  # type: ignore[func-returns-value]
    engines.generate(request(150, 5, 1), beams=1, max_new_tokens=8)
    assert seen == [False] * len(seen) != []
    assert gc.isenabled()
