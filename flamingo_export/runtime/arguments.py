"""What callers hand over, as requests and token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from flamingo_export.errors import InputError, PromptError
from flamingo_export.runtime.image_files import is_encoded
from flamingo_export.runtime.images import ImageSource
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.runtime.videos import Video, VideoSource
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import InputFormat

Prompt = str | Request | Sequence[int]
Batch = list[str] | list[Request] | list[str | Request]
T = TypeVar("T")


def as_request(
    prompt: object,
    images: Iterable[ImageSource | Video] = (),
    videos: Iterable[VideoSource | Video] = (),
) -> Request:
    """One request of what `generate` was given as a prompt. Raises InputError if it is none, or a Request comes with further media."""
    media: list[MediumSource] = listed(images)
    media += [video if isinstance(video, Video) else Video(source=video) for video in listed(videos)]
    if isinstance(prompt, Request):
        if media:
            raise InputError("a Request carries its own media; put images and videos there, not beside it")
        return prompt
    if isinstance(prompt, str):
        return Request(prompt=prompt, media=media)
    if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes | bytearray | memoryview):
        return Request(prompt=prompt.tolist() if isinstance(prompt, np.ndarray) else list(prompt), media=media)
    raise PromptError(f"a prompt is given as {type(prompt).__name__}; give a text, a list of token ids or a Request")


def listed(items: Iterable[T]) -> list[T]:
    """The items as a list; a single path or picture is a likely slip, so it is refused rather than taken apart."""
    if is_encoded(items) or isinstance(items, np.ndarray | Video) or not isinstance(items, Iterable):
        raise InputError("images and videos are lists: images=['a.png'], not images='a.png'")
    return list(items)


def candidate_ids(
    request: Request,
    candidate: str | Sequence[int],
    end: bool,
    *,
    config: ModelConfig,
    inputs: InputFormat,
    tokenizer: Tokenizer | None,
) -> list[int]:
    """Token ids of a candidate answer after the request's prompt; end: with `<EOC>`. Raises InputError."""
    if not isinstance(candidate, str):
        if (
            isinstance(candidate, bytes)
            or not isinstance(candidate, Sequence | np.ndarray)
            or not all(isinstance(token, int | np.integer) for token in candidate)
        ):
            raise InputError(f"candidate {candidate!r} is neither a text nor a list of token ids")
        ids = [int(token) for token in candidate]
    elif tokenizer is None:
        raise InputError("the bundle has no tokenizer, so text cannot be encoded. Give candidates as token ids.")
    else:
        eoc, tokens = inputs.tags.eoc, config.tokens
        generable = tokens.eoc not in tokens.never
        ended = candidate if not (end and generable) or candidate.endswith(eoc) or not candidate.strip() else candidate + eoc
        before = request.prompt
        ids = (
            tokenizer.encode_continuation(before, ended) if isinstance(before, str) else tokenizer.encode(ended, add_bos=False)
        )
        if end and not generable:  # the model never says it: a text ends with another token, where it has one
            ids = [*ids, *(token for token in tokens.ends[:1] if token not in tokens.never)]
    size = config.language_model.vocab_size  # a token beyond the output has no likelihood
    if not ids or min(ids) < 0 or max(ids) >= size:
        raise InputError(f"candidate {candidate!r} has no tokens, or some outside 0 to {size - 1}")
    return ids
