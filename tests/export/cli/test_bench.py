"""bench: what is measured is what is said; the second question reuses prompt and images."""

from __future__ import annotations

import json

import pytest

from flamingo_export.backends.onnxruntime import OnnxRuntimeSession
from flamingo_export.cli.bench import make_requests
from flamingo_reference.config import NANO


def test_the_second_question_reuses_prompt_and_images(cli, bundle):
    outcome = cli("bench", bundle, "--repeat", 1, "--images", 2, "--prompt-tokens", 60, "--new-tokens", 4, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert [(row["case"], row["beams"]) for row in result["rows"]] == [
        ("new images", 1), ("second question", 1), ("new images", 3), ("second question", 3),
    ]  # fmt: skip
    for row in result["rows"]:
        second = row["case"] == "second question"
        assert row["reused_media"] == (2 if second else 0)
        assert row["reused_tokens"] >= 60 - 16 if second else row["reused_tokens"] <= 1
        assert row["first_token"] >= row["prefill"] > 0


def test_the_table(cli, bundle):
    outcome = cli("bench", bundle, "--repeat", 1, "--images", 1, "--prompt-tokens", 20, "--new-tokens", 2)
    assert outcome.code == 0, outcome.err
    assert "second question" in outcome.out
    assert cli("bench", bundle, "--images", 4, "--prompt-tokens", 20).code == 2


@pytest.mark.slow
def test_requests_side_by_side(cli, bundle, monkeypatch):
    """Rows are asked for as many as are measured; a step of several requests is one call of so many rows."""
    calls = []
    run = OnnxRuntimeSession.run

    def counted(self, feeds, *rest, **more):
        if "write_index" in feeds and feeds["token_ids"].shape[1] in (1, 2):
            calls.append(feeds["token_ids"].shape)
        return run(self, feeds, *rest, **more)

    monkeypatch.setattr(OnnxRuntimeSession, "run", counted)
    words = ("--repeat", 1, "--images", 1, "--prompt-tokens", 40, "--new-tokens", 2, "--beams", 2)
    outcome = cli("bench", bundle, *words, "--batch", "17,1", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["batches"]
    assert [(row["requests"], row["beams"], row["slots"]) for row in found] == [
        (1, 1, 44),
        (17, 1, 44),
        (1, 2, 44),
        (17, 2, 44),
    ]
    assert {(17, 1), (17, 2)} <= set(calls)
    for row in found:
        assert row["tokens_per_second"] == pytest.approx(row["requests"] / row["step"])
    outcome = cli("bench", bundle, *words, "--batch", "2")
    assert "requests side by side, up to 44 cache slots each" in outcome.out


def test_numbers_of_requests_that_cannot_be(cli, bundle):
    for text in ("", "0,8", "8;64", "-1", "eight"):
        outcome = cli("bench", bundle, "--batch", text)
        assert outcome.code == 2
        assert "is not a list of numbers of requests, as 1,8,64" in outcome.err
    outcome = cli("bench", bundle, "--repeat", 1, "--images", 1, "--prompt-tokens", 40, "--batch", "1,500")
    assert outcome.code == 1
    assert "500 requests show an image each, the bundle's media bank holds" in outcome.err


def test_prompts_differ_in_their_question_alone():
    one, other = make_requests(NANO, images=3, prompt_tokens=64, seed=1)
    assert len(one.prompt) == len(other.prompt) == 64
    assert isinstance(one.prompt, list)
    assert isinstance(other.prompt, list)
    assert one.prompt.count(NANO.tokens.image) == len(one.media) == 3
    assert one.prompt[:-16] == other.prompt[:-16]
    assert one.prompt[-16:] != other.prompt[-16:]
