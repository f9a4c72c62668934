"""The searches, against transformers' generate on a tiny model, and brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flamingo_export.errors import BundleError
from flamingo_export.runtime.beam_search import BeamSearch
from flamingo_export.runtime.candidates import log_sum_exp, top_tokens, without
from flamingo_export.runtime.sampling import Sampling
from flamingo_export.runtime.search import Hypothesis, Search, StopRule
from flamingo_reference import search as reference

VOCAB, EOC, IMAGE = 23, 2, 3
LogitsOf = Callable[[list[int]], np.ndarray]


def table_model(seed: int, *, scale: float = 2.0, eoc_bonus: float = 0.0) -> LogitsOf:
    """A "language model" whose logits depend on the last two tokens, drawn from a seed."""
    table = np.random.default_rng(seed).normal(0, scale, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
    table[:, :, EOC] += eoc_bonus
    return lambda ids: table[ids[-2], ids[-1]].copy()


def drive(search: Search, model: LogitsOf, prompt: list[int]) -> list[Hypothesis]:
    """Runs a search against a model that sees whole sequences: what a cache must reproduce."""
    branches = [prompt]
    while (step := search.advance(np.stack([model(branch) for branch in branches]))) is not None:
        branches = [[*branches[parent], int(token)] for parent, token in zip(step.parents, step.tokens, strict=True)]
    return search.results()


def until_eoc(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOC) + 1] if EOC in ids else ids


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beam_search_is_that_of_transformers(tiny_llama, beams: int, length_penalty: float) -> None:
    import torch

    def model(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return tiny_llama(torch.tensor([ids])).logits[0, -1].numpy().copy()

    for first in range(4, 16, 3):
        prompt = [1, first, 5]
        expected = tiny_llama.generate(
            torch.tensor([prompt]),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=9,
            length_penalty=length_penalty,
            do_sample=False,
            suppress_tokens=None,
            renormalize_logits=True,
            bad_words_ids=[[IMAGE]],
            return_dict_in_generate=True,
            output_scores=True,
        )
        rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=9)
        found = drive(BeamSearch(rule, beams=beams, length_penalty=length_penalty), model, prompt)
        wanted = [until_eoc(row.tolist()[3:]) for row in expected.sequences]
        assert [list(hypothesis.token_ids) for hypothesis in found] == wanted
        np.testing.assert_allclose([h.score for h in found], expected.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)


def test_a_live_beam_that_could_only_draw_level_ends_the_search() -> None:
    """As in transformers: to go on, the best live beam must be better than the worst kept one."""
    search = BeamSearch(StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=9), beams=2)
    first, second = np.full((1, VOCAB), -50, np.float32), np.full((2, VOCAB), -50, np.float32)
    first[0, [EOC, 5, 6]] = 0
    step = search.advance(first)
    assert step is not None
    assert step.tokens.tolist() == [5, 6]
    second[0, [EOC, 7]] = 0  # the beam ends and goes on with the same probability
    second[1, 8:18] = 0
    assert search.advance(second) is None
    assert [text.token_ids for text in search.results()] == [(EOC,), (5, EOC)]


def test_greedy_takes_the_likeliest_token_until_eoc(tiny_llama) -> None:
    import torch

    def model(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return tiny_llama(torch.tensor([ids])).logits[0, -1].numpy().copy()

    for first in range(4, 16, 3):
        prompt = [1, first, 5]
        expected = tiny_llama.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, bad_words_ids=[[IMAGE]], attention_mask=torch.ones(1, 3)
        )
        rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=9)
        (found,) = drive(Sampling(rule), model, prompt)
        assert list(found.token_ids) == until_eoc(expected[0].tolist()[3:])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    beams=st.integers(1, 5),
    bonus=st.floats(-2, 3),
    count=st.integers(1, 7),
    penalty=st.sampled_from([0.0, 1.0, -0.5]),
)
def test_searches_are_those_of_the_reference(seed: int, beams: int, bonus: float, count: int, penalty: float) -> None:
    model = table_model(seed, eoc_bonus=bonus)
    expected = reference.beam_search(
        lambda ids: np.stack([model(row) for row in ids.tolist()]),
        [1, 4],
        reference.Rules(eoc=EOC, image=IMAGE, max_new_tokens=count),
        beams=beams,
        length_penalty=penalty,
    )
    assume(expected.closest >= 1e-4)  # a tie within rounding: either is right
    rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=count)
    search = Sampling(rule) if beams == 1 else BeamSearch(rule, beams=beams, length_penalty=penalty)
    found = drive(search, model, [1, 4])
    assert [hypothesis.token_ids for hypothesis in found] == [hypothesis.token_ids for hypothesis in expected.hypotheses]
    for one, other in zip(found, expected.hypotheses, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-5)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_beam_search_with_enough_beams_is_exhaustive() -> None:
    model = table_model(3)
    rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=2)
    found = drive(BeamSearch(rule, beams=11), model, [1, 4])[0]

    def logprob(ids: list[int], token: int) -> float:
        logits = model(ids).astype(np.float64)
        logits[IMAGE] = -np.inf
        return float(logits[token] - np.log(np.exp(logits).sum()))

    best = max(
        (
            logprob([1, 4], one) + (0.0 if one == EOC else logprob([1, 4, one], two))
            for one, two in itertools.product(range(VOCAB), repeat=2)
        )
    )
    assert found.score == pytest.approx(best, abs=1e-6)
    assert sum(found.token_logprobs) == pytest.approx(found.score, abs=1e-9)


def test_image_is_never_generated_however_likely() -> None:
    def model(ids: list[int]) -> np.ndarray:
        logits = np.zeros(VOCAB, np.float32)
        logits[IMAGE] = 50
        logits[7] = 1
        return logits

    rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=4)
    for search in (BeamSearch(rule, beams=3), Sampling(rule), Sampling(rule, branches=4, temperature=1.0, seed=0)):
        for hypothesis in drive(search, model, [1, 4]):
            assert IMAGE not in hypothesis.token_ids
            assert min(hypothesis.token_logprobs) > -4  # renormalised without it


def test_ties_go_to_the_lower_beam_and_token() -> None:
    rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=1)
    found = drive(BeamSearch(rule, beams=3), lambda ids: np.zeros(VOCAB, np.float32), [1, 4])
    assert [hypothesis.token_ids for hypothesis in found] == [(0,), (1,), (2,)]


def test_a_beam_as_good_as_the_worst_kept_text_does_not_go_on() -> None:
    """As in transformers, which goes on only while the worst finished score is below the best that can still be reached."""

    def model(ids: list[int]) -> np.ndarray:
        logits = np.full(VOCAB, -60.0, np.float32)
        logits[[EOC, 5, 6] if len(ids) == 2 else [EOC, 7]] = 1.0
        return logits

    search = BeamSearch(StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=9), beams=2)
    found = drive(search, model, [1, 4])
    assert [hypothesis.token_ids for hypothesis in found] == [(EOC,), (5, EOC)]
    assert found[1].score == pytest.approx(math.log(1 / 3) + math.log(1 / 2), abs=1e-6)
    assert search._scores[0] == found[1].score  # the tie is one, to the last bit
    assert search._length == 2


def test_one_token_is_enough() -> None:
    rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=1)
    assert len(drive(BeamSearch(rule, beams=2), table_model(0), [1, 4])[0].token_ids) == 1
    assert len(drive(Sampling(rule), table_model(0), [1, 4])[0].token_ids) == 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), beams=st.integers(2, 5), bonus=st.floats(-2, 3))
def test_what_was_agreed_is_never_taken_back(seed: int, beams: int, bonus: float) -> None:
    model = table_model(seed, eoc_bonus=bonus)
    search = BeamSearch(StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=8), beams=beams)
    branches, agreed = [[1, 4]], []
    while (step := search.advance(np.stack([model(branch) for branch in branches]))) is not None:
        branches = [[*branches[parent], int(token)] for parent, token in zip(step.parents, step.tokens, strict=True)]
        agreed.append(tuple(search.certain()[0][0]))
    best = search.results()[0].token_ids
    for tokens in agreed:
        assert best[: len(tokens)] == tokens


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 3),
    size=st.sampled_from([5, 64, 200, 1000, 4099]),
    count=st.integers(1, 12),
    levels=st.sampled_from([3, 50, 10**6]),
)
def test_top_tokens_is_exact_with_ties(seed: int, width: int, size: int, count: int, levels: int) -> None:
    logits = np.random.default_rng(seed).integers(0, levels, (width, size)).astype(np.float32)
    rows, tokens = top_tokens(logits, count)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    assert (tokens.reshape(width, -1) == expected).all()
    assert (rows == np.repeat(np.arange(width), min(count, size))).all()


def test_log_sum_exp_agrees_with_float64_and_keeps_large_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 30, (3, 32000)).astype(np.float32) + 1000
    wide = np.delete(logits.astype(np.float64), IMAGE, axis=1)
    expected = wide.max(1) + np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1))
    np.testing.assert_allclose(log_sum_exp(logits, without(logits, IMAGE)), expected, rtol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[1, 9] = bad
    with pytest.raises(BundleError, match="not finite"):
        without(logits, IMAGE)


def frequencies(count: int, **kind: Any) -> np.ndarray:
    """How often each token is the first of a sample."""
    logits = np.log(np.array([0.4, 0.3, 0.05, 0.05, 0.2], np.float32))
    rule = StopRule(eoc=4, banned=3, max_new_tokens=1)
    search = Sampling(rule, branches=count, seed=1, **kind)
    assert search.advance(logits[None].copy()) is None
    return np.bincount([h.token_ids[0] for h in search.results()], minlength=5) / count


@pytest.mark.slow
def test_sampling_follows_the_distribution() -> None:
    # token 3 is banned: the others share its mass
    np.testing.assert_allclose(frequencies(4000, temperature=1.0), np.array([0.4, 0.3, 0.05, 0, 0.2]) / 0.95, atol=0.03)
    np.testing.assert_allclose(frequencies(4000, temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(4000, temperature=1.0, top_p=0.8), np.array([4, 3, 0, 0, 2]) / 9, atol=0.03)
    np.testing.assert_allclose(frequencies(4000, temperature=0.5, top_k=4), np.array([16, 9, 0.25, 0, 4]) / 29.25, atol=0.03)
    assert frequencies(50, temperature=1.0, top_p=1e-9)[0] == 1.0


def test_a_seed_repeats_and_branches_differ() -> None:
    rule = StopRule(eoc=EOC, banned=IMAGE, max_new_tokens=6)

    def sample(seed: int, branches: int) -> list[tuple[int, ...]]:
        search = Sampling(rule, branches=branches, temperature=1.0, seed=seed)
        return [h.token_ids for h in drive(search, table_model(1, scale=0.5), [1, 4])]

    assert sample(5, 3) == sample(5, 3)
    assert sample(5, 3) != sample(6, 3)
    assert len(set(sample(5, 3))) == 3
    # the first branch draws the same whether it has neighbours or not
    assert set(sample(5, 1)) <= set(sample(5, 3))


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-9])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.filterwarnings("error")
def test_a_vanishing_temperature_takes_the_likeliest(temperature: float, top_k: int | None) -> None:
    logits = np.random.default_rng(3).normal(0, 5, (1, 40)).astype(np.float32)
    search = Sampling(StopRule(eoc=2, banned=3, max_new_tokens=1), branches=1, temperature=temperature, top_k=top_k, seed=1)
    search.advance(logits.copy())
    without_image = np.where(np.arange(40) == 3, -np.inf, logits[0])
    assert search.results()[0].token_ids == (int(np.argmax(without_image)),)
