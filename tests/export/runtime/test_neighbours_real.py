"""Neighbours do not show on a real backend either, up to rounding: along equal tokens log-probabilities agree within the decoder's row of the
tolerance table, and tokens first differ only where the alternatives lie closer than that. Such ties are counted and printed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.search import Hypothesis
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.validate.tolerances import RULE
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo

from .conftest import IMAGE, LoadTiny, Oracle, frames_of, pictures

REQUESTS = 160
WAYS: list[dict[str, Any]] = [
    {"beams": 1}, {"beams": 1}, {"beams": 2}, {"beams": 3, "num_return": 2}, {"temperature": 1.0, "seed": 3, "num_return": 2},
]  # fmt: skip


@dataclass
class Requests:
    """Random ones, of which most begin with the same shots."""

    config: ModelConfig
    rng: random.Random
    pool: list[np.ndarray] = field(default_factory=lambda: pictures(5, 6))

    def one(self) -> tuple[Request, GenerateOptions]:
        rng = self.rng
        words = range(4, self.config.language_model.vocab_size)
        shots = [1, IMAGE, *(5 + number % 7 for number in range(24)), IMAGE, 9, 10, 11]
        media = [self.pool[0], self.pool[1]]
        if rng.random() < 0.3:
            shots, media = [1, *rng.choices(words, k=rng.randint(1, 30))], []
        own = [IMAGE, *rng.choices(words, k=rng.randint(0, 5))] if rng.random() < 0.8 else rng.choices(words, k=2)
        media += [rng.choice(self.pool)] * own.count(IMAGE)
        options = GenerateOptions(max_new_tokens=rng.choice([2, 6, 12]), top_logprobs=20, **rng.choice(WAYS))
        return Request(prompt=[*shots, *own], media=media), options


def tolerance(oracle: Oracle, model: Flamingo) -> float:
    """What two runs of an engine may differ by in a log-probability: each is within the decoder's row of float64, logit and sum alike."""
    ids = [1, IMAGE, *range(4, 40)]
    shape = (model.config.resampler.num_latents, model.config.resampler.width)
    with torch.no_grad():
        latents = torch.from_numpy(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32))
        tokens = torch.tensor([ids])
        phi = (tokens == IMAGE).cumsum(1)
        rough = model(tokens, model.media_kv(latents), torch.arange(1)[None], phi)[0].numpy()
        double = oracle.model(tokens, oracle.model.media_kv(latents.double()), torch.arange(1)[None], phi)[0].numpy()
    rms = float(np.sqrt((double**2).mean()))
    error, peak = float(np.abs(rough - double).max()) / rms, float(np.abs(double).max()) / rms
    limit = RULE.limit(torch_error=error, peak=peak) * rms
    return 4 * limit


def first_difference(one: Hypothesis, other: Hypothesis) -> int | None:
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), None)


def drawn(options: GenerateOptions, branch: int, place: int) -> float:
    """The number that a sample's branch draws at a place."""
    child = np.random.SeedSequence(options.seed).spawn(options.num_return)[branch]
    return float(np.random.default_rng(child).random(place + 1)[place])


def boundary(oracle: Oracle, request: Request, before: tuple[int, ...], tokens: tuple[int, int], number: float) -> float:
    """How far a number that was drawn lies from the nearest boundary of two tokens' shares."""
    probabilities = np.exp(oracle.logprobs([*request.prompt, *before], frames_of(request))[-1])
    upper = np.cumsum(probabilities)
    edges = [edge for token in tokens for edge in (upper[token - 1] if token else 0.0, upper[token])]
    return min(abs(number - edge) for edge in edges)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 8])
def test_answers_beside_others_are_those_alone(
    rows: int,
    load_tiny: LoadTiny,
    tiny_config: ModelConfig,
    tiny_model: Flamingo,
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("flamingo_export.runtime.cache.COMPUTED", 1)
    limit = tolerance(oracle, tiny_model)
    requests = Requests(tiny_config, random.Random(rows))
    asked = [requests.one() for _ in range(REQUESTS)]
    with_others = load_tiny()
    with_others.engine.loop.schedule.rows = rows
    together = side_by_side(with_others, asked, requests.rng)
    assert with_others.engine.stats().shared_rows > REQUESTS / 10
    by_itself = load_tiny()
    compared = ties = 0
    for (request, options), found in zip(asked, together, strict=True):
        by_itself.engine.loop.cache.rows[0].held = ()  # nothing is reused either
        ticket = by_itself.engine.submit(by_itself.prepare(request), options, wake=False)
        (wanted,) = by_itself.engine.complete(ticket)
        for mine, theirs in zip(found.hypotheses, wanted.hypotheses, strict=True):
            place = first_difference(mine, theirs)
            equal = min(len(mine.token_ids), len(theirs.token_ids)) if place is None else place
            np.testing.assert_allclose(mine.token_logprobs[:equal], theirs.token_logprobs[:equal], rtol=0, atol=limit)
            compared += equal
            if place is None:
                assert len(mine.token_ids) == len(theirs.token_ids)
                continue
            ties += 1
            if options.samples:
                tokens = (mine.token_ids[place], theirs.token_ids[place])
                number = drawn(options, mine.branch, place)
                assert boundary(oracle, request, mine.token_ids[:place], tokens, number) <= limit
            elif options.width == 1:
                likely = dict(theirs.top[place])
                assert abs(likely[mine.token_ids[place]] - likely[theirs.token_ids[place]]) <= limit
            else:  # of beams, whole texts are chosen
                assert abs(mine.score - theirs.score) <= limit * max(len(mine.token_ids), len(theirs.token_ids))
    with capsys.disabled():
        print(f"\n{rows} rows: {compared} tokens agree within {limit:.1e}, {ties} of {REQUESTS} requests differ at a tie")


def side_by_side(model: Model, asked: list[tuple[Request, GenerateOptions]], rng: random.Random) -> list[Outcome]:
    """All of them through one engine, arriving at random moments; some beside them are given up."""
    tickets: list[Ticket[Outcome]] = []
    with model.engine.by_hand() as loop:
        for request, options in asked:
            tickets.append(model.engine.submit(model.prepare(request), options, wake=False))
            if rng.random() < 0.2:
                given_up = model.engine.submit(model.prepare(request), options, wake=False)
                for _ in range(rng.randint(0, 6)):
                    loop.tick()
                loop.revoked.append(given_up)
            for _ in range(rng.choice([0, 0, 1, 4])):
                loop.tick()
        while loop.tick():
            pass
    return [ticket.result() for ticket in tickets]
