"""Outcomes as OpenAI's objects: whole, or as the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from flamingo_export.runtime.request import Prepared
from flamingo_export.runtime.steering import HoldBack, cut_at
from flamingo_export.runtime.texts import Generation, Text
from flamingo_export.runtime.ticket import Tokens
from flamingo_export.runtime.tokenizer import TextStream, Tokenizer

Kind = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def usage(prompt: int, reused: int, completion: int) -> dict[str, Any]:
    """What a request cost, in tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


@dataclass(kw_only=True)
class Form:
    """How a request wants to be answered.

    logprobs: whether log-probabilities are wanted.
    stops: texts before which an answer ends.
    trimmed: whether blanks around the text are left out, as a chat's are.
    """

    kind: Kind
    model: str
    tokenizer: Tokenizer
    logprobs: bool = False
    stops: tuple[str, ...] = ()
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"

    @property
    def trimmed(self) -> bool:
        """Whether blanks around the text are left out."""
        return self.kind == "chat"

    def head(self, stream: bool) -> dict[str, Any]:
        """What every object begins with."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {
            "id": self.id,
            "object": f"{name}.chunk" if stream and self.kind == "chat" else name,
            "created": self.created,
            "model": self.model,
        }

    def text(self, token_ids: Sequence[int]) -> str:
        """Generated text."""
        text = cut_at(self.tokenizer.decode(token_ids), self.stops)
        return text.strip() if self.trimmed else text

    def length(self, token_ids: Sequence[int]) -> int:
        """Characters that tokens add to the text; special ones add none."""
        return sum(len(self.tokenizer.token_text(token)) for token in token_ids if self.tokenizer.decode([token]))

    def logprobs_of(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        top: Sequence[Sequence[tuple[int, float]]] = (),
        offset: int = 0,
    ) -> dict[str, Any] | None:
        """Log-probabilities in the form of the route.

        top: the likeliest tokens at each place, where they were asked for.
        offset: characters before the first of these tokens.
        """
        if not self.logprobs:
            return None
        texts = [self.tokenizer.token_text(token) for token in token_ids]
        if self.kind == "chat":
            places = top or [()] * len(texts)
            content = [
                {**self._token(text, value), "top_logprobs": [self._token(self.tokenizer.token_text(t), v) for t, v in place]}
                for text, value, place in zip(texts, logprobs, places, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token in token_ids:
            offsets.append(offset)
            offset += self.length([token])
        likeliest = [{self.tokenizer.token_text(t): v for t, v in place} for place in top] or None
        return {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": likeliest, "text_offset": offsets}

    @staticmethod
    def _token(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def choice(self, index: int, found: Text) -> dict[str, Any]:
        """A finished text."""
        reason = "stop" if found.finished else "length"
        logprobs = self.logprobs_of(found.token_ids, found.token_logprobs, found.top_logprobs)
        text = self.text(found.token_ids)
        if self.kind == "chat":
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, choices: list[dict[str, Any]], used: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that does not stream. extra: what is ours beside OpenAI's fields."""
        return {**self.head(False), "choices": choices, "usage": used, "flamingo": extra}

    def chunk(self, index: int, delta: dict[str, Any] | str, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        """One piece of a stream."""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        choice["delta" if self.kind == "chat" else "text"] = delta
        return {**self.head(True), "choices": [choice]}

    def piece(self, index: int, text: str, logprobs: Any = None) -> dict[str, Any]:
        """Text of a stream."""
        return self.chunk(index, {"content": text} if self.kind == "chat" else text, logprobs)

    def last(self, index: int, found: Text) -> dict[str, Any]:
        """The end of one text of a stream."""
        return self.chunk(index, {} if self.kind == "chat" else "", None, "stop" if found.finished else "length")


class Pieces:
    """Tokens of one text to pieces of it, in the form of the route. What has been given out is never taken back."""

    def __init__(self, form: Form, index: int) -> None:
        self._form, self._index = form, index
        self._text = TextStream(form.tokenizer)
        self._hold = HoldBack(form.stops, strip=form.trimmed)
        self._given: list[int] = []
        self._offset = 0

    def first(self) -> list[dict[str, Any]]:
        """What a text begins with."""
        if self._form.kind == "chat":
            return [self._form.chunk(self._index, {"role": "assistant", "content": ""})]
        return []

    def push(self, tokens: Tokens) -> list[dict[str, Any]]:
        """Chunks of further tokens."""
        text = self._hold.push(self._text.push(tokens.token_ids))
        return self._chunks(tokens.token_ids, tokens.token_logprobs, tokens.top, text)

    @property
    def given(self) -> int:
        """Tokens that have been given out."""
        return len(self._given)

    def is_of(self, found: Text) -> bool:
        """Whether what has been given out is the beginning of a text."""
        return list(found.token_ids[: len(self._given)]) == self._given

    def finish(self, found: Text) -> list[dict[str, Any]]:
        """Chunks of what was left, and the end."""
        given = self.given
        rest, values, top = found.token_ids[given:], found.token_logprobs[given:], found.top_logprobs[given:]
        text = self._hold.push(self._text.push(rest) + self._text.finish()) + self._hold.finish()
        return [*self._chunks(rest, values, top, text), self._form.last(self._index, found)]

    def _chunks(
        self, token_ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Sequence[tuple[int, float]]], text: str
    ) -> list[dict[str, Any]]:
        self._given += token_ids
        values = self._form.logprobs_of(token_ids, logprobs, top, self._offset) if token_ids else None
        if values:
            self._offset += self._form.length(token_ids)
        return [self._form.piece(self._index, text, values)] if text or values else []


def extras(found: Generation, prepared: Prepared) -> dict[str, Any]:
    """What the page shows beside the text: which media the answer looked at, what else the search considered, where time went."""
    timings, seen = found.timings, prepared.looked_at
    return {
        "phi": seen[-1] if seen else 0,
        "looked_at": list(seen),
        "score": found.score,
        "alternatives": [{"text": other.text, "score": other.score} for other in found.alternatives],
        "seconds": {
            "queued": timings.queued,
            "media": timings.media,
            "first_token": timings.first_token,
            "steps": sum(timings.steps),
        },
        "media_reused": timings.media_reused,
    }
