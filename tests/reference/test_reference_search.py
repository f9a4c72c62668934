"""The search oracle against transformers' own generate, against exhaustive search, and on ties."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import TINY

from flamingo_reference.model import Flamingo
from flamingo_reference.phi import phi_from_tokens
from flamingo_reference.search import (
    NextLogits,
    Rules,
    beam_search,
    flamingo_next_logits,
    greedy,
    log_probabilities,
    score_candidates,
)

EOC, IMAGE, VOCAB = 2, 3, 13
PROMPT = [1, 5, 7]


def table_model(seed: int, vocab: int = VOCAB) -> NextLogits:
    """Logits that depend on the last two tokens and the length."""
    table = np.random.default_rng(seed).standard_normal((vocab, vocab, 8, vocab)) * 2.0

    def next_logits(ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return np.array([table[row[-1], row[-2], len(row) % 8] for row in ids])

    return next_logits


@pytest.fixture(scope="module")
def gpt2() -> Callable[[int], Any]:
    """Tiny random GPT-2 models that never give `<image>` a chance, as a Flamingo's logits are used."""
    transformers: Any = pytest.importorskip("transformers")

    class WithoutImage(transformers.GPT2LMHeadModel):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits[..., IMAGE] = -math.inf
            output.logits[..., EOC] += 2.0  # texts of many lengths
            return output

    @functools.cache
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.6,
            bos_token_id=1,
            eos_token_id=EOC,
        )
        return WithoutImage(config).eval()

    return make


def logits_of(model: Any) -> NextLogits:
    def next_logits(ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        with torch.no_grad():
            return model(torch.from_numpy(ids), use_cache=False).logits[:, -1].numpy()

    return next_logits


@pytest.mark.parametrize("max_new_tokens", [1, 12])
@pytest.mark.parametrize(("beams", "length_penalty"), [(1, 0.0), *itertools.product([2, 3, 5], [0.0, 1.0, -0.7]), (3, 2.0)])
def test_same_as_transformers(gpt2: Callable[[int], Any], beams: int, length_penalty: float, max_new_tokens: int) -> None:
    lengths = set()
    for seed in range(4):
        model = gpt2(seed)
        output = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            early_stopping=False,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            eos_token_id=EOC,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        rules = Rules(eoc=EOC, image=IMAGE, max_new_tokens=max_new_tokens)
        result = beam_search(logits_of(model), PROMPT, rules, beams=beams, length_penalty=length_penalty)
        # Below this, transformers' fp32 sums decide: choose other seeds rather than compare less.
        assert result.closest > 1e-5
        logprobs = model.compute_transition_scores(
            output.sequences, output.scores, output.get("beam_indices"), normalize_logits=beams == 1
        )
        assert len(result.hypotheses) == beams
        for rank, hypothesis in enumerate(result.hypotheses):
            theirs = output.sequences[rank, len(PROMPT) :].tolist()
            if EOC in theirs:
                theirs = theirs[: theirs.index(EOC) + 1]
            assert list(hypothesis.token_ids) == theirs, (seed, rank)
            np.testing.assert_allclose(hypothesis.token_logprobs, logprobs[rank, : len(theirs)], rtol=1e-4, atol=1e-5)
            if beams > 1:
                assert hypothesis.score == pytest.approx(output.sequences_scores[rank].item(), rel=1e-4)
            lengths.add(len(theirs))
    if max_new_tokens == 12:
        assert len(lengths) > 1, "every text has the same length: nothing was said about when to stop"


def test_wide_beams_find_what_exhaustive_search_finds() -> None:
    """Five tokens, one of them never generated, texts of at most four: 120 and some texts, all of them seen by 128 beams."""
    vocab, longest = 5, 4
    model = table_model(3, vocab)
    rules = Rules(eoc=EOC, image=IMAGE, max_new_tokens=longest)
    texts = []
    for length in range(1, longest + 1):
        for text in itertools.product([0, 1, 2, 4], repeat=length):
            if EOC not in text[:-1] and (text[-1] == EOC or length == longest):
                texts.append(text)
    wanted = sorted(score_candidates(model, [1, 4], texts, image=IMAGE), key=lambda hypothesis: -hypothesis.score)
    assert math.fsum(math.exp(hypothesis.score) for hypothesis in wanted) == pytest.approx(1.0, abs=1e-12)
    found = beam_search(model, [1, 4], rules, beams=128).hypotheses
    assert len(found) == len(texts) == 121
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.score == pytest.approx(theirs.score, abs=1e-12)


def test_one_beam_is_greedy() -> None:
    rules = Rules(eoc=EOC, image=IMAGE, max_new_tokens=9)
    assert beam_search(table_model(0), PROMPT, rules, beams=1) == greedy(table_model(0), PROMPT, rules)


@pytest.mark.parametrize("seed", range(5))
def test_logprobs_are_those_of_scoring(seed: int) -> None:
    rules = Rules(eoc=EOC, image=IMAGE, max_new_tokens=6)
    model = table_model(seed)
    for result in (greedy(model, PROMPT, rules), beam_search(model, PROMPT, rules, beams=3)):
        texts = [hypothesis.token_ids for hypothesis in result.hypotheses]
        for ours, scored in zip(result.hypotheses, score_candidates(model, PROMPT, texts, image=IMAGE), strict=True):
            np.testing.assert_allclose(ours.token_logprobs, scored.token_logprobs, rtol=1e-12)
            assert ours.score == pytest.approx(scored.score, rel=1e-12)
            assert IMAGE not in ours.token_ids


def test_margins_say_how_far_numbers_may_move() -> None:
    """Logits off by less than half the closest margin a step never change the result, whatever way they are off."""
    rules = Rules(eoc=EOC, image=IMAGE, max_new_tokens=6)
    moved = 0
    for seed in range(12):
        model, noise = table_model(seed), np.random.default_rng(seed)

        def off(
            ids: npt.NDArray[np.int64], size: float, model: NextLogits = model, noise: np.random.Generator = noise
        ) -> npt.NDArray[Any]:
            logits = model(ids)
            return logits + size * noise.choice([-1.0, 1.0], logits.shape)

        result = beam_search(model, PROMPT, rules, beams=3)
        texts = [hypothesis.token_ids for hypothesis in result.hypotheses]
        # A log-probability moves by at most twice what logits move by, a sum of six by twelve times that, two sums by twice as much.
        harmless = result.closest / (2 * 2 * 6) * 0.99
        for size, allowed in ((harmless, 0), (1.0, 1)):
            other = beam_search(partial(off, size=size), PROMPT, rules, beams=3)
            changed = [hypothesis.token_ids for hypothesis in other.hypotheses] != texts
            assert changed <= allowed
            moved += changed
    assert moved > 0


def flat_model(*favoured: int) -> NextLogits:
    """The same logits always: 1 for the favoured tokens, 0 for the others."""

    def next_logits(ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        logits = np.zeros((len(ids), VOCAB))
        logits[:, list(favoured)] = 1.0
        return logits

    return next_logits


def test_ties_are_reported_and_the_lower_id_is_taken() -> None:
    rules = Rules(eoc=EOC, image=IMAGE, max_new_tokens=2)
    result = greedy(flat_model(9, 5), PROMPT, rules)
    assert result.hypotheses[0].token_ids == (5, 5)
    assert result.margins == (0.0, 0.0)
    assert result.ties(within=1e-9) == (0, 1)
    beams = beam_search(flat_model(9, 5), PROMPT, rules, beams=3)
    assert [hypothesis.token_ids for hypothesis in beams.hypotheses] == [(5, 5), (5, 9), (9, 5)]
    assert beams.closest == 0.0
    assert 1 in beams.ties(within=1e-9)
    apart = greedy(flat_model(5), PROMPT, rules)
    assert apart.margins == pytest.approx((1.0, 1.0))
    assert apart.ties(within=0.5) == ()


def test_image_is_never_generated_and_takes_no_probability() -> None:
    result = greedy(flat_model(IMAGE, 5), PROMPT, Rules(eoc=EOC, image=IMAGE, max_new_tokens=1))
    assert result.hypotheses[0].token_ids == (5,)
    assert result.hypotheses[0].token_logprobs[0] == pytest.approx(1.0 - math.log(math.e + VOCAB - 2))


def test_the_end_is_part_of_the_text() -> None:
    found = greedy(flat_model(EOC), PROMPT, Rules(eoc=EOC, image=IMAGE, max_new_tokens=5))
    assert found.hypotheses[0].token_ids == (EOC,)


def test_bad_requests() -> None:
    rules, model = Rules(eoc=EOC, image=IMAGE, max_new_tokens=1), flat_model(5)
    with pytest.raises(ValueError, match="the prompt is empty"):
        greedy(model, [], rules)
    with pytest.raises(ValueError, match="0 beams, expected at least 1"):
        beam_search(model, PROMPT, rules, beams=0)
    with pytest.raises(ValueError, match=r"candidate \[\]"):
        score_candidates(model, PROMPT, [[4], []], image=IMAGE)
    with pytest.raises(ValueError, match=r"candidate \[4, 3\]"):
        score_candidates(model, PROMPT, [[4, 3]], image=IMAGE)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Rules(eoc=EOC, image=IMAGE, max_new_tokens=0)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            log_probabilities(np.array([[0.0, value, 0.0, 0.0]]), banned=3)


def test_flamingo_as_a_model(tiny: Flamingo, bank: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """What the whole model says follows, media included."""
    prompt, rows = [1, 3, 7, 8, 3, 9], [2, 0]
    next_logits = flamingo_next_logits(tiny, bank, rows)
    rules = Rules(eoc=TINY.tokens.eoc, image=TINY.tokens.image, max_new_tokens=5)
    result = beam_search(next_logits, prompt, rules, beams=3)
    for hypothesis in result.hypotheses:
        tokens = np.array([[*prompt, *hypothesis.token_ids]])
        phi = torch.from_numpy(phi_from_tokens(tokens, TINY.tokens.image))
        logits = tiny(torch.from_numpy(tokens), bank, torch.tensor([rows]), phi)[0].clone()
        logits[:, TINY.tokens.image] = -math.inf
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        wanted = logprobs.gather(1, torch.tensor(hypothesis.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(hypothesis.token_logprobs, wanted.numpy(), rtol=1e-10)
    other = flamingo_next_logits(tiny, bank, [2, 1])
    assert np.abs(other(np.array([prompt])) - next_logits(np.array([prompt]))).max() > 1e-3
