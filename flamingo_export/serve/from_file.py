"""Many requests from a file, through the same engine that a server has.

A line of the file is an object of ours

    {"id": "7", "question": "What is it?", "images": ["a.png"], "videos": [], "shots": [{"image": "b.png", "caption": "..."}], "beams": 3}

with a `prompt`, a `question`, or neither (a caption), paths relative to the file, and any setting of `generate`; or a line of OpenAI's batches

    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

A result is a line too, written as soon as it is there. What is in the result file already is not done again, if it came from the same requests,
bundle and settings; `OUT.run.json` beside it says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from flamingo_export.errors import FlamingoExportError, InputError
from flamingo_export.files import exclusive, write_atomically
from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions, Settings
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.texts import Generation, Text
from flamingo_export.runtime.ticket import Ticket, now
from flamingo_export.runtime.videos import Video
from flamingo_export.serve.answers import Form, extras, usage
from flamingo_export.serve.bodies import Chat, parse
from flamingo_export.serve.body_options import check_offered, options_of, seconds_of
from flamingo_export.serve.chat_messages import chat_prompt
from flamingo_export.serve.refusals import ApiError, refusal_of
from flamingo_export.serve.remote_media import decode_data_url

_MAX_MEDIUM = 64 << 20
_AHEAD = 4
"""Requests whose media are decoded while others run."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request of ours."""

    id: str | int
    prompt: str | None = None
    question: str | None = None
    images: list[str] = []
    videos: list[str] = []
    shots: list[ShotLine] = []
    system: str | None = None
    beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    num_return: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    early_stopping: bool | None = None
    stop: str | list[str] | None = None
    min_new_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    logit_bias: dict[int, float] | None = None
    top_logprobs: int | None = None
    json_schema: dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class ShotLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An example of a request."""

    image: str | None = None
    video: str | None = None
    question: str | None = None
    answer: str | None = None
    caption: str | None = None


class Batched(msgspec.Struct, frozen=True, kw_only=True):
    """A line of OpenAI's batch format."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


@dataclass
class Tally:
    """How a run went."""

    done: int = 0
    failed: int = 0
    """Lines without an answer, those of earlier runs too."""
    before: int = 0
    """Results that were there already."""


@dataclass(frozen=True)
class _Asked:
    """A line that was read: its key, and the request or why there is none."""

    key: str
    line: Line | Batched | None
    fault: str = ""
    raw_id: str | int | None = field(default=None)


def run_file(model: Model, requests: Path, out: Path, settings: Settings, *, progress: Progress = SILENT) -> Tally:
    """Answers every line of `requests` into `out`, in order of completion.

    settings: of lines that do not say otherwise.
    Raises InputError if the file cannot be read or an id stands in it twice, or if `out` holds results of other requests, another bundle or
    other settings, or another process writes it. A line that fails is a result with its error.
    """
    asked = list(_read(requests))
    GenerateOptions(**settings).check_values()
    identity = _identity(model, requests, settings)
    if out.is_dir():
        raise InputError(f"{out} is a folder, expected a file for the results")
    with exclusive(
        out.with_name(out.name + ".lock"),
        busy=lambda holder: InputError(
            f"another command (process {holder}) is writing {out}. Wait for it, or name another --out."
        ),
        unwritable=lambda error: InputError(f"{out} cannot be written: {error.strerror}"),
    ):
        done = _resumed(out, identity)
        left = [each for each in asked if each.key not in done]
        tally = Tally(before=len(asked) - len(left), failed=sum(done.values()))
        progress.stage("requests", len(asked))
        progress.advance(tally.before)
        with out.open("ab") as file, ThreadPoolExecutor(model.engine.rows + _AHEAD) as pool:
            _run(model, requests.parent, left, settings, file, pool, tally, progress)
    return tally


def _run(
    model: Model,
    folder: Path,
    left: Sequence[_Asked],
    settings: Settings,
    file: IO[bytes],
    pool: ThreadPoolExecutor,
    tally: Tally,
    progress: Progress,
) -> None:
    waiting = iter(left)
    running: set[Future[dict[str, Any]]] = set()
    tickets: set[Ticket[Any]] = set()
    most = model.engine.rows + _AHEAD
    try:
        while True:
            for each in waiting:
                running.add(pool.submit(_answer, model, folder, each, settings, tickets))
                if len(running) >= most:
                    break
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                result = future.result()
                file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
                tally.done += 1
                tally.failed += failed(result)
                progress.advance(1)
            file.flush()
    except BaseException:
        for future in running:
            future.cancel()
        for ticket in list(tickets):
            ticket.cancel()
        raise


def answer_lines(model: Model, folder: Path, lines: Sequence[bytes], *, first: int = 1) -> list[dict[str, Any]]:
    """Results of lines in their order, answered side by side as far as the engine has rows. folder: what paths are relative to.

    first: number of the first line, by which one without an id is named. A line that fails is a result with its error.
    """
    asked = [_parsed(line, number) for number, line in enumerate(lines, start=first)]
    tickets: set[Ticket[Any]] = set()
    with ThreadPoolExecutor(model.engine.rows + _AHEAD) as pool:
        return list(pool.map(lambda each: _answer(model, folder, each, Settings(), tickets), asked))


def failed(result: dict[str, Any]) -> bool:
    """Whether a line has no answer."""
    return result.get("error") is not None


def _answer(model: Model, folder: Path, asked: _Asked, settings: Settings, tickets: set[Ticket[Any]]) -> dict[str, Any]:
    """The result of one line, whatever happens."""
    if isinstance(asked.line, Batched):
        return _batched(model, asked.line, tickets)
    try:
        if asked.line is None:
            raise InputError(asked.fault)
        request, options = _of_line(model, folder, asked.line, settings)
        found = _generated(model, request, options, tickets)
    except FlamingoExportError as error:
        return {"id": asked.raw_id, "error": str(error)}
    except Exception as error:
        return {"id": asked.raw_id, "error": f"{type(error).__name__}: {error}"}
    return {"id": asked.line.id, **_text(found), "alternatives": [_text(other) for other in found.alternatives]}


def _generated(
    model: Model, request: Request, options: GenerateOptions, tickets: set[Ticket[Any]], deadline: float | None = None
) -> Generation:
    ticket = model.engine.submit(model.prepare(request), options, deadline=deadline)
    tickets.add(ticket)
    try:
        return model.generation(ticket.result(), options, ticket.timings)
    finally:
        tickets.discard(ticket)


def _text(found: Text) -> dict[str, Any]:
    return {
        "text": found.text,
        "token_ids": list(found.token_ids),
        "token_logprobs": list(found.token_logprobs),
        "score": found.score,
        "finish_reason": "stop" if found.finished else "length",
        **({"top_logprobs": found.top_logprobs} if found.top_logprobs else {}),
    }


def _of_line(model: Model, folder: Path, line: Line, settings: Settings) -> tuple[Request, GenerateOptions]:
    media: list[MediumSource] = [folder / path for path in line.images]
    media += [Video(source=folder / path) for path in line.videos]
    if line.prompt is not None:
        if line.question is not None or line.shots or line.system is not None:
            raise InputError("a prompt goes without a question, shots and a system message")
        request = Request(prompt=line.prompt, media=media)
    else:
        if len(media) > 1 and model.inputs.prompts.template is None:
            raise InputError("a question or caption is about one image or video; write a prompt for several")
        shots = [_shot(folder, shot) for shot in line.shots]
        if line.question is not None:
            request = qa_prompt(shots, line.question, media, model.inputs, system=line.system)
        else:
            request = caption_prompt(shots, media, model.inputs, system=line.system)
    own = {name: value for name in Settings.__annotations__ if (value := getattr(line, name, None)) is not None}
    # A line that says how it searches leaves the common way behind: beams of all are not those of a line that samples.
    common: dict[str, Any] = dict(settings)
    if own.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        common |= {"beams": None, "length_penalty": 0.0, "early_stopping": False}
    elif "beams" in own:
        common |= {"temperature": None, "top_k": None, "top_p": None, "min_p": None, "seed": None}
    if own.keys() & {"json_schema", "regex", "choice"}:
        common |= {"json_schema": None, "regex": None, "choice": ()}
    return request, GenerateOptions(**{**common, **own})


def _shot(folder: Path, shot: ShotLine) -> Shot:
    if shot.image is not None and shot.video is not None:
        raise InputError("a shot has an image or a video")
    answer = shot.answer if shot.question is not None else shot.caption
    if answer is None:
        raise InputError("a shot has a question with its answer, or a caption")
    medium: MediumSource | None = folder / shot.image if shot.image is not None else None
    if shot.video is not None:
        medium = Video(source=folder / shot.video)
    return Shot(answer=answer, question=shot.question, medium=medium)


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
    found = _generated(model, request, options, tickets, None if seconds == math.inf else now() + seconds)
    form = Form(kind="chat", model=body.model, tokenizer=model.tokenizer, logprobs=bool(body.logprobs), stops=options.stops)
    texts = (found, *found.alternatives)
    count = usage(found.timings.prompt_tokens, found.timings.reused_tokens, sum(len(text.token_ids) for text in texts))
    return form.whole([form.choice(index, text) for index, text in enumerate(texts)], count, extras(found, len(media)))


def _read(path: Path) -> Iterator[_Asked]:
    """Every line. Raises InputError for a file that cannot be read, that is empty, or that has an id twice."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"the requests in {path} cannot be read: {error.strerror}") from error
    seen: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        asked = _parsed(raw, number)
        if asked.key in seen:
            raise InputError(f"{path}, line {number}: the id {asked.key!r} stands in line {seen[asked.key]} already")
        seen[asked.key] = number
        yield asked
    if not seen:
        raise InputError(f"{path} has no requests")


def _parsed(raw: bytes, number: int) -> _Asked:
    unnamed = f"line {number}"
    try:
        record = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _Asked(unnamed, None, f"line {number} is not JSON: {error}", unnamed)
    if not isinstance(record, dict):
        return _Asked(unnamed, None, f"line {number} is not a JSON object", unnamed)
    kind: type[Line] | type[Batched] = Batched if "custom_id" in record else Line
    name = record.get("custom_id" if kind is Batched else "id", unnamed)
    key = name if isinstance(name, str) else json.dumps(name)
    try:
        return _Asked(key, msgspec.convert(record, kind, str_keys=True), raw_id=name)
    except msgspec.ValidationError as error:
        return _Asked(key, None, f"line {number}: {error}", name)


def _identity(model: Model, requests: Path, settings: Settings) -> dict[str, Any]:
    """What must be the same for results to go together. A setting at its default is left out, as where it was not given."""
    usual = GenerateOptions(), GenerateOptions(stop=[], choice=[])
    given = {
        name: value
        for name, value in sorted(settings.items())
        if value is not None and (name == "length_penalty" or all(value != getattr(each, name) for each in usual))
    }
    return {
        "requests": hashlib.sha256(requests.read_bytes()).hexdigest(),
        "bundle": hashlib.sha256(msgspec.json.encode(model.manifest.files)).hexdigest(),
        "settings": json.loads(json.dumps(given)),  # ids of tokens become texts in JSON
    }


def _resumed(out: Path, identity: dict[str, Any]) -> dict[str, bool]:
    """Keys of the results that `out` holds, and whether each failed. A line that was cut is taken off.

    Raises InputError for results of another run.
    """
    beside = out.with_name(out.name + ".run.json")
    if not out.exists():
        write_atomically(beside, json.dumps(identity, indent=2).encode() + b"\n")
        out.touch()
        return {}
    try:
        known = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        known = None
    if known != identity:
        differs = [name for name in identity if not isinstance(known, dict) or known.get(name) != identity[name]]
        raise InputError(
            f"{out} holds results of another run ({', '.join(differs)} differ). Name another file with --out, or remove this one."
        )
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with out.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    keys = {}
    for raw in data[:whole].splitlines():
        record = json.loads(raw)
        name = record.get("custom_id", record.get("id"))
        keys[name if isinstance(name, str) else json.dumps(name)] = failed(record)
    return keys
