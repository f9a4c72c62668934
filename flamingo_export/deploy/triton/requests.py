"""What a client of Triton asks, as the engine's request, and what it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from flamingo_export.errors import InputError
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions, Settings
from flamingo_export.runtime.prompts import caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.texts import Generation
from flamingo_export.serve.refusals import ApiError
from flamingo_export.serve.remote_media import decode_data_url

MAX_IMAGE = 64 << 20


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The JSON of the input `options`.

    question: in place of a prompt. stream: whether text comes in pieces. timeout: seconds.
    The rest are settings of `generate`, by its names.
    """

    question: str | None = None
    stream: bool = False
    timeout: float | None = None
    beams: int | None = None
    max_new_tokens: int | None = None
    length_penalty: float | None = None
    num_return: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    min_new_tokens: int | None = None
    early_stopping: bool | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that was read."""

    request: Request
    options: GenerateOptions
    stream: bool
    timeout: float | None


def read(model: Model, prompt: str, images: Sequence[bytes], options: str) -> Asked:
    """The request of a prompt with tags, or of a question or caption where the prompt is empty.

    images: files as they are, or data: URLs (of those who send JSON). options: JSON, or empty. Raises InputError or ImageError.
    """
    try:
        said = msgspec.json.decode(options or "{}", type=Options)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"options is not what was expected: {error}") from error
    if said.timeout is not None and not said.timeout > 0:
        raise InputError(f"timeout is {said.timeout:g} seconds, expected more than 0")
    media: list[MediumSource] = [_image(image) for image in images]
    if prompt:
        if said.question is not None:
            raise InputError("a prompt goes without a question")
        request = Request(prompt=prompt, media=media)
    elif len(media) != 1:
        raise InputError(f"a question or caption is about one image, {len(media)} were given. Write a prompt for others.")
    elif said.question is not None:
        request = qa_prompt([], said.question, media[0], model.inputs)
    else:
        request = caption_prompt([], media[0], model.inputs)
    settings: dict[str, Any] = {
        name: value for name in Settings.__annotations__ if (value := getattr(said, name, None)) is not None
    }
    if "beams" not in settings and not settings.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        settings["beams"] = 1
    found = GenerateOptions(**settings)
    found.check_values()
    return Asked(request=request, options=found, stream=said.stream, timeout=said.timeout)


def _image(data: bytes) -> bytes:
    if data[:5].lower() != b"data:":
        return data
    try:
        return decode_data_url(data.decode("ascii"), most=MAX_IMAGE)
    except (ApiError, UnicodeDecodeError) as error:
        raise InputError(f"an image's data: URL cannot be read: {error}") from error


def result_of(found: Generation) -> str:
    """The JSON of the output `result`, with the fields of `generate --requests`."""
    return json.dumps(found.fields(), ensure_ascii=False)
