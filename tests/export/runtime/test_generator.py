"""The generation loop against an oracle without cache, bank or batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flamingo_export.errors import BackendError, CapacityError, InputError, NoMemory
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.videos import Video
from flamingo_reference.config import ModelConfig

from .conftest import EOC, IMAGE, LoadTiny, Oracle, frames_of, pictures, random_prompt, random_request

# fp32 against float64 over three layers of width 32; logits are of order 10.
TOLERANCE = 2e-4

CASES = {
    "text before the first image": lambda c: Request(prompt=[1, 10, 11, IMAGE, 12, 13], media=pictures(1, 1)),
    "no image": lambda c: random_request(c, 2, 12, 0),
    "adjacent images": lambda c: Request(prompt=[1, IMAGE, IMAGE, IMAGE, 12, 13], media=pictures(3, 3)),
    "image last": lambda c: Request(prompt=[1, IMAGE, 12, 13, IMAGE], media=pictures(4, 2)),
    "image first": lambda c: Request(prompt=[IMAGE, 12], media=pictures(5, 1)),
    "one token": lambda c: Request(prompt=[1]),
    "a chunk exactly": lambda c: random_request(c, 6, 16, 2),
    "a chunk and one": lambda c: random_request(c, 7, 17, 2),
    "several chunks": lambda c: random_request(c, 8, 45, 6),
}


def check_texts(found, expected: list[tuple[list[int], float]]) -> None:
    """Same tokens, same scores; where two scores tie within rounding, either order."""
    texts = [found, *found.alternatives]
    assert len(texts) == len(expected)
    np.testing.assert_allclose([text.score for text in texts], [score for _, score in expected], atol=10 * TOLERANCE)
    for text, (tokens, score) in zip(texts, expected, strict=True):
        ties = [other for other, theirs in expected if math.isclose(theirs, score, abs_tol=10 * TOLERANCE)]
        assert list(text.token_ids) in ties or list(text.token_ids) == tokens
        assert sum(text.token_logprobs) == pytest.approx(text.score, abs=1e-9)
        assert text.finished == (text.token_ids[-1] == EOC)


@pytest.mark.parametrize("name", CASES)
def test_greedy_and_beams_are_those_of_the_oracle(
    load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle, name: str
) -> None:
    request = CASES[name](tiny_config)
    model = load_tiny()
    media = frames_of(request)
    greedy = model.generate(request, beams=1, max_new_tokens=5)
    assert list(greedy.token_ids) == oracle.greedy(request.prompt, media, 5)
    full = oracle.logprobs([*request.prompt, *greedy.token_ids], media)[len(request.prompt) - 1 : -1]
    np.testing.assert_allclose(greedy.token_logprobs, full[np.arange(len(full)), list(greedy.token_ids)], atol=TOLERANCE)
    found = model.generate(request, beams=3, num_return=3, max_new_tokens=4)
    check_texts(found, oracle.beams(request.prompt, media, 3, 4))


@pytest.mark.slow
def test_32_images_and_one_shown_many_times(load_tiny: LoadTiny, oracle: Oracle) -> None:
    images = pictures(0, 32)
    request = Request(prompt=[1, *[token for index in range(32) for token in (IMAGE, 4 + index)]], media=images)
    model = load_tiny(bank_rows=32, max_length=160)
    found = model.generate(request, beams=1, max_new_tokens=4)
    assert list(found.token_ids) == oracle.greedy(request.prompt, frames_of(request), 4)
    again = Request(prompt=request.prompt, media=[images[index % 3] for index in range(32)])
    found = model.generate(again, beams=1, max_new_tokens=4)
    assert (found.timings.media_encoded, found.timings.media_reused) == (0, 3)
    assert list(found.token_ids) == oracle.greedy(again.prompt, frames_of(again), 4)


def test_a_b_a_takes_two_rows(load_tiny: LoadTiny, oracle: Oracle) -> None:
    a, b = pictures(9, 2)
    request = Request(prompt=[1, IMAGE, 10, IMAGE, 11, IMAGE, 12], media=[a, b, a.copy()])
    model = load_tiny()
    found = model.generate(request, beams=1, max_new_tokens=4)
    assert len(model.engine.loop.bank.resident) == 2
    assert found.timings.media_encoded == 2
    assert list(found.token_ids) == oracle.greedy(request.prompt, [[a], [b], [a]], 4)


@pytest.mark.parametrize("num_frames", [1, 3, 8, 12])
def test_videos(load_tiny: LoadTiny, oracle: Oracle, num_frames: int) -> None:
    frames = pictures(num_frames, num_frames)
    prompt = [1, IMAGE, 10, IMAGE, 11]
    still = pictures(77, 1)[0]
    found = load_tiny().generate(
        Request(prompt=prompt, media=[Video(source=frames, num_frames=num_frames), still]), beams=1, max_new_tokens=3
    )
    assert list(found.token_ids) == oracle.greedy(prompt, [frames, [still]], 3)


def spied_logits(model: Model) -> list[np.ndarray]:
    """Collects the logits of every step from now on."""
    seen: list[np.ndarray] = []
    run = model.engines.decoder.run

    def spy(feeds):
        result = run(feeds)
        seen.append(result["logits"].copy())
        return result

    model.engines.decoder.run = spy  # type: ignore[assignment, method-assign]
    return seen


@pytest.mark.parametrize("beams", [1, 3])
def test_a_result_does_not_depend_on_its_batch(load_tiny: LoadTiny, tiny_config: ModelConfig, beams: int) -> None:
    """A row that nearly fills the cache beside short ones, with and without media, some ending early."""
    shared = pictures(50, 2)
    requests = [
        random_request(tiny_config, 20, 9, 1),
        random_request(tiny_config, 21, 70, 5),
        Request(prompt=random_prompt(tiny_config, 22, 30, 2), media=shared),
        random_request(tiny_config, 23, 3, 0),
        Request(prompt=random_prompt(tiny_config, 24, 17, 2), media=shared[::-1]),
    ]
    alone = [load_tiny().generate(request, beams=beams, max_new_tokens=6, num_return=beams) for request in requests]
    model = load_tiny(bank_rows=16)
    for batch_size in (5, 2):
        together = model.generate(requests, beams=beams, max_new_tokens=6, num_return=beams, batch_size=batch_size)
        for one, other in zip(alone, together, strict=True):
            assert one.token_ids == other.token_ids
            np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=TOLERANCE)
            assert [text.token_ids for text in one.alternatives] == [text.token_ids for text in other.alternatives]


def run_together(model: Model, requests: list[Request], limits: list[int]) -> list[tuple[int, ...]]:
    """Greedy tokens of requests that begin at once, each with its own number of new tokens."""
    tickets = [
        model.engine.submit(model.prepare(request), GenerateOptions(beams=1, max_new_tokens=limit), wake=False)
        for request, limit in zip(requests, limits, strict=True)
    ]
    return [outcome.hypotheses[0].token_ids for outcome in model.engine.complete(*tickets)]


def test_requests_that_end_early_leave_the_batch(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    """What is finished neither disturbs the others nor is computed any more."""
    requests = [random_request(tiny_config, 30 + index, 6 + index, 1) for index in range(3)]
    expected = [load_tiny().generate(request, beams=1, max_new_tokens=8).token_ids for request in requests]
    for order in ([8, 1, 3], [1, 2, 8], [2, 8, 1]):
        model = load_tiny()
        seen = spied_logits(model)
        found = run_together(model, requests, order)
        assert found == [tokens[:limit] for tokens, limit in zip(expected, order, strict=True)]
        assert seen[-1].shape[0] == 1


def test_rows_of_unlike_width_decode_together(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    """Greedy, beams and samples at once, in rows whose neighbours end, with holes between them: each as alone."""
    settings: list[dict[str, Any]] = [
        {"beams": 1},
        {"beams": 3},
        {"temperature": 1.2, "seed": 4, "num_return": 2},
        {"beams": 2},
        {"beams": 4},
        {"beams": 1},
        {"temperature": 1.0, "seed": 9, "top_k": 5},
    ]
    requests = [random_request(tiny_config, 300 + index, 5 + 3 * index, index % 3) for index in range(len(settings))]
    limits = [9, 2, 7, 8, 3, 6, 9]
    options = [GenerateOptions(max_new_tokens=limit, **each) for limit, each in zip(limits, settings, strict=True)]
    model = load_tiny(bank_rows=16)
    tickets = [
        model.engine.submit(model.prepare(request), each, wake=False) for request, each in zip(requests, options, strict=True)
    ]
    together = [outcome.hypotheses for outcome in model.engine.complete(*tickets)]
    for request, each, found in zip(requests, options, together, strict=True):
        alone = load_tiny().engine
        (expected,) = alone.complete(alone.submit(model.prepare(request), each, wake=False))
        assert [text.token_ids for text in found] == [text.token_ids for text in expected.hypotheses]
        for one, other in zip(found, expected.hypotheses, strict=True):
            np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=TOLERANCE)


def test_a_prompt_that_fills_the_cache_beside_others(
    load_tiny: LoadTiny, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last slots are nobody's scratch: padding of a neighbour's call must not be written into the row's prompt."""
    monkeypatch.setattr("flamingo_export.runtime.cache.BUCKET", 4)
    full = random_request(tiny_config, 310, 95, 2)  # one slot of 96 is left
    others = [random_request(tiny_config, 311 + index, 6, 0) for index in range(2)]
    expected = [load_tiny().generate(request, beams=3, max_new_tokens=4).token_ids for request in others]
    alone = load_tiny().generate(full, beams=1, max_new_tokens=1)
    model = load_tiny()
    wide = GenerateOptions(beams=3, max_new_tokens=4)
    tickets = [model.engine.submit(model.prepare(others[0]), wide, wake=False)]
    tickets.append(model.engine.submit(model.prepare(full), GenerateOptions(beams=1, max_new_tokens=1), wake=False))
    tickets.append(model.engine.submit(model.prepare(others[1]), wide, wake=False))
    found = [outcome.hypotheses[0].token_ids for outcome in model.engine.complete(*tickets)]
    assert found == [expected[0], alone.token_ids, expected[1]]


def test_a_cached_prompt_beside_a_fresh_one(
    load_tiny: LoadTiny, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pads one row while another computes its prompt stays within the cache, and out of what the row holds."""
    monkeypatch.setattr("flamingo_export.runtime.cache.BUCKET", 4)
    long, fresh = random_request(tiny_config, 1, 60, 0), random_request(tiny_config, 2, 50, 0)
    alone = [
        load_tiny(chunk=16, max_length=127 + i).generate(one, beams=1, max_new_tokens=2).token_ids
        for i, one in enumerate((long, fresh))
    ]
    model = load_tiny(chunk=16, max_length=129)
    model.generate(long, beams=1, max_new_tokens=1)
    both = model.generate([Request(prompt=long.prompt, media=[]), fresh], beams=1, max_new_tokens=2)
    assert [one.token_ids for one in both] == alone
    again = model.generate(long, beams=1, max_new_tokens=2)
    assert again.token_ids == alone[0]
    assert again.timings.reused_tokens == 59


def test_a_lone_prompt_may_fill_the_cache(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    for length in (80, 81, 95):
        request = random_request(tiny_config, length, length, 1)
        roomy = load_tiny(max_length=200 + length).generate(request, beams=1, max_new_tokens=1)
        assert load_tiny().generate(request, beams=1, max_new_tokens=1).token_ids == roomy.token_ids
        assert load_tiny().generate(request, beams=1).timings.prompt_tokens == length
    with pytest.raises(CapacityError, match=r"needs 97 cache slots, the bundle allows 96\. Use fewer shots"):
        load_tiny().generate(random_request(tiny_config, 96, 96, 0), beams=1, max_new_tokens=1)


def test_others_wait_for_one_piece_of_work_between_their_tokens(
    load_tiny: LoadTiny, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame, or one chunk of one row, while a request of three images and a video joins one that decodes."""
    model = load_tiny(chunk=4, max_length=128)
    engine = model.engine
    done: list[tuple[str, int]] = []
    loop = engine.loop

    def noted(kind: str, call: Callable[[Any], Any], number: Callable[[Any], int]) -> Callable[[Any], Any]:
        def through(given: Any) -> Any:
            done.append((kind, number(given)))
            return call(given)

        return through

    for name in ("features", "host_features"):
        monkeypatch.setattr(loop.encoder, name, noted("frames", getattr(loop.encoder, name), len))
    monkeypatch.setattr(loop, "prefill", noted("chunk", loop.prefill, lambda job: job.done))
    monkeypatch.setattr(loop, "step", noted("step", loop.step, lambda call: len(call.jobs)))
    settings: dict[str, Any] = {"beams": 1, "max_new_tokens": 60, "min_new_tokens": 60}
    joining = random_request(tiny_config, 342, 23, 4)
    video = Video(source=pictures(5, 3), num_frames=3)
    joining = Request(prompt=joining.prompt, media=[*joining.media[:3], video])
    with engine.by_hand():
        engine.submit(model.prepare(random_request(tiny_config, 341, 6, 1)), GenerateOptions(**settings), wake=False)
        while not loop.schedule.decoding:
            assert loop.tick()
        done.clear()
        engine.submit(model.prepare(joining), GenerateOptions(**settings), wake=False)
        while len(loop.schedule.decoding) < 2:
            assert loop.tick()
    kinds = [kind for kind, _ in done]
    assert [count for kind, count in done if kind == "frames"] == [1] * 6
    assert [start for kind, start in done if kind == "chunk"] == list(range(0, 23, 4))
    assert ("step", 1) in done
    assert all("step" in pair for pair in itertools.pairwise(kinds)), kinds


def test_a_request_that_fails_fails_alone(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    """In its prompt it takes nobody along; in a step those that share the call. The engine goes on."""
    model = load_tiny()
    requests = [random_request(tiny_config, 320 + index, 10, 1) for index in range(2)]
    expected = [load_tiny().generate(request, beams=1, max_new_tokens=6).token_ids for request in requests]
    run, bad = model.engines.decoder.run, set[int]()
    model.engines.decoder.run = lambda feeds: _raise() if bad & set(feeds["token_ids"].reshape(-1).tolist()) else run(feeds)  # type: ignore[assignment, method-assign, misc]
    others = {IMAGE, *requests[0].prompt, *expected[0]}
    bad.add(next(int(token) for token in requests[1].prompt if token not in others))
    good, failing = (
        model.engine.submit(model.prepare(request), GenerateOptions(beams=1, max_new_tokens=6)) for request in requests
    )
    assert good.result(30).hypotheses[0].token_ids == expected[0]
    with pytest.raises(RuntimeError, match="out of order"):
        failing.result(30)
    bad.clear()
    assert model.generate(requests[1], beams=1, max_new_tokens=6).token_ids == expected[1]
    stats = model.engine.stats()
    assert (stats.running, stats.waiting, stats.bank_rows_in_use, stats.failed_in_a_row) == (0, 0, 0, 0)


def _raise() -> None:
    raise RuntimeError("out of order")


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_a_result_does_not_depend_on_the_chunk(
    load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle, chunk: int
) -> None:
    request = random_request(tiny_config, 40, 29, 4)
    model = load_tiny(chunk=chunk, max_length=128)
    found = model.generate(request, beams=3, num_return=3, max_new_tokens=4)
    check_texts(found, oracle.beams(request.prompt, frames_of(request), 3, 4))


def test_a_second_question_reuses_media_and_prompt(load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle) -> None:
    model = load_tiny()
    images = pictures(60, 3)
    shared = [1, IMAGE, 10, 11, IMAGE, 12, 13, IMAGE]
    first, second = (Request(prompt=[*shared, *question], media=images) for question in ([20, 21, 22], [30, 31]))
    model.generate(first, beams=3, max_new_tokens=6)
    found = model.generate(second, beams=3, max_new_tokens=4, num_return=3)
    assert (found.timings.media_encoded, found.timings.media_reused) == (0, 3)
    assert (found.timings.prompt_tokens, found.timings.reused_tokens) == (10, 8)
    check_texts(found, oracle.beams(second.prompt, frames_of(second), 3, 4))
    same = model.generate(second, beams=1, max_new_tokens=4)
    assert same.timings.reused_tokens == 9  # the last position's logits are always computed
    assert list(same.token_ids) == oracle.greedy(second.prompt, frames_of(second), 4)


def test_other_images_under_the_same_tokens_are_not_reused(load_tiny: LoadTiny, oracle: Oracle) -> None:
    model = load_tiny()
    a, b, c = pictures(61, 3)
    prompt = [1, IMAGE, 10, IMAGE, 11, 12]
    model.generate(Request(prompt=prompt, media=[a, b]), beams=1, max_new_tokens=3)
    other = Request(prompt=prompt, media=[a, c])
    found = model.generate(other, beams=1, max_new_tokens=3)
    assert found.timings.reused_tokens == 3  # up to the second image
    assert list(found.token_ids) == oracle.greedy(prompt, [[a], [c]], 3)


def test_reuse_goes_to_the_row_that_holds_the_prompt(load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle) -> None:
    model = load_tiny()
    requests = [random_request(tiny_config, 70 + index, 8 + index, 1) for index in range(3)]
    model.generate(requests, beams=2, max_new_tokens=3)
    found = model.generate(requests[::-1], beams=2, max_new_tokens=3)
    assert [one.timings.reused_tokens for one in found] == [len(request.prompt) - 1 for request in requests[::-1]]
    for request, generation in zip(requests[::-1], found, strict=True):
        check_texts(generation, oracle.beams(request.prompt, frames_of(request), 2, 3)[:1])


def test_the_cache_grows_while_decoding(load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle, monkeypatch) -> None:
    monkeypatch.setattr("flamingo_export.runtime.cache.BUCKET", 4)
    model = load_tiny()
    request = random_request(tiny_config, 80, 10, 2)
    found = model.generate(request, beams=3, max_new_tokens=5, num_return=3)
    assert model.engine.loop.cache.capacity >= 10 + 3 * (max(len(found.token_ids), 2) - 1)
    check_texts(found, oracle.beams(request.prompt, frames_of(request), 3, 5))


def test_a_cache_that_could_not_grow_is_made_anew(
    load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle, monkeypatch
) -> None:
    monkeypatch.setattr("flamingo_export.runtime.cache.BUCKET", 4)
    model = load_tiny()
    request = random_request(tiny_config, 86, 10, 2)
    model.generate(request, beams=1, max_new_tokens=2)
    allocate, left = model.engines.decoder.allocate, 3

    def failing(name: str, shape: tuple[int, ...]):
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return allocate(name, shape)

    monkeypatch.setattr(model.engines.decoder, "allocate", failing)
    with pytest.raises(NoMemory, match="no memory for a cache of 1 x "):
        model.generate(request, beams=3, max_new_tokens=5)
    assert not model.engine.loop.cache.lost
    found = model.generate(request, beams=1, max_new_tokens=4)
    assert found.timings.reused_tokens == 0
    assert list(found.token_ids) == oracle.greedy(request.prompt, frames_of(request), 4)


def test_a_cache_that_is_lost_while_it_grows_fails_all_that_were_in_it(
    load_tiny: LoadTiny, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot go on with empty slots."""
    monkeypatch.setattr("flamingo_export.runtime.cache.BUCKET", 4)
    model = load_tiny()
    short, long = random_request(tiny_config, 88, 6, 0), random_request(tiny_config, 89, 60, 0)
    tickets = [
        model.engine.submit(model.prepare(request), GenerateOptions(beams=1, max_new_tokens=9), wake=False)
        for request in (short, long)
    ]
    loop = model.engine.loop
    while not loop.schedule.decoding:
        loop.tick()
    allocate = model.engines.decoder.allocate
    monkeypatch.setattr(model.engines.decoder, "allocate", lambda name, shape: _raise_memory())
    while loop.tick():
        pass
    for ticket in tickets:
        with pytest.raises(NoMemory, match="no memory for a cache"):
            ticket.result()
    monkeypatch.setattr(model.engines.decoder, "allocate", allocate)
    assert model.generate(long, beams=1, max_new_tokens=2).timings.reused_tokens == 0


def _raise_memory() -> None:
    raise MemoryError


def test_media_shown_by_many_requests_are_held_once(load_tiny: LoadTiny) -> None:
    image = pictures(87, 1)[0]
    model = load_tiny()
    requests = [Request(prompt=[1, IMAGE, 10 + index], media=[image.copy()]) for index in range(3)]
    tickets = model._submit(requests, GenerateOptions(), 3, "", None, wake=False)
    assert len({id(job.request.media[0]) for job in model.engine.loop.inbox}) == 1
    model.engine.complete(*tickets)


def test_exactly_full_and_one_more(load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle) -> None:
    model = load_tiny()  # 96 slots, chunks of 16
    request = random_request(tiny_config, 81, 96 - 3 * 6, 2)
    found = model.generate(request, beams=3, max_new_tokens=6, num_return=3)
    check_texts(found, oracle.beams(request.prompt, frames_of(request), 3, 6))
    held = dict(model.engine.loop.bank.resident)
    with pytest.raises(
        CapacityError, match=r"prompt of 78 tokens .* needs 99 cache slots, the bundle allows 96. Generate at most 6"
    ):
        model.generate(Request(prompt=request.prompt, media=pictures(99, 2)), beams=3, max_new_tokens=7)
    assert dict(model.engine.loop.bank.resident) == held  # nothing was encoded
    shorter = random_request(tiny_config, 82, 80, 0)
    assert model.generate(shorter, beams=3).timings.prompt_tokens == 80  # as many tokens as fit
    with pytest.raises(CapacityError, match="Use fewer shots"):
        model.generate(random_request(tiny_config, 83, 94, 0), beams=3)


def test_one_request_of_a_list_that_does_not_fit_stops_all_before_work(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    model = load_tiny()
    with pytest.raises(CapacityError):
        model.generate([random_request(tiny_config, 84, 9, 1), random_request(tiny_config, 85, 95, 0)], beams=3)
    assert not model.engine.loop.bank.resident


def test_a_list_with_more_media_than_the_bank_is_run_in_parts(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    model = load_tiny(bank_rows=3)
    requests = [random_request(tiny_config, 90 + index, 10, 2) for index in range(4)]
    together = model.generate(requests, beams=1, max_new_tokens=3)
    alone = [load_tiny().generate(request, beams=1, max_new_tokens=3) for request in requests]
    assert [found.token_ids for found in together] == [found.token_ids for found in alone]
    with pytest.raises(CapacityError, match="4 different images and videos are needed at once, the bank holds 3"):
        model.generate(random_request(tiny_config, 95, 10, 4))


def test_sampling_repeats_with_its_seed_whatever_the_batch(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    model = load_tiny()
    request, other = random_request(tiny_config, 100, 9, 1), random_request(tiny_config, 101, 20, 1)
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "seed": 3, "num_return": 3, "max_new_tokens": 6}
    one = model.generate(request, **settings)
    beside = model.generate([other, request], **settings)[1]
    assert [t.token_ids for t in (one, *one.alternatives)] == [t.token_ids for t in (beside, *beside.alternatives)]
    assert len({t.token_ids for t in (one, *one.alternatives)}) == 3
    assert one.token_ids != model.generate(request, **{**settings, "seed": 4}).token_ids


def test_an_interrupted_generation_leaves_the_model_usable(
    load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle
) -> None:
    model = load_tiny()
    request = random_request(tiny_config, 110, 40, 2)
    run, calls = model.engines.decoder.run, 0

    def interrupted(feeds):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return run(feeds)

    model.engines.decoder.run = interrupted  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        model.generate(request, beams=2)
    found = model.generate(request, beams=1, max_new_tokens=3)
    assert found.timings.reused_tokens == 16  # the chunk that was finished
    assert list(found.token_ids) == oracle.greedy(request.prompt, frames_of(request), 3)


def test_an_interrupt_loses_no_request_of_others(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    """One that has arrived meanwhile, and was not looked at yet, is carried out by the engine's thread."""
    model = load_tiny()
    request, other = (random_request(tiny_config, seed, 20, 1) for seed in (112, 113))
    expected = load_tiny().generate(other, beams=1, max_new_tokens=4).token_ids
    run, tickets = model.engines.decoder.run, []

    def interrupted(feeds):
        model.engines.decoder.run = run  # type: ignore[method-assign]
        tickets.append(model.engine.submit(model.prepare(other), GenerateOptions(beams=1, max_new_tokens=4), wake=False))
        raise KeyboardInterrupt

    model.engines.decoder.run = interrupted  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        model.generate(request, beams=1)
    model.engine.complete(*tickets)
    assert tickets[0].result(30).hypotheses[0].token_ids == expected
    assert model.engine.stats().rows_in_use == 0


def test_phi_beyond_the_media_is_refused_before_the_graph_runs(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    model = load_tiny()
    prepared = model.prepare(random_request(tiny_config, 111, 8, 1))
    prepared.phi[-1] = 2
    with pytest.raises(InputError, match="phi goes from 0 to 2, but the request has 1 media"):
        model.engine.complete(model.engine.submit(prepared, GenerateOptions(), wake=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_return": 4, "beams": 3}, "num_return 4 needs at least 4 beams, beams is 3"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"beams": 3, "temperature": 0.7}, "3 beams and sampling"),
        ({"beams": 40}, "40 beams need a vocabulary of at least 80"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"length_penalty": 1000.0}, "length_penalty is 1000.0, expected -10.0 to 10.0"),
        ({"length_penalty": -math.inf}, "length_penalty is -inf"),
        ({"seed": -1, "top_k": 2}, "seed is -1"),
        ({"seed": 1.5, "top_k": 2}, "seed is 1.5, expected a whole number"),
        ({"num_return": None}, "num_return is None, expected a whole number"),
        ({"beams": True}, "beams is True, expected a whole number"),
        ({"beams": "3"}, "beams is '3', expected a whole number"),
        ({"temperature": "1"}, "temperature is '1', expected a number"),
        ({"length_penalty": None}, "length_penalty is None, expected a number"),
    ],
)
def test_settings_that_cannot_be(load_tiny: LoadTiny, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tiny().generate([1, 10], **settings)


def test_a_closed_model_says_so(load_tiny: LoadTiny) -> None:
    model = load_tiny()
    model.close()
    with pytest.raises(BackendError, match="the model is closed"):
        model.generate([1, 10], max_new_tokens=1)
