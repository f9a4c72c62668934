"""Requests for the tiny model, and an engine's loop, carried on a step at a time."""

from __future__ import annotations

import numpy as np

from flamingo_export.runtime.loop import Loop
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.texts import Generation


def pictures(seed: int, count: int) -> list[np.ndarray]:
    """Images of noise."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(count)]


def request(seed: int, length: int, num_media: int, size: int = 70) -> Request:
    """A prompt of noise for the tiny model."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, size, length)
    ids[0] = 1
    ids[rng.choice(np.arange(1, length), num_media, replace=False)] = 3
    return Request(prompt=ids.tolist(), media=pictures(seed, num_media))


def same(found: Generation, expected: Generation, tolerance: float = 1e-4) -> None:
    """The same tokens, and log-probabilities within the tolerance."""
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, atol=tolerance)
    assert [other.token_ids for other in found.alternatives] == [other.token_ids for other in expected.alternatives]


def submitted(model: Model, asked: Request, width: int) -> Loop:
    """The model's loop with a request that nobody else carries on."""
    options = GenerateOptions(beams=width, max_new_tokens=12)
    model.engine.submit(model.prepare(asked), options, wake=False)
    return model.engine.loop


def decode(loop: Loop, steps: int) -> None:
    """Carries on until so many more steps were decoded."""
    wanted = loop.counts["steps"] + steps
    while loop.counts["steps"] < wanted:
        assert loop.tick()


def until_prefilled(loop: Loop) -> None:
    """Carries on until a request's first token was chosen."""
    while not loop.counts["generated_tokens"]:
        assert loop.tick()
