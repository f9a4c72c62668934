"""Raw prompts over HTTP, and what follows them."""

from __future__ import annotations

import pytest

import flamingo_export

from .conftest import ROOT, Client, data_url

EXAMPLES = ROOT / "examples"


def test_completions_of_a_raw_prompt(client: Client, nano: flamingo_export.Model) -> None:
    wanted = nano.generate("<image>Output:", images=[EXAMPLES / "a.png"], beams=1)
    body = {"model": "nano", "prompt": "<image>Output:", "images": [data_url(EXAMPLES / "a.png")], "logprobs": 1}
    found = client.post("/v1/completions", body).json
    assert found["choices"][0]["text"].strip() == wanted.text
    assert found["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(wanted.token_logprobs, abs=1e-4)


def test_offsets_are_places_in_the_text(client: Client) -> None:
    """In a stream too, and where the prompt has tags, which the text leaves out."""
    body = {"model": "nano", "prompt": "<image>Output:", "images": [data_url(EXAMPLES / "a.png")], "logprobs": 1}
    (choice,) = client.post("/v1/completions", body).json["choices"]
    (echoed,) = client.post("/v1/completions", {**body, "echo": True}).json["choices"]
    for text, found in ((choice["text"], choice["logprobs"]), (echoed["text"], echoed["logprobs"])):
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert token in ("<BOS>", "<image>", "<EOC>") or text[offset:].startswith(token)
    events = client.post("/v1/completions", {**body, "stream": True}).events[:-1]
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert [offset for piece in pieces if piece for offset in piece["text_offset"]] == choice["logprobs"]["text_offset"]


def test_echo_cuts_what_follows_at_a_stop_text(client: Client) -> None:
    """And not the prompt, which may hold one."""
    body = {"model": "nano", "prompt": "Output: a red", "max_tokens": 12}
    (whole,) = client.post("/v1/completions", body).json["choices"]
    for stop in (whole["text"][3:6], "red"):
        (cut,) = client.post("/v1/completions", {**body, "stop": stop}).json["choices"]
        (echoed,) = client.post("/v1/completions", {**body, "stop": stop, "echo": True}).json["choices"]
        assert echoed["text"] == body["prompt"] + cut["text"]
