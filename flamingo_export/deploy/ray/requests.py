"""What the ingress does to a body before a replica sees it: a seed, so that a second try draws the same, and where it belongs."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

SEEDED = ("/v1/chat/completions", "/v1/completions")
_BEGINNING = 256
"""Characters of a raw prompt that decide where it goes."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What goes on to a replica.

    body: with a seed, if it is a request that may draw and had none. streams: whether the answer is a stream.
    key: what requests that begin alike have in common, a digest of their first shot, image or words; empty where there is nothing of that kind.
    A replica that has answered one of them holds the beginning in its cache, and the image in its bank.
    """

    body: bytes
    streams: bool = False
    key: str = ""


def passed(path: str, body: bytes) -> Passed:
    """A client's body for a path. One that is not an object of JSON is left for the replica to refuse."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Passed(body=body)
    if not isinstance(found, dict):
        return Passed(body=body)
    first = _first(found)
    key = "" if first is None else hashlib.sha256(msgspec.json.encode(first, order="sorted")).hexdigest()
    streams = found.get("stream") is True
    if path in SEEDED and found.get("seed") is None:
        body = msgspec.json.encode({**found, "seed": secrets.randbelow(1 << 31)})
    return Passed(body=body, streams=streams, key=key)


def _first(body: dict[str, Any]) -> Any:
    for name in ("shots", "images"):
        if isinstance(body.get(name), list) and body[name]:
            return body[name][0]
    messages = body.get("messages")
    if isinstance(messages, list):
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list) and content:
                return content[0]
            if isinstance(content, str) and content:
                return content[:_BEGINNING]
    prompt = body.get("prompt")
    if isinstance(prompt, str | list) and prompt:
        return prompt[:_BEGINNING]
    return None


def ranked(key: str, replicas: list[str]) -> list[int]:
    """Places of the replicas, the one that a key belongs to first (rendezvous hashing): one that joins or leaves moves few keys."""
    return sorted(
        range(len(replicas)), key=lambda place: hashlib.sha256(f"{key}|{replicas[place]}".encode()).digest(), reverse=True
    )
