"""Log-likelihoods over HTTP: of candidates, and of a prompt itself, as evaluation harnesses ask."""

from __future__ import annotations

import msgspec
import pytest

import flamingo_export

from .conftest import ROOT, Client, data_url, image_part, user

QUESTION = "What colour is the square?"
EXAMPLES = ROOT / "examples"


def test_scores(client: Client, nano: flamingo_export.Model) -> None:
    colours = ["red", "green", "purple"]
    wanted = nano.score(f"<image>Question: {QUESTION} Answer:", colours, images=[EXAMPLES / "q.png"])
    found = client.post("/v1/score", {"model": "nano", "messages": user(image_part("q.png"), QUESTION), "candidates": colours})
    assert [score["logprob"] for score in found.json["scores"]] == pytest.approx([score.logprob for score in wanted], abs=1e-4)


def test_a_candidate_that_is_never_generated_has_no_number(client: Client) -> None:
    """Its log-probability is minus infinity, which JSON cannot say."""
    body = {"model": "nano", "messages": user(image_part("q.png"), QUESTION)}
    (alone,) = client.post("/v1/score", {**body, "candidates": ["red"]}).json["scores"]
    found = client.post("/v1/score", {**body, "candidates": ["red", "<image>"]})
    assert found.status == 200
    assert found.json["scores"][0]["logprob"] == pytest.approx(alone["logprob"], abs=1e-4)
    assert found.json["scores"][1]["logprob"] is None
    assert None in found.json["scores"][1]["token_logprobs"]


def test_echo_scores_the_prompt(client: Client, nano: flamingo_export.Model) -> None:
    """As an evaluation harness asks: the context's and the answer's tokens, no new ones."""
    (wanted,) = nano.score("<image>Output:", [" a purple square"], images=[EXAMPLES / "a.png"], end=False)
    body = {"model": "nano", "prompt": "<image>Output: a purple square", "images": [data_url(EXAMPLES / "a.png")]}
    found = client.post("/v1/completions", {**body, "max_tokens": 0, "echo": True, "logprobs": 1}).json
    values = found["choices"][0]["logprobs"]["token_logprobs"]
    count = len(wanted.token_logprobs)
    assert values[-count:] == pytest.approx(wanted.token_logprobs, abs=1e-4)
    assert values[0] is None


def test_echo_as_lm_evaluation_harness_asks(client: Client, nano: flamingo_export.Model) -> None:
    """It wants one new token, which it drops, and the likeliest at each place: whether an answer is the greedy one."""
    image = EXAMPLES / "a.png"
    greedy = nano.generate("<image>Output:", images=[image], beams=1)
    ids = nano.prepare(flamingo_export.Request(prompt="<image>Output:", media=[image])).token_ids.tolist()
    body = {
        "model": "nano",
        "images": [data_url(image)],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1,
        "echo": True,
    }

    def answer(words: list[int]) -> tuple[list[float], list[float]]:
        found = client.post("/v1/completions", {**body, "prompt": [[*ids, *words]]}).json
        values = found["choices"][0]["logprobs"]
        assert len(values["tokens"]) == len(values["top_logprobs"]) == len(ids) + len(words) + 1
        assert found["usage"]["completion_tokens"] == 1
        return values["token_logprobs"][len(ids) : -1], [max(top.values()) for top in values["top_logprobs"][len(ids) : -1]]

    words = list(greedy.token_ids[:-1])
    own, best = answer(words)
    assert own == best == pytest.approx(greedy.token_logprobs[:-1], abs=1e-4)
    own, best = answer([words[1], words[0]])
    assert own[0] < best[0] == pytest.approx(greedy.token_logprobs[0], abs=1e-4)


def test_echo_takes_tags_around_an_image_as_a_condition(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """IDEFICS writes <fake_token_around_image> after an image; it is never generated, so it has no log-probability to sum."""
    model = client.server.models.find("nano").model
    assert model.tokenizer is not None
    (around,) = model.tokenizer.encode("Output", add_bos=False)
    tokens = msgspec.structs.replace(model.config.tokens, banned=(around,))
    monkeypatch.setattr(model, "config", msgspec.structs.replace(model.config, tokens=tokens))
    body = {"model": "nano", "prompt": "<image>Output: a", "images": [data_url(EXAMPLES / "a.png")]}
    found = client.post("/v1/completions", {**body, "max_tokens": 0, "echo": True, "logprobs": 1}).json
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<BOS>", "<image>", "Output", ":", " a"]
    assert [value is None for value in logprobs["token_logprobs"]] == [True, True, True, False, False]
