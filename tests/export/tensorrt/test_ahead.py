"""Steps that are asked for before the one before is read: the order of what happens, and the same answers to the bit as one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from engine_steps import decode, pictures, request, submitted
from fake_gpu import LIMITS, add_engines

import flamingo_export
from flamingo_export.backends.base import Handed
from flamingo_export.backends.tensorrt.result_buffers import DeviceRun
from flamingo_export.backends.tensorrt.session import TensorRTSession
from flamingo_export.errors import BackendError, InputError
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.sampling import Sampling

SAMPLES: dict[str, Any] = {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "seed": 6, "num_return": 3}


@pytest.fixture
def opened(gpu, tiny_bundle, tmp_path) -> Iterator[Callable[..., Model]]:
    with ExitStack() as stack:
        numbers = iter(range(9))

        def load(**limits: int) -> Model:
            bundle = add_engines(tiny_bundle, tmp_path / f"{next(numbers)}.bundle", **{**LIMITS, **limits})
            return stack.enter_context(flamingo_export.load(bundle, backend="tensorrt-rtx"))

        yield load


def answers(model: Model, **settings: Any) -> list[Any]:
    """Lone requests, and batches in which some end before others."""
    requests = [request(300 + seed, 4 + 6 * seed, seed % 3) for seed in range(7)]
    found = [model.generate(one, max_new_tokens=17, **settings) for one in requests[:2]]
    found += model.generate(requests, max_new_tokens=11, batch_size=3, **settings)
    return [(one.token_ids, one.token_logprobs, [(o.token_ids, o.token_logprobs) for o in one.alternatives]) for one in found]


@pytest.mark.parametrize(
    "settings",
    [{"beams": 1}, {"beams": 1, "top_logprobs": 3}, SAMPLES, {"temperature": 0.8, "top_k": 2, "min_p": 0.2, "seed": 1}],
    ids=["greedy", "greedy with the likeliest", "samples", "one sample"],
)
def test_answers_are_those_of_one_step_after_the_other(opened, gpu, monkeypatch, settings):
    model = opened()
    found = answers(model, **settings)
    ahead = model.engine.loop.counts["asked_ahead"]
    assert ahead > 30
    assert bool(gpu.cuda.calls["choose"]) == ("temperature" in settings)
    assert model.engine.loop.counts["run_again"] == 0
    monkeypatch.setattr(TensorRTSession, "runs_ahead", False)
    assert answers(opened(), **settings) == found


def test_a_step_is_asked_for_before_the_last_one_is_read_and_computed_while_the_host_searches(opened, gpu, monkeypatch):
    """What happens in order; while the search looks at a step, the next one is in the stream's queue."""
    model = opened()
    log: list[str] = []
    start, result, advance = TensorRTSession.start, DeviceRun.result, Sampling.advance
    stream = model.engines.decoder._stream.handle

    def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **rest: Any) -> Any:
            under_way = bool(gpu.machine.streams[stream].queue)
            log.append(f"{name}, the device works" if under_way else name)
            return call(*args, **rest)

        return noted

    loop = submitted(model, request(81, 30, 2), 1)  # which does not end early
    decode(loop, 4)
    for owner, name, call in ((TensorRTSession, "start", start), (DeviceRun, "result", result), (Sampling, "advance", advance)):
        monkeypatch.setattr(owner, name, note({"start": "ask", "result": "wait", "advance": "search"}[name], call))
    decode(loop, 3)
    assert log == ["ask, the device works", "wait, the device works", "search, the device works"] * 3
    loop.abandon(None)


def test_the_next_step_waits_for_no_copy_of_tokens_over_the_bus(opened, gpu, monkeypatch):
    """Greedy tokens are taken from the candidates in device memory: those that are fed are the padding token."""
    model = opened()
    fed: list[np.ndarray] = []
    start = TensorRTSession.start

    def noted(self: TensorRTSession, feeds: Any, outputs: Any = None, handed: Handed | None = None) -> DeviceRun:
        if handed is not None:
            assert handed.draws is None
            assert (handed.source >= 0).all()
            fed.append(feeds["token_ids"].copy())
        return start(self, feeds, outputs, handed)

    monkeypatch.setattr(TensorRTSession, "start", noted)
    found = model.generate(request(320, 9, 1), beams=1, max_new_tokens=9)
    assert len(fed) == len(found.token_ids) - 2 or found.token_ids[-1] == model.config.tokens.eoc
    assert all((tokens == model.config.tokens.eoc).all() for tokens in fed)


def test_what_ends_a_text_is_seen_one_step_late_and_no_slot_is_lost(opened, gpu, monkeypatch):
    """End tokens and stop texts: the surplus step is not read, the row's next request finds its beginning, and the cache may be filled."""
    model = opened()
    end = model.config.tokens.eoc
    first = request(330, 12, 1)
    expected = model.generate(first, beams=1, max_new_tokens=30)
    place = next(at for at, token in enumerate(expected.token_ids) if at > 3 and token not in expected.token_ids[:at])
    stop = expected.token_ids[place]
    monkeypatch.setattr("flamingo_export.runtime.search.StopRule.stops", property(lambda rule: (end, stop)))
    before = model.engine.loop.counts["steps"]
    for _ in range(3):
        found = model.generate(first, beams=1, max_new_tokens=30)
        assert found.token_ids == expected.token_ids[: place + 1]
    steps = model.engine.loop.counts["steps"] - before
    assert steps == 3 * place  # surplus steps are not counted, they were never read
    monkeypatch.undo()
    capacity = model.manifest.limits.max_length
    for length in (capacity - 1, capacity - 2, capacity - 5):
        found = model.generate(request(331, length, 1), beams=1, max_new_tokens=capacity - length)
        assert 1 <= len(found.token_ids) <= capacity - length


def test_a_draw_that_the_device_makes_otherwise_is_run_again(opened, gpu, monkeypatch):
    """As rounding could: every fifth draw of the device's is the last candidate.

    A request whose step is run again comes out of step with its neighbours, and a backend adds in another order where a call has other rows:
    so tokens are equal, and log-probabilities but for a rounding. To the bit it is shown on the hash decoder (test_neighbours.py).
    """
    expected = answers(opened(), **SAMPLES)
    choose, count = gpu.cuda.choose, iter(range(1 << 30))

    def slipping(choices: int, number: int, values: int, ids: int, n: int, stream: int) -> None:
        choose(choices, number, values, ids, n, stream)
        if next(count) % 5 == 4:

            def slip() -> None:
                target, branch = (int(x) for x in gpu.cuda.view(choices, 16).view(np.int64))
                gpu.cuda.view(target, 8)[:] = gpu.cuda.view(ids + 8 * (n * branch + n - 1), 8)

            gpu.cuda.ask(stream, slip)

    monkeypatch.setattr(gpu.cuda, "choose", slipping)
    model = opened()
    found = answers(model, **SAMPLES)
    texts, logprobs = zip(*(unzipped(each) for each in found), strict=True)
    wanted, likely = zip(*(unzipped(each) for each in expected), strict=True)
    assert texts == wanted
    np.testing.assert_allclose(np.concatenate(logprobs), np.concatenate(likely), rtol=0, atol=2 * np.spacing(np.float32(4)))
    assert model.engine.loop.counts["run_again"] > 5


def unzipped(answer: Any) -> tuple[list[Any], np.ndarray]:
    """Token ids of a request's texts, and all their log-probabilities in a row."""
    ids, logprobs, alternatives = answer
    texts = [(ids, logprobs), *alternatives]
    return [each[0] for each in texts], np.concatenate([each[1] for each in texts])


def test_requests_that_leave_in_the_middle_disturb_nobody(opened, gpu):
    """Cancelled while a step is under way; the others go on, and the freed row is used again."""
    model = opened()
    asked = [request(340 + seed, 8, 1) for seed in range(4)]
    alone = [model.generate(one, beams=1, max_new_tokens=10).token_ids for one in asked]
    engine, loop = model.engine, model.engine.loop
    options = GenerateOptions(beams=1, max_new_tokens=10)
    tickets = [engine.submit(model.prepare(one), options, wake=False) for one in asked[:3]]
    while loop._flight is None or len(loop._flight.call.jobs) < 3:
        assert loop.tick()
    loop.revoked.append(tickets[1])
    tickets.append(engine.submit(model.prepare(asked[3]), options, wake=False))
    while loop.tick():
        pass
    assert [tickets[at].result().hypotheses[0].token_ids for at in (0, 2, 3)] == [alone[at] for at in (0, 2, 3)]
    assert loop._flight is None


def test_a_step_that_fails_later_fails_its_requests_and_no_others(opened, gpu, monkeypatch):
    model = opened()
    expected = model.generate(request(350, 8, 1), beams=1, max_new_tokens=8).token_ids
    loop = submitted(model, request(351, 8, 1), 1)
    decode(loop, 4)
    monkeypatch.setattr(DeviceRun, "result", lambda self: (_ for _ in ()).throw(BackendError("a kernel failed")))
    failed = loop.counts["failed"]
    while loop.tick():
        pass
    assert loop.counts["failed"] == failed + 1
    monkeypatch.undo()
    assert model.generate(request(350, 8, 1), beams=1, max_new_tokens=8).token_ids == expected


def test_tokens_of_no_run_are_refused(opened, gpu):
    model = opened()
    with pytest.raises(InputError, match="no run has left candidates"):
        model.engines.decoder._hand(Handed(source=np.zeros((1, 1), np.int64)), None)


def test_without_our_kernels_steps_wait_for_each_other(opened, gpu):
    gpu.cuda.step_kernels = False
    model = opened()
    prompt = Request(prompt=[1, 3, 10, 11], media=pictures(360, 1))
    assert model.generate(prompt, beams=1, max_new_tokens=6).token_ids
    assert model.engine.loop.counts["asked_ahead"] == 0


def test_beams_penalties_and_whole_vocabularies_wait(opened, gpu):
    model = opened()
    for settings in ({"beams": 3}, {"beams": 1, "repetition_penalty": 1.2}, {"temperature": 1.0, "seed": 3}):
        model.generate(request(370, 8, 1), max_new_tokens=6, **settings)
    assert model.engine.loop.counts["asked_ahead"] == 0
