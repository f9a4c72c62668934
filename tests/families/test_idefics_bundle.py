"""Bundles built from IDEFICS's weights against transformers: what the engines say, and the tokens that the runtime generates with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import EngineRuns, assert_as_exact, opened
from idefics_models import (
    END,
    FAKE,
    IMAGE,
    PROMPTS,
    generated,
    image_attention_mask,
    our_model,
    pixels,
    their_config,
    their_logits,
    their_model,
)

import flamingo_export


@pytest.fixture(scope="module", params=[(True, True), (False, False)], ids=["norms, vector gates", "no norms, scalar gates"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineRuns, Any]]:
    """Engines of a bundle, and transformers' model in fp32 that they were made from."""
    qk_norm, vector = request.param
    theirs = their_model(their_config(qk_norm=qk_norm, vector=vector), seed=3).float()
    bundle: Path = tmp_path_factory.mktemp("idefics") / "idefics.bundle"
    flamingo_export.build(our_model(theirs), out=bundle, parity="skip")
    with opened(bundle) as runs:
        yield runs, theirs


@pytest.mark.parametrize("case", PROMPTS)
def test_logits(built: tuple[EngineRuns, Any], case: str) -> None:
    runs, theirs = built
    tokens = PROMPTS[case]
    images = pixels(tokens.count(IMAGE), seed=1).float()
    exact = their_logits(copy.deepcopy(theirs).double(), tokens, images.double())
    assert_as_exact(runs.logits(tokens, images[0]), exact, their_logits(theirs, tokens, images))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["one image", "several images", "text before the first image", "an end, then another image"])
def test_generated_tokens(built: tuple[EngineRuns, Any], case: str, beams: int) -> None:
    runs, theirs = built
    tokens = PROMPTS[case]
    images = pixels(tokens.count(IMAGE), seed=1)
    wanted, scores = generated(copy.deepcopy(theirs).double(), tokens, images, beams=beams, new_tokens=10)
    found = runs.generate(tokens, images[0], beams=beams, new_tokens=10)
    assert [list(each.token_ids) for each in found] == wanted
    if beams > 1:
        assert [each.score for each in found] == pytest.approx(scores, abs=1e-4)


def test_a_prompt_that_ends_with_the_end_of_a_text(built: tuple[EngineRuns, Any]) -> None:
    """What is generated after it sees no image, as in training; transformers' generate goes on with the mask of `</s>` itself, which does."""
    runs, theirs = built
    prompt = [1, 7, FAKE, IMAGE, FAKE, 20, END]
    images = pixels(1, seed=1)
    exact = copy.deepcopy(theirs).double()
    (found,) = runs.generate(prompt, images[0], beams=1, new_tokens=3)
    fed = [*prompt, *found.token_ids[:-1]]

    def logprobs(mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = exact(input_ids=torch.tensor([fed]), pixel_values=images, image_attention_mask=mask).logits[0]
        out[:, [IMAGE, FAKE]] = -torch.inf
        return out.log_softmax(-1)[len(prompt) - 1 :].gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]

    as_trained = image_attention_mask(fed, 1)
    assert as_trained[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, *[0] * (len(fed) - len(prompt))]
    np.testing.assert_allclose(found.token_logprobs, logprobs(as_trained), atol=1e-4)
    as_generated = torch.cat(
        [as_trained[:, : len(prompt)], as_trained[:, len(prompt) - 1 : len(prompt)].repeat(1, 2, 1)], dim=1
    )
    assert (logprobs(as_generated) - logprobs(as_trained))[1:].abs().max() > 1e-3
