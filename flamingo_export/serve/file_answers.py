"""Results of lines of a file: each is answered through the engine, and a failure is a result too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from flamingo_export.errors import FlamingoExportError, InputError
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions, Settings
from flamingo_export.runtime.request import Prepared, Request
from flamingo_export.runtime.texts import Generation
from flamingo_export.runtime.ticket import Ticket, now
from flamingo_export.runtime.videos import Video
from flamingo_export.serve.answers import Form, extras, usage
from flamingo_export.serve.bodies import Chat, parse
from flamingo_export.serve.body_options import check_offered, options_of, seconds_of
from flamingo_export.serve.chat_messages import chat_prompt
from flamingo_export.serve.file_lines import AskedLine, Batched, parsed, request_of
from flamingo_export.serve.refusals import ApiError, refusal_of
from flamingo_export.serve.remote_media import decode_data_url

_MAX_MEDIUM = 64 << 20
AHEAD = 4
"""Requests whose media are decoded while others run."""


def answer_lines(model: Model, folder: Path, lines: Sequence[bytes], *, first: int = 1) -> list[dict[str, Any]]:
    """Results of lines in their order, answered side by side as far as the engine has rows. folder: what paths are relative to.

    first: number of the first line, by which one without an id is named. A line that fails is a result with its error.
    """
    asked = [parsed(line, number) for number, line in enumerate(lines, start=first)]
    tickets: set[Ticket[Any]] = set()
    with ThreadPoolExecutor(model.engine.rows + AHEAD) as pool:
        return list(pool.map(lambda each: answer_line(model, folder, each, Settings(), tickets), asked))


def failed(result: dict[str, Any]) -> bool:
    """Whether a line has no answer."""
    return result.get("error") is not None


def answer_line(model: Model, folder: Path, asked: AskedLine, settings: Settings, tickets: set[Ticket[Any]]) -> dict[str, Any]:
    """The result of one line, whatever happens."""
    if isinstance(asked.line, Batched):
        return _batched(model, asked.line, tickets)
    try:
        if asked.line is None:
            raise InputError(asked.fault)
        request, options = request_of(model, folder, asked.line, settings)
        found = _generated(model, model.prepare(request), options, tickets)
    except FlamingoExportError as error:
        return {"id": asked.raw_id, "error": str(error)}
    except Exception as error:
        return {"id": asked.raw_id, "error": f"{type(error).__name__}: {error}"}
    return {"id": asked.line.id, **found.fields()}


def _generated(
    model: Model, prepared: Prepared, options: GenerateOptions, tickets: set[Ticket[Any]], deadline: float | None = None
) -> Generation:
    ticket = model.engine.submit(prepared, options, deadline=deadline)
    tickets.add(ticket)
    try:
        return model.generation(ticket.result(), options, ticket.timings)
    finally:
        tickets.discard(ticket)


def _batched(model: Model, line: Batched, tickets: set[Ticket[Any]]) -> dict[str, Any]:
    """A line of OpenAI's batch format, answered as the server would."""
    result: dict[str, Any] = {"id": f"batch_req_{line.custom_id}", "custom_id": line.custom_id, "response": None, "error": None}
    try:
        status, body = 200, _chat(model, line, tickets)
    except ApiError as error:
        status, body = error.status, error.body()
    except FlamingoExportError as error:
        refused = refusal_of(error) or ApiError(500, str(error), code="model_failure")
        status, body = refused.status, refused.body()
    except Exception as error:
        status, body = 500, ApiError(500, f"{type(error).__name__}: {error}", code="internal").body()
    result["response"] = {"status_code": status, "request_id": result["id"], "body": body}
    if status != 200:
        result["error"] = body["error"]
    return result


def _chat(model: Model, line: Batched, tickets: set[Ticket[Any]]) -> dict[str, Any]:
    if line.method != "POST" or line.url != "/v1/chat/completions":
        raise ApiError(400, f"{line.method} {line.url} is not offered in a file; use POST /v1/chat/completions", param="url")
    body = parse(msgspec.json.encode(line.body), Chat)
    if body.stream:
        raise ApiError(400, "a file has no streams", param="stream")
    check_offered(body)
    seconds = seconds_of(body.timeout, math.inf)
    if model.tokenizer is None:
        raise ApiError(400, "this model's bundle has no tokenizer, so it cannot be asked in text", code="no_tokenizer")
    prompt = chat_prompt(body.messages, body.shots, model.inputs, body.date)
    media: list[MediumSource] = []
    for medium in prompt.media:
        if medium.url[:5].lower() != "data:":
            raise ApiError(400, "media are given as data: URLs", param="messages", code="invalid_media")
        data = decode_data_url(medium.url, most=_MAX_MEDIUM)
        media.append(Video(source=data, num_frames=medium.frames) if medium.video else data)
    request = Request(prompt=prompt.text, media=media, quoted=prompt.quoted, forms=model.inputs.prompts)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    options = options_of(body, most, body.top_logprobs)
    prepared = model.prepare(request)
    found = _generated(model, prepared, options, tickets, None if seconds == math.inf else now() + seconds)
    form = Form(kind="chat", model=body.model, tokenizer=model.tokenizer, logprobs=bool(body.logprobs), stops=options.stops)
    texts = (found, *found.alternatives)
    count = usage(found.timings.prompt_tokens, found.timings.reused_tokens, sum(len(text.token_ids) for text in texts))
    return form.whole([form.choice(index, text) for index, text in enumerate(texts)], count, extras(found, prepared))
