"""What a body asks for, as the engine's options."""

from __future__ import annotations

from typing import Any

from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.serve.bodies import Chat, Completion, Sampled
from flamingo_export.serve.refusals import ApiError

MAX_CHOICES = 128
MAX_BIASED = 300
"""Tokens of a `logit_bias`, as with OpenAI."""


def check_offered(body: Chat) -> None:
    """Raises ApiError for what a chat asks for and no model here can give."""
    _format_of(body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs", param="top_logprobs")


def seconds_of(timeout: float | None, default: float) -> float:
    """Seconds that a request gives itself. Raises ApiError for none or less."""
    if timeout is not None and not timeout > 0:
        raise ApiError(400, f"timeout is {timeout:g} seconds, expected more than 0", param="timeout")
    return default if timeout is None else timeout


def options_of(body: Sampled, max_tokens: int | None, top_logprobs: int | None = None) -> GenerateOptions:
    """The search that a body asks for.

    Greedy unless beams, or something that draws, are asked for: temperature above 0, top_p below 1, top_k, or several texts. A seed where
    nothing is drawn is what many clients send always, and has no effect. Raises ApiError or InputError.
    """
    if body.n is not None and not 1 <= body.n <= MAX_CHOICES:
        raise ApiError(400, f"n is {body.n}, expected 1 to {MAX_CHOICES}", param="n")
    if body.beams is not None and not 1 <= body.beams <= MAX_CHOICES:
        raise ApiError(400, f"beams is {body.beams}, expected 1 to {MAX_CHOICES}", param="beams")
    n = body.n or 1
    top_p = None if body.top_p == 1 else body.top_p
    settings: dict[str, Any] = {"num_return": n, "max_new_tokens": max_tokens, "top_logprobs": top_logprobs or 0}
    wanted = {
        "stop": body.stop,
        "logit_bias": _bias(body.logit_bias) if body.logit_bias else None,
        "min_new_tokens": body.min_tokens,
        "repetition_penalty": body.repetition_penalty,
        "no_repeat_ngram": body.no_repeat_ngram,
        "min_p": body.min_p,
        "early_stopping": body.early_stopping,
        "json_schema": _format_of(body) if isinstance(body, Chat) else body.json_schema,
        "regex": body.regex,
        "choice": body.choice,
    }
    settings |= {name: value for name, value in wanted.items() if value is not None}
    if body.beams is not None:
        if body.temperature or top_p is not None or body.top_k is not None or body.min_p is not None:
            raise ApiError(400, "beams and sampling exclude each other", param="beams")
        settings |= {"beams": body.beams, "length_penalty": body.length_penalty or 0.0}
    elif (
        body.temperature
        or top_p is not None
        or body.top_k is not None
        or body.min_p is not None
        or (n > 1 and body.temperature is None)
    ):
        temperature = 1.0 if body.temperature is None else body.temperature
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": body.top_k, "seed": body.seed}
    elif n > 1:
        raise ApiError(400, "temperature 0 finds one text; ask for beams, or for a temperature", param="n")
    else:
        settings |= {"beams": 1}
    options = GenerateOptions(**settings)
    options.check_values(lambda name: _field_of(body, name))
    return options


def _field_of(body: Sampled, setting: str) -> str:
    """What a body calls a setting of `generate`, for messages."""
    fields = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_return": "n"}
    if isinstance(body, Chat) and body.max_completion_tokens is not None:
        fields["max_new_tokens"] = "max_completion_tokens"
    if isinstance(body, Completion):
        fields["top_logprobs"] = "logprobs"
    return fields.get(setting, setting)


def _format_of(body: Chat) -> dict[str, Any] | bool | None:
    """The schema that the answer is to follow, from OpenAI's `response_format` or the field of ours. Raises ApiError."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return body.json_schema
    if body.json_schema is not None:
        raise ApiError(400, "json_schema and response_format exclude each other", param="json_schema")
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.type != "json_schema":
        raise ApiError(
            400,
            f"response_format is {wanted.type!r}, expected text, json_object or json_schema",
            param="response_format",
            code="unsupported",
        )
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise ApiError(400, "response_format has no json_schema.schema", param="response_format")
    return wanted.json_schema.schema


def _bias(given: dict[str, float]) -> dict[int, float]:
    """OpenAI writes token ids as texts, and -100 for a token that shall never come."""
    if len(given) > MAX_BIASED:
        raise ApiError(400, f"logit_bias names {len(given)} tokens, at most {MAX_BIASED} are taken", param="logit_bias")
    try:
        return {int(token): value for token, value in given.items()}
    except ValueError:
        raise ApiError(400, "logit_bias names tokens by their ids", param="logit_bias") from None
