"""What the ingress does to a body before a replica sees it: a seed, so that a second try draws the same, and where it belongs."""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Any

import msgspec

SEEDED = ("/v1/chat/completions", "/v1/completions")
_BEGINNING = 256
"""Characters of a raw prompt that decide where it goes."""


def with_seed(path: str, body: bytes) -> bytes:
    """The body with a seed, if it is a request that may draw and has none. What is not such a body is left for the replica to refuse."""
    if path not in SEEDED:
        return body
    found = _object(body)
    if found is None or found.get("seed") is not None:
        return body
    return msgspec.json.encode({**found, "seed": secrets.randbelow(1 << 31)})


def streams(body: bytes) -> bool:
    """Whether the answer is a stream."""
    found = _object(body)
    return found is not None and found.get("stream") is True


def belongs_to(body: bytes) -> str:
    """What requests that begin alike have in common: a digest of their first shot, image or words. Empty where there is nothing of that kind.

    A replica that has answered one of them holds the beginning in its cache, and the image in its bank.
    """
    found = _object(body)
    if found is None:
        return ""
    first = _first(found)
    return "" if first is None else hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()


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


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def ranked(key: str, replicas: list[str]) -> list[int]:
    """Places of the replicas, the one that a key belongs to first (rendezvous hashing): one that joins or leaves moves few keys."""
    return sorted(
        range(len(replicas)), key=lambda place: hashlib.sha256(f"{key}|{replicas[place]}".encode()).digest(), reverse=True
    )
