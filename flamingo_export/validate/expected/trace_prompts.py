"""Prompts of the token traces: real scenes, digits and clips for nano, blocks of colour and drawn tokens for any other model."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.validate.expected import inputs
from flamingo_reference.config import ModelConfig

Pixels = npt.NDArray[np.uint8]
# Held-out items of nano's data, by seed; any would do.
SCENES, DIGIT, CLIP = (11, 23, 42, 57), 4, 6


class TracePrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens to begin with, and the frames of each medium, uint8 RGB [H, W, 3]."""

    case: str
    text: str
    tokens: tuple[int, ...]
    media: tuple[tuple[Pixels, ...], ...]
    new_tokens: int


def trace_prompts(config: ModelConfig, tokenizer: Path | None) -> list[TracePrompt]:
    """What is generated from. A model called nano that has a tokenizer is asked about pictures of its own kind."""
    if config.name == "nano" and tokenizer is not None:
        return list(_nano_prompts(config, Tokenizer.open(tokenizer.parent.parent, config)))
    return list(_drawn_prompts(config))


def _nano_prompts(config: ModelConfig, tokenizer: Tokenizer) -> Iterator[TracePrompt]:
    from flamingo_reference.nano import pictures

    def prompt(case: str, request: Request, media: Sequence[Sequence[Pixels]]) -> TracePrompt:
        text = str(request.prompt)
        tokens = tuple(tokenizer.encode(text))
        return TracePrompt(case=case, text=text, tokens=tokens, media=tuple(tuple(frames) for frames in media), new_tokens=16)

    first, second, third, fourth = (pictures.scene(seed, split="test") for seed in SCENES)
    image: Any = first.frames[0]
    yield prompt("caption of a scene", caption_prompt([], image), [first.frames])
    question, _ = second.questions[0]
    yield prompt("question about a scene", qa_prompt([], question, image), [second.frames])
    shots = [Shot(answer=item.caption, medium=image) for item in (third, fourth)]
    yield prompt("caption after two shots", caption_prompt(shots, image), [third.frames, fourth.frames, first.frames])
    again = [Shot(answer=item.caption, medium=image) for item in (third, fourth)]
    yield prompt("an image shown again (A, B, A)", caption_prompt(again, image), [third.frames, fourth.frames, third.frames])
    clip = pictures.video(CLIP, split="test")
    yield prompt("caption of a video", caption_prompt([], image), [clip.frames])
    yield prompt("text without an image", caption_prompt([], None), [])
    try:
        digit = pictures.digit(DIGIT, split="test")
    except ImportError:  # the scans come from scikit-learn
        return
    yield prompt("caption of a digit", caption_prompt([], image), [digit.frames])


def _drawn_prompts(config: ModelConfig) -> Iterator[TracePrompt]:
    ids = config.tokens
    special = {ids.pad, ids.bos, ids.eoc, ids.image, ids.reset}
    text = [token for token in range(config.language_model.vocab_size) if token not in special] or [ids.eoc]
    cases: list[tuple[str, str, tuple[int, ...]]] = [
        ("text without an image", "tttt", ()),
        ("one image", "itt", (0,)),
        ("text before the first image", "tttittt", (1,)),
        ("one image shown twice (A, B, A)", "itittitt", (0, 1, 0)),
    ]
    if ids.reset is not None:
        cases.append(("the end of a text, then another image", "ittetitt", (0, 1)))
    for case, pattern, shown in cases:
        drawn = iter(inputs.integers(f"trace/{case}", len(pattern), 0, len(text)))
        placed = {"i": ids.image} if ids.reset is None else {"i": ids.image, "e": ids.reset}
        tokens = (ids.bos, *(placed[kind] if kind in placed else text[next(drawn)] for kind in pattern))
        media = tuple((_picture(config, which),) for which in shown)
        yield TracePrompt(case=case, text=" ".join(map(str, tokens)), tokens=tokens, media=media, new_tokens=6)


def _picture(config: ModelConfig, which: int) -> Pixels:
    """A square one; of a model that takes tiles, one that fills two tiles side by side, or one above the other."""
    picture = blocks(f"trace/{which}", config.vision.image_size)
    return picture if config.tiled is None else np.concatenate([picture, picture[::-1]], axis=1 - which % 2)


def blocks(key: str, side: int) -> Pixels:
    """A picture of 4 x 4 blocks of drawn colours, uint8 RGB [side, side, 3]."""
    colours = (inputs.bits(key, 48) >> np.uint64(56)).astype(np.uint8).reshape(4, 4, 3)
    place = np.arange(side) * 4 // side
    return np.ascontiguousarray(colours[place][:, place])


def to_png(frame: Pixels) -> bytes:
    """A PNG file of a frame."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def from_png(data: bytes) -> Pixels:
    """The frame of a PNG file, uint8 RGB."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))
