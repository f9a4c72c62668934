"""Lines of a file of requests: what they may hold, and the request that each asks for.

A line is an object of ours

    {"id": "7", "question": "What is it?", "images": ["a.png"], "videos": [], "shots": [{"image": "b.png", "caption": "..."}], "beams": 3}

with a `prompt`, a `question`, or neither (a caption), paths relative to the file, and any setting of `generate`; or a line of OpenAI's batches

    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from flamingo_export.errors import InputError
from flamingo_export.runtime.image_files import refuse_url
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions, Settings
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.videos import Video
from flamingo_reference.checkpoints.files.json_file import repeated_keys


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


@dataclass(frozen=True)
class AskedLine:
    """A line that was read: its key, and the request or why there is none."""

    key: str
    line: Line | Batched | None
    fault: str = ""
    raw_id: str | int | None = field(default=None)


def read_lines(path: Path) -> Iterator[AskedLine]:
    """Every line. Raises InputError for a file that cannot be read, that is empty, or that has an id twice."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"the requests in {path} cannot be read: {error.strerror}") from error
    seen: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        asked = parsed(raw, number)
        if asked.key in seen:
            raise InputError(f"{path}, line {number}: the id {asked.key!r} stands in line {seen[asked.key]} already")
        seen[asked.key] = number
        yield asked
    if not seen:
        raise InputError(f"{path} has no requests")


def parsed(raw: bytes, number: int) -> AskedLine:
    unnamed = f"line {number}"
    if number == 1:  # of a file that a Windows program wrote
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        record = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return AskedLine(unnamed, None, f"line {number} is not JSON: {error}", unnamed)
    if not isinstance(record, dict):
        return AskedLine(unnamed, None, f"line {number} is not a JSON object", unnamed)
    if twice := repeated_keys(raw):
        return AskedLine(unnamed, None, f"line {number}: {', '.join(twice)} is given twice; give each key once", unnamed)
    kind: type[Line] | type[Batched] = Batched if "custom_id" in record else Line
    name = record.get("custom_id" if kind is Batched else "id", unnamed)
    key = name if isinstance(name, str) else json.dumps(name)
    try:
        return AskedLine(key, msgspec.convert(record, kind, str_keys=True), raw_id=name)
    except msgspec.ValidationError as error:
        return AskedLine(key, None, f"line {number}: {error}", name)


def request_of(model: Model, folder: Path, line: Line, settings: Settings) -> tuple[Request, GenerateOptions]:
    media: list[MediumSource] = [_place(folder, path) for path in line.images]
    media += [Video(source=_place(folder, path)) for path in line.videos]
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
    medium: MediumSource | None = _place(folder, shot.image) if shot.image is not None else None
    if shot.video is not None:
        medium = Video(source=_place(folder, shot.video))
    return Shot(answer=answer, question=shot.question, medium=medium)


def _place(folder: Path, path: str) -> Path:
    """Where a file of a line is. Raises InputError for an empty path, which Python takes for the folder itself, and for an address."""
    if not path.strip():
        raise InputError("a path of an image or video is empty; name a file, or leave it out")
    refuse_url(path)
    return folder / path
