"""Bundles of Llama 3.2 Vision's kind in the runtime, against transformers' own generation: images of 1 to 4 tiles, alone and side by side,
shared beginnings, branches, scores, callers side by side, a bank that is too small for all.

transformers' model is used with its two corrections (`llama_models.corrected`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import EngineRuns, assert_as_exact, opened
from llama_models import END, IMAGE, PROMPTS, TURN, corrected, generated, our_model, pixels, their_logits, their_model, tiles_of

import flamingo_export
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Prepared

NEW = 8


@pytest.fixture(scope="module")
def theirs() -> Any:
    return their_model(seed=3)


@pytest.fixture(scope="module")
def runs(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRuns]:
    bundle: Path = tmp_path_factory.mktemp("llama") / "llama.bundle"
    flamingo_export.build(our_model(theirs).float(), out=bundle, parity="skip")
    with opened(bundle) as runs:
        yield runs
    theirs.double()


def prompt(case: str) -> tuple[list[int], list[int], torch.Tensor]:
    tokens, aspects = PROMPTS[case]
    return tokens, aspects, pixels(aspects, seed=1)


def asking(runs: EngineRuns, case: str) -> Prepared:
    tokens, aspects, images = prompt(case)
    return runs.prepared(tokens, images, aspects)


def wanted(theirs: Any, tokens: list[int], aspects: Sequence[int], images: torch.Tensor, beams: int) -> list[list[int]]:
    with corrected(theirs) as model:
        return generated(model, tokens, aspects, images, beams=beams, new_tokens=NEW)[0]


def ids(outcome: Any) -> list[list[int]]:
    return [list(each.token_ids) for each in outcome.hypotheses]


@pytest.mark.parametrize("case", PROMPTS)
def test_logits(runs: EngineRuns, theirs: Any, case: str) -> None:
    tokens, aspects, images = prompt(case)
    with corrected(theirs) as model:
        exact = their_logits(model, tokens, aspects, images)
        eager = their_logits(model.float(), tokens, aspects, images.float())
        model.double()
    assert_as_exact(runs.logits(tokens, images, aspects), exact, eager)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", PROMPTS)
def test_generated_tokens(runs: EngineRuns, theirs: Any, case: str, beams: int) -> None:
    tokens, aspects, images = prompt(case)
    found = runs.generate(tokens, images, aspects, beams=beams, new_tokens=NEW)
    assert [list(each.token_ids) for each in found] == wanted(theirs, tokens, aspects, images, beams)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_prompts_in_chunks_of_few_positions(runs: EngineRuns, theirs: Any, chunk: int) -> None:
    """A chunk may begin within a group of images, or between an image and its text."""
    for case in ("adjacent images", "three in a group", "several images"):
        tokens, aspects, images = prompt(case)
        engine = runs.engine(chunk=chunk)
        ticket = engine.submit(runs.prepared(tokens, images, aspects), GenerateOptions(beams=1, max_new_tokens=NEW), wake=False)
        (outcome,) = engine.complete(ticket)
        assert ids(outcome) == wanted(theirs, tokens, aspects, images, 1), case


def test_callers_side_by_side_with_other_images_each(runs: EngineRuns, theirs: Any) -> None:
    """Images that lie apart in the bank, shared ones, none at all, beams beside greedy: each gets what it gets alone."""
    engine = runs.engine()
    asked = [(case, beams) for case, beams in zip(PROMPTS, [1, 3, 2, 1, 3, 1, 2, 3, 1], strict=True)]
    tickets = [
        engine.submit(asking(runs, case), GenerateOptions(beams=beams, max_new_tokens=NEW, num_return=beams), wake=False)
        for case, beams in asked
    ]
    for (case, beams), outcome in zip(asked, engine.complete(*tickets), strict=True):
        assert ids(outcome) == wanted(theirs, *prompt(case), beams), case
    assert engine.stats().bank_rows_in_use == 0


def test_a_second_question_about_the_same_image_encodes_nothing_and_computes_what_is_new(runs: EngineRuns, theirs: Any) -> None:
    """The image is found by its pixels, though it stood behind another one before; a beginning that shows it is found with its keys."""
    engine = runs.engine()
    tokens, aspects, images = prompt("adjacent images")
    first = engine.submit(runs.prepared(tokens, images, aspects), GenerateOptions(max_new_tokens=2), wake=False)
    engine.complete(first)
    assert engine.stats().media_encoded == 3
    again = [*tokens[:-1], 33, 34]
    second = engine.submit(runs.prepared(again, images, aspects), GenerateOptions(beams=3, max_new_tokens=NEW), wake=False)
    (outcome,) = engine.complete(second)
    assert engine.stats().media_encoded == 3
    assert second.timings.reused_tokens == len(tokens) - 1
    assert ids(outcome)[0] == wanted(theirs, again, aspects, images, 3)[0]
    alone = [1, IMAGE, 40, 41]  # the second of the two, without the first
    third = engine.submit(
        runs.prepared(alone, images[1:2], aspects[1:2]), GenerateOptions(beams=1, max_new_tokens=NEW), wake=False
    )
    (outcome,) = engine.complete(third)
    assert engine.stats().media_encoded == 3
    assert ids(outcome) == wanted(theirs, alone, aspects[1:2], images[1:2], 1)


def test_a_bank_of_few_rows_gives_up_whole_images(runs: EngineRuns, theirs: Any) -> None:
    engine = runs.engine(bank_rows=7)
    for case in ("image first", "adjacent images", "one tile", "three in a group", "image first", "several images"):
        tokens, aspects, images = prompt(case)
        if sum(tiles_of(aspects)) > 7:
            with pytest.raises(CapacityError, match=r"images and videos of \d+ tiles are needed at once, the bank holds 7"):
                engine.submit(runs.prepared(tokens, images, aspects), GenerateOptions(), wake=False)
            continue
        ticket = engine.submit(runs.prepared(tokens, images, aspects), GenerateOptions(beams=1, max_new_tokens=NEW), wake=False)
        (outcome,) = engine.complete(ticket)
        assert ids(outcome) == wanted(theirs, tokens, aspects, images, 1), case


def test_scores_are_sums_of_their_log_probabilities(runs: EngineRuns, theirs: Any) -> None:
    engine = runs.engine()
    candidates = [[30, 31, END], [32], [30, 44, 45, TURN]]
    for case in ("adjacent images", "text first", "text only"):
        tokens, aspects, images = prompt(case)
        ticket = engine.submit_score(runs.prepared(tokens, images, aspects), candidates, wake=False)
        (found,) = engine.complete(ticket)
        with corrected(theirs) as model:
            for candidate, logprobs in zip(candidates, found, strict=True):
                logits = their_logits(model, [*tokens, *candidate], aspects, images)
                exact = logits.log_softmax(-1)[len(tokens) - 1 : -1].gather(-1, torch.tensor(candidate)[:, None])[:, 0]
                np.testing.assert_allclose(logprobs, exact.numpy(), atol=2e-5, err_msg=case)


def test_more_tiles_than_a_token_may_see_are_refused_before_anything_is_run(runs: EngineRuns) -> None:
    engine = runs.engine(max_tiles=3)
    tokens, aspects, images = prompt("adjacent images")
    with pytest.raises(CapacityError, match=r"stand side by side have 4 tiles together.*the bundle allows 3"):
        engine.submit(runs.prepared(tokens, images, aspects), GenerateOptions(), wake=False)
    apart = [token for place, token in enumerate(tokens) for token in ([12, token] if place == 3 else [token])]
    engine.complete(engine.submit(runs.prepared(apart, images, aspects), GenerateOptions(max_new_tokens=1), wake=False))


def test_steps_bind_what_is_looked_at_and_copy_nothing(runs: EngineRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiles of an image side by side, no keys or values of media move in prefill or in steps."""
    engine: Engine = runs.engine()
    shapes: list[tuple[int, ...]] = []
    decoder = engine.loop.decoder
    bind = type(decoder).bind

    def seen(self: Any, name: str, buffer: Any) -> None:
        if name.startswith("media_k."):
            shapes.append(buffer.shape)
        bind(self, name, buffer)

    monkeypatch.setattr(type(decoder), "bind", seen)
    monkeypatch.setattr("flamingo_export.runtime.media_views.MediaViews._take", None)
    tokens, aspects, images = prompt("image first")
    options = GenerateOptions(beams=3, max_new_tokens=NEW)
    engine.complete(*[engine.submit(runs.prepared(tokens, images, aspects), options, wake=False) for _ in range(3)])
    layers = len(runs.config.gated_layers)
    # A first token that sees nothing and the others are one chunk, steps follow with the same rows.
    assert shapes[-layers:] == [(4, *shapes[0][1:])] * layers
    assert len(shapes) == layers
