"""Bundles built from IDEFICS's weights against transformers: what the engines say, and the tokens that the runtime generates with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_runs import EngineRuns, assert_as_exact, opened
from idefics_models import IMAGE, PROMPTS, generated, our_model, pixels, their_config, their_logits, their_model

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
