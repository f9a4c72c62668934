"""Penalties, bans, biases and stop texts against transformers, each where transformers applies it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flamingo_export.errors import InputError
from flamingo_export.runtime.candidates import Candidates, candidates_of
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.search import Hypothesis
from flamingo_export.runtime.steering import HoldBack, cut_at
from flamingo_reference.config import ModelConfig

from .test_search import drive, until_eoc

EOC, VOCAB, NEW = 2, 23, 9


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    """Of the tiny language model; no token is banned but one that it does not have."""
    tokens = msgspec.structs.replace(tiny_config.tokens, image=0, pad=0)
    language_model = msgspec.structs.replace(tiny_config.language_model, vocab_size=VOCAB)
    return msgspec.structs.replace(tiny_config, tokens=tokens, language_model=language_model)


def letters(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in token_ids)


def found(model: Any, config: ModelConfig, prompt: list[int], **options: Any) -> list[Hypothesis]:
    """The texts of our search, best first."""
    import torch

    def logits(ids: list[int]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].numpy().copy()

    asked = GenerateOptions(max_new_tokens=NEW, **options)
    asked.check(config)
    return drive(asked.search(config, NEW, prompt=prompt, decode=letters), logits, prompt)


def expected(model: Any, prompt: list[int], beams: int, **options: Any) -> tuple[list[list[int]], list[float]]:
    """Those of transformers, and their scores."""
    import torch

    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
        # The pad token has no chance, as `<image>` has none here: its logit goes before the softmax.
        **options,
    )
    scores = [] if beams == 1 else result.sequences_scores.tolist()
    return [until_eoc(row.tolist()[len(prompt) :]) for row in result.sequences], scores


@pytest.fixture
def llama(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The language model without its pad token, so that no softmax knows it on either side."""
    import torch

    forward = tiny_llama.forward

    def without_pad(*args: Any, **rest: Any) -> Any:
        result = forward(*args, **rest)
        result.logits[..., 0] = -torch.inf
        return result

    monkeypatch.setattr(tiny_llama, "forward", without_pad)
    return tiny_llama


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition penalty": ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "repetition reward": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    "no repeated pair": ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    "no repeated token": ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
    "no repeated triple": ({"no_repeat_ngram": 3}, {"no_repeat_ngram_size": 3}),
    "minimum length": ({"min_new_tokens": 5}, {"min_new_tokens": 5}),
    "bias": ({"logit_bias": {7: 3.0, EOC: -4.0}}, {"sequence_bias": {(7,): 3.0, (EOC,): -4.0}}),
    "all": (
        {"repetition_penalty": 1.2, "no_repeat_ngram": 2, "min_new_tokens": 3, "logit_bias": {5: 2.0}},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "sequence_bias": {(5,): 2.0}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_same_texts_as_transformers(llama: Any, config: ModelConfig, name: str, beams: int) -> None:
    ours, theirs = CASES[name]
    changed = 0
    for first in range(4, 16, 2):
        prompt = [1, first, 5, first]
        texts, scores = expected(llama, prompt, beams, **theirs)
        mine = found(llama, config, prompt, beams=beams, num_return=beams, **ours)
        assert [list(text.token_ids) for text in mine] == texts
        if beams > 1:
            np.testing.assert_allclose([text.score for text in mine], scores, rtol=1e-4, atol=1e-4)
        plain = found(llama, config, prompt, beams=beams)
        changed += plain[0].token_ids != mine[0].token_ids
    assert changed, "the setting changed nothing, so nothing was shown"


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_early_stopping(llama: Any, config: ModelConfig, beams: int) -> None:
    for first in range(4, 16):
        texts, scores = expected(llama, [1, first, 5], beams, early_stopping=True)
        mine = found(llama, config, [1, first, 5], beams=beams, num_return=beams, early_stopping=True)
        assert [list(text.token_ids) for text in mine] == texts
        np.testing.assert_allclose([text.score for text in mine], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_texts(llama: Any, config: ModelConfig, beams: int) -> None:
    """transformers' own criterion wants its tokenizer, so it is given one of ours that looks for the same."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stops(StoppingCriteria):
        def __init__(self, prompt: int, stops: list[str]) -> None:
            self._prompt, self._stops = prompt, stops

        def __call__(self, input_ids: Any, scores: Any, **rest: Any) -> Any:
            import torch

            return torch.tensor(
                [any(stop in letters(row[self._prompt :].tolist()) for stop in self._stops) for row in input_ids]
            )

    ended = 0
    for first in range(4, 16):
        prompt = [1, first, 5]
        plain = letters(found(llama, config, prompt, beams=beams)[0].token_ids)
        stops = ["h", "kk", plain[2:4] or "rb"]
        texts, _ = expected(llama, prompt, beams, stopping_criteria=StoppingCriteriaList([Stops(len(prompt), stops)]))
        mine = found(llama, config, prompt, beams=beams, num_return=beams, stop=stops)
        stopped = [text for text in mine if any(stop in letters(text.token_ids) for stop in stops)]
        ended += len(stopped)
        assert all(text.reason == "stop" for text in stopped)
        cut = [
            next((ids[: n + 1] for n in range(len(ids)) if any(s in letters(ids[: n + 1]) for s in stops)), ids)
            for ids in texts
        ]
        assert [list(text.token_ids) for text in mine] == cut
    assert ended


def test_what_is_reported_is_the_models_own(llama: Any, config: ModelConfig) -> None:
    """Log-probabilities before penalties, and the likeliest tokens with theirs."""
    import torch

    prompt = [1, 6, 5, 6]
    for settings_ in (
        {"beams": 1},
        {"beams": 3, "num_return": 3},
        {"temperature": 1.3, "seed": 2, "num_return": 2},
        {"top_k": 4, "seed": 3},
    ):
        for steering in ({}, {"repetition_penalty": 1.7, "logit_bias": {9: 5.0}}, {"stop": "zz"}):
            for text in found(llama, config, prompt, top_logprobs=4, **settings_, **steering):
                with torch.no_grad():
                    logits = llama(torch.tensor([[*prompt, *text.token_ids]])).logits[0].double()
                exact = logits.log_softmax(-1)[len(prompt) - 1 : -1].numpy()
                np.testing.assert_allclose(text.token_logprobs, exact[np.arange(len(exact)), list(text.token_ids)], atol=1e-5)
                assert len(text.top) == len(text.token_ids)
                for top, row in zip(text.top, exact, strict=True):
                    best = np.argsort(-row)[:4]
                    assert [token for token, _ in top] == best.tolist()
                    np.testing.assert_allclose([logprob for _, logprob in top], row[best], atol=1e-5)


@pytest.mark.parametrize("rest", [{}, {"top_p": 0.7}, {"top_k": 6}, {"temperature": 0.6}])
def test_min_p_draws_what_transformers_leaves(llama: Any, config: ModelConfig, rest: dict[str, Any]) -> None:
    import torch
    from transformers.generation import logits_process as warpers

    prompt, min_p = [1, 8, 5], 0.25
    with torch.no_grad():
        logits = llama(torch.tensor([prompt])).logits[:, -1]
    if "temperature" in rest:
        logits = warpers.TemperatureLogitsWarper(rest["temperature"])(None, logits)
    if "top_k" in rest:
        logits = warpers.TopKLogitsWarper(rest["top_k"])(None, logits)
    if "top_p" in rest:
        logits = warpers.TopPLogitsWarper(rest["top_p"])(None, logits)
    wanted = warpers.MinPLogitsWarper(min_p)(None, logits).softmax(-1)[0].numpy()  # type: ignore[arg-type]
    options = GenerateOptions(max_new_tokens=1, min_p=min_p, num_return=400, seed=1, **rest)
    search = options.search(config, 1)
    with torch.no_grad():
        assert search.advance(llama(torch.tensor([prompt])).logits[:, -1].numpy().copy()) is None
    counts = np.bincount([text.token_ids[0] for text in search.results()], minlength=VOCAB) / 400
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(wanted))
    np.testing.assert_allclose(counts, wanted, atol=0.1)
    assert np.count_nonzero(wanted) < VOCAB - 1


def test_candidates_of_an_engine_give_the_same_where_they_suffice(llama: Any, config: ModelConfig) -> None:
    """An engine that finds the best 6 itself: they serve top_logprobs, and nothing that steers."""
    for options, needed in (
        (GenerateOptions(beams=2, top_logprobs=5), 5),
        (GenerateOptions(beams=1, top_logprobs=5), 5),
        (GenerateOptions(top_k=2, seed=1, top_logprobs=5), 5),
        (GenerateOptions(beams=2, repetition_penalty=1.1), None),
        (GenerateOptions(beams=2, stop="x"), None),
        (GenerateOptions(beams=1, stop="x"), 1),
    ):
        searches = [options.search(config, NEW, decode=letters) for _ in range(2)]
        assert searches[0].num_candidates == needed
        if needed is None:
            continue
        logits = np.random.default_rng(3).normal(0, 3, (1, VOCAB)).astype(np.float32)
        given_: Candidates = candidates_of(logits.copy(), (0,), 6)
        steps = [searches[0].advance(logits), searches[1].advance(given_)]
        assert steps[0] is not None
        assert steps[1] is not None
        assert steps[0].tokens.tolist() == steps[1].tokens.tolist()
        assert searches[0].certain()[0].top == searches[1].certain()[0].top


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab .", max_size=14),
    stops=st.lists(st.text("ab. ", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 14), max_size=5),
    strip=st.booleans(),
)
@example(text=" a", stops=[" a"], cuts=[], strip=True)
def test_pieces_join_to_what_stands_before_the_first_stop_text(
    text: str, stops: list[str], cuts: list[int], strip: bool
) -> None:
    """A request ends with the piece that brings the first stop text, so what a longer one would have begun with stays."""
    hold, places = HoldBack(stops, strip=strip), sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [hold.push(text[start:stop]) for start, stop in itertools.pairwise(places)]
    generated = next((text[:place] for place in places if any(stop in text[:place] for stop in stops)), text)
    found, right = "".join(pieces) + hold.finish(), cut_at(generated, stops)
    assert found == (right.strip() if strip else right)


def test_a_stop_text_that_another_one_begins_before() -> None:
    stops = ["a", ".aa"]
    assert cut_at(".aa", stops) == ""
    in_pieces, at_once = HoldBack(stops), HoldBack(stops)
    assert in_pieces.push(".a") + in_pieces.push("a") + in_pieces.finish() == "."
    assert at_once.push(".aa") + at_once.finish() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected more than 0"),
        ({"repetition_penalty": None}, "repetition_penalty is None, expected a number"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5, max_new_tokens only 4"),
        ({"top_logprobs": 21}, "top_logprobs is 21, expected at most 20"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias has a bias outside"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias is {'a': 1.0}, expected numbers by token id"),
        ({"logit_bias": {23: 1.0}}, "logit_bias names token 23, the model knows 0 to 22"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": 3}, "stop is 3, expected a text or a list of texts"),
        ({"early_stopping": True, "beams": 1}, "there are no beams to stop"),
        ({"early_stopping": 1}, "early_stopping is 1, expected True or False"),
        ({"temperature": 0.0, "min_p": 0.1}, "min_p is 0.1, and temperature 0 takes the likeliest"),
    ],
)
def test_settings_that_cannot_be(config: ModelConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateOptions(**options).check(config)


def test_stop_texts_want_a_tokenizer(config: ModelConfig) -> None:
    with pytest.raises(InputError, match="no tokenizer, so there is no text in which stop texts could be found"):
        GenerateOptions(stop="x").search(config, 3)


def noise(ids: list[int]) -> np.ndarray[Any, Any]:
    """Logits after any tokens."""
    return np.random.default_rng(len(ids)).normal(size=VOCAB).astype(np.float32)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("penalty", [1e-320, 1e-300, 1e9, 1e300])
@pytest.mark.parametrize("options", [{"beams": 1}, {"temperature": 1.0}, {"temperature": 1e-9}, {"top_p": 0.9}, {"top_k": 3}])
def test_any_penalty_leaves_a_token_to_choose(config: ModelConfig, options: dict[str, Any], penalty: float) -> None:
    """All of the vocabulary is in the prompt."""
    prompt = list(range(VOCAB))
    settings = GenerateOptions(max_new_tokens=NEW, repetition_penalty=penalty, **options)
    settings.check(config)
    (text,) = drive(settings.search(config, NEW, prompt=prompt), noise, prompt)
    assert text.token_ids
    assert all(0 < token < VOCAB for token in text.token_ids)
    assert np.isfinite(text.token_logprobs).all()


@pytest.mark.parametrize(
    "options",
    [
        *({"no_repeat_ngram": 1, **options} for options in ({"beams": 1}, {"temperature": 1.0}, {"top_p": 0.9}, {"beams": 3})),
        {"repetition_penalty": 1e300, "beams": 2},
    ],
)
def test_where_nothing_is_left_to_choose_the_settings_are_to_blame(config: ModelConfig, options: dict[str, Any]) -> None:
    prompt = list(range(VOCAB))
    search = GenerateOptions(max_new_tokens=NEW, **options).search(config, NEW, prompt=prompt)
    with pytest.raises(InputError, match="leave no token"):
        drive(search, noise, prompt)
