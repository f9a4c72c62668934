"""bench: what is measured is what is said; the second question reuses prompt and images."""

from __future__ import annotations

import json

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


def test_prompts_differ_in_their_question_alone():
    one, other = make_requests(NANO, images=3, prompt_tokens=64, seed=1)
    assert len(one.prompt) == len(other.prompt) == 64
    assert isinstance(one.prompt, list)
    assert isinstance(other.prompt, list)
    assert one.prompt.count(NANO.tokens.image) == len(one.media) == 3
    assert one.prompt[:-16] == other.prompt[:-16]
    assert one.prompt[-16:] != other.prompt[-16:]
