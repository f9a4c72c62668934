"""A stream that another replica takes up: what was sent is skipped where it repeats, word for word.

Replicas answer alike: greedy search and beams choose the same, samples have their seed. Where a stream nevertheless takes another course (two
tokens as likely as each other to the last digits), there is no honest way on, and the client reads an error event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

_END = b"\n\n"
DONE = b"data: [DONE]\n\n"


class Diverged(Exception):
    """The second try says something else than the first had said."""


@dataclass
class _Said:
    """Of one choice: text, number of tokens with log-probabilities, and whether it has begun and ended."""

    text: str = ""
    tokens: int = 0
    begun: bool = False
    ended: bool = False


@dataclass
class Replay:
    """What a client has read of a stream, over however many tries."""

    sent: dict[int, _Said] = field(default_factory=dict)
    finished: bool = False
    """Whether the last event was sent."""
    _head: dict[str, Any] = field(default_factory=dict)
    _now: dict[int, _Said] = field(default_factory=dict)
    _usage: bool = False
    _failed: bool = False
    """Whether the present try said that it cannot continue, and why."""
    _left: bytes = b""

    def begin(self) -> None:
        """Another try."""
        self._now, self._left, self._failed = {}, b"", False

    def push(self, data: bytes) -> list[bytes]:
        """Events that a try brings, as bytes in any pieces; returns those that the client has not read yet. Raises Diverged."""
        *whole, self._left = (self._left + data).split(_END)
        found: list[bytes] = []
        for raw in whole:
            found += self._event(raw.removeprefix(b"data: "))
        return found

    def _event(self, raw: bytes) -> list[bytes]:
        if raw == b"[DONE]":
            if not self._failed and any(
                said.text and not self._now.get(index, _Said()).text for index, said in self.sent.items()
            ):
                raise Diverged
            self.finished = True
            return [DONE]
        body = msgspec.json.decode(raw)
        if "error" in body:
            self._failed = True
            return [_event(body)]
        if not self._head:
            self._head = {name: body.get(name) for name in ("id", "created")}
        body |= self._head
        if not body["choices"]:
            if self._usage:
                return []
            self._usage = True
            return [_event(body)]
        (choice,) = body["choices"]
        kept = self._choice(choice)
        return [_event({**body, "choices": [kept]})] if kept is not None else []

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        """What of this piece is new to the client; None: nothing."""
        index = choice["index"]
        now, sent = self._now.setdefault(index, _Said()), self.sent.setdefault(index, _Said())
        chat = "delta" in choice
        delta = choice["delta"] if chat else {"content": choice["text"]}
        text = delta.get("content") or ""
        begins = "role" in delta and not sent.begun
        sent.begun = sent.begun or "role" in delta
        rest = _rest(now.text, text, sent.text)
        now.text += text
        values, count = _after(choice.get("logprobs"), sent.tokens - now.tokens)
        now.tokens += count
        ends = choice.get("finish_reason") is not None and not sent.ended
        if choice.get("finish_reason") is not None and len(now.text) < len(sent.text):
            raise Diverged
        sent.ended = sent.ended or ends
        sent.text, sent.tokens = max(sent.text, now.text, key=len), max(sent.tokens, now.tokens)
        if not (rest or values or begins or ends):
            return None
        kept = {**choice, "logprobs": values, "finish_reason": choice.get("finish_reason") if ends else None}
        if not chat:
            return {**kept, "text": rest}
        new = {name: value for name, value in delta.items() if name != "role" or begins}
        if "content" in new:
            new["content"] = rest
        return {**kept, "delta": new}


def _rest(before: str, text: str, sent: str) -> str:
    """What of `text`, which follows `before`, goes beyond what was sent. Raises Diverged where it contradicts that."""
    whole = before + text
    common = min(len(whole), len(sent))
    if whole[:common] != sent[:common]:
        raise Diverged
    return whole[max(len(before), len(sent)) :]


def _after(logprobs: dict[str, Any] | None, skip: int) -> tuple[dict[str, Any] | None, int]:
    """Log-probabilities without the first `skip` tokens, None where none are left, and how many tokens there were."""
    if logprobs is None:
        return None, 0
    lists = {name: value for name, value in logprobs.items() if isinstance(value, list)}
    count = max(map(len, lists.values()), default=0)
    skip = max(0, skip)
    if skip >= count and count:
        return None, count
    return {**logprobs, **{name: value[skip:] for name, value in lists.items()}}, count


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + _END
