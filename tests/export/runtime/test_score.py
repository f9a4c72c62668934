"""Log-likelihoods of candidates against whole sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flamingo_export.errors import CapacityError, InputError
from flamingo_export.runtime.request import Request
from flamingo_reference.config import ModelConfig

from .conftest import IMAGE, LoadTiny, Oracle, frames_of, random_request

CANDIDATES = [[10], [11, 12, 13], [11, 12], [40, 41, 42, 43, 44], [2]]


def expected_scores(oracle: Oracle, request: Request, candidates: list[list[int]]) -> list[list[float]]:
    start = len(request.prompt) - 1
    return [
        oracle.logprobs([*request.prompt, *candidate], frames_of(request))[
            start + np.arange(len(candidate)), candidate
        ].tolist()
        for candidate in candidates
    ]


@pytest.mark.parametrize(("length", "num_media"), [(9, 2), (1, 0), (40, 3)])
def test_candidates_are_branches_that_do_not_see_each_other(
    load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle, length: int, num_media: int
) -> None:
    request = random_request(tiny_config, length, length, num_media)
    found = load_tiny().score(request, CANDIDATES)
    for score, expected in zip(found, expected_scores(oracle, request, CANDIDATES), strict=True):
        np.testing.assert_allclose(score.token_logprobs, expected, atol=3e-4)
        assert score.logprob == pytest.approx(sum(score.token_logprobs))


def test_all_candidates_take_one_pass_after_the_prompt(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    model = load_tiny()
    calls, run = [], model.engines.decoder.run
    model.engines.decoder.run = lambda feeds: calls.append(feeds["token_ids"].shape) or run(feeds)  # type: ignore[assignment, func-returns-value, method-assign, misc]
    model.score(random_request(tiny_config, 1, 20, 1), CANDIDATES)
    assert calls == [(1, 16), (1, 4), (1, 0 + 2 + 1 + 4 + 0)]


def test_many_candidates_go_in_groups_over_the_same_slots(
    load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle
) -> None:
    request = random_request(tiny_config, 2, 70, 2)  # 26 slots are left
    candidates = [[token, token + 1, token + 2, token + 3, 9] for token in range(10, 26)]
    found = load_tiny().score(request, candidates)
    for score, expected in zip(found, expected_scores(oracle, request, candidates), strict=True):
        np.testing.assert_allclose(score.token_logprobs, expected, atol=3e-4)


def test_exactly_full_and_one_more(load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle) -> None:
    request = random_request(tiny_config, 3, 60, 1)  # 36 slots are left; a candidate's last token is not run
    full = list(range(10, 47))
    (found,) = load_tiny().score(request, [full])
    np.testing.assert_allclose(found.token_logprobs, expected_scores(oracle, request, [full])[0], atol=3e-4)
    with pytest.raises(CapacityError, match="a candidate of 38 needs 97 cache slots, the bundle allows 96"):
        load_tiny().score(request, [[5], [*full, 47]])


def test_the_prompt_is_reused_from_generating(load_tiny: LoadTiny, tiny_config: ModelConfig, oracle: Oracle) -> None:
    model = load_tiny()
    request = random_request(tiny_config, 4, 20, 2)
    model.generate(request, beams=3, max_new_tokens=5)
    found = model.score(request, CANDIDATES)
    np.testing.assert_allclose(found[3].token_logprobs, expected_scores(oracle, request, CANDIDATES)[3], atol=3e-4)


def test_image_has_probability_zero(load_tiny: LoadTiny, tiny_config: ModelConfig) -> None:
    found = load_tiny().score(random_request(tiny_config, 5, 8, 1), [[IMAGE], [10, IMAGE]])
    assert [score.logprob for score in found] == [-np.inf, -np.inf]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "no candidates"),
        ([[]], "no tokens"),
        ([[70]], "outside 0 to 69"),
        (["red"], "no tokenizer"),
        ("red", "given as str; give a list"),
        ((one for one in [[10]]), "given as generator; give a list"),
        (np.array([[10]]), "given as ndarray; give a list"),
    ],
)
def test_candidates_that_cannot_be_scored(load_tiny: LoadTiny, candidates: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tiny().score([1, 10], candidates)
