"""Streams: the whole answer in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import ExitStack
from typing import Any

import pytest

from flamingo_export.serve.transport import EventStream

from .conftest import Client, image_part, user


def test_a_stream_is_the_whole_in_pieces(client: Client) -> None:
    whole = client.chat(messages=user(image_part()), logprobs=True).json
    stream = client.chat(messages=user(image_part()), logprobs=True, stream=True, stream_options={"include_usage": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    *events, done = stream.events
    assert done == "[DONE]"
    *chunks, last = events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["choices"][0]["message"]["content"]
    tokens = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [token["token"] for token in tokens] == [token["token"] for token in whole["choices"][0]["logprobs"]["content"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("settings", [{"temperature": 1.5, "n": 6, "seed": 5}, {"beams": 3, "n": 2}])
def test_several_texts_stream_as_they_come_whole(client: Client, settings: dict[str, float]) -> None:
    whole = client.chat(messages=user(image_part()), **settings).json
    events = client.chat(messages=user(image_part()), stream=True, **settings).events[:-1]
    choices = [event["choices"][0] for event in events]
    texts = [
        "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)
        for index in range(len(whole["choices"]))
    ]
    # Whole they come best first; samples stream in the order in which they were drawn.
    assert sorted(texts) == sorted(choice["message"]["content"] for choice in whole["choices"])
    if "beams" in settings:
        assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_fewer_texts_than_were_asked_for_stream_as_they_are_answered(client: Client) -> None:
    """There are three ways to write one letter: with a blank before it, with the two as one token, and without."""
    body = {"model": "nano", "prompt": "a", "regex": "a", "beams": 8, "n": 8, "max_tokens": 5}
    whole = client.post("/v1/completions", body).json["choices"]
    *events, done = client.post("/v1/completions", {**body, "stream": True}).events
    assert 0 < len(whole) < 8
    assert done == "[DONE]"
    pieces = [choice for event in events for choice in event["choices"]]
    for choice in whole:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_a_client_that_takes_nothing_does_not_hold_its_request() -> None:
    """Its connection is open, what lies in between is full, and it reads no more."""
    sent: list[MutableMapping[str, Any]] = []
    ended: list[str] = []

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            ended.append("events")

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if len(sent) == 4:
            await asyncio.sleep(60)
        sent.append(message)

    closing = ExitStack()
    closing.callback(ended.append, "request")
    asyncio.run(asyncio.wait_for(EventStream(events(), closing, {}, seconds=0.05)({"type": "http"}, receive, send), 30))
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 3]
    assert ended == ["events", "request"]
