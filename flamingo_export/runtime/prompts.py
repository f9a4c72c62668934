"""Prompts made of examples and a query, and the shots file.

The forms are those the model was trained with or evaluated by, recorded in the bundle (`InputFormat`); the paper's are

    question answering   <BOS><image>Question: {q} Answer: {a}<EOC> ... <image>Question: {q} Answer:
    vision to text       <BOS><image>Output: {caption}<EOC> ... <image>Output:
    zero-shot            two examples as above, their images left out, then the query with its image

Flamingo, arXiv 2204.14198, appendix C. `<BOS>` stands once, at the start. Where the bundle has a checkpoint's chat template, each example is
a turn of the user's and one of the assistant's, and the template makes a text of them (chat.py).

A shots file is JSON Lines, one example a line, UTF-8; empty lines are skipped:

    {"image": "a.png", "caption": "a red square"}                                       vision to text
    {"image": "b.png", "question": "What colour is the square?", "answer": "red"}        question answering
    {"video": "clip.gif", "caption": "a ball moves left"}                               a video in place of the image
    {"caption": "a blue circle"}                                                        text only: the paper's zero-shot examples

Paths are relative to the file's folder. All lines of a file are of one kind, questions or captions.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flamingo_export.errors import ImageError, PromptError
from flamingo_export.runtime.chat import Shown, Turn, request_of, written
from flamingo_export.runtime.chat_template import DAY
from flamingo_export.runtime.image_files import refuse_url
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.tokenizer import with_tags_around
from flamingo_export.runtime.videos import Video
from flamingo_reference.input_format import PAPER, InputFormat, Tags


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A support example: its medium (None leaves the image out), and a question with its answer or a caption as the answer."""

    answer: str
    question: str | None = None
    medium: MediumSource | None = None


Shots = Sequence[Shot] | str | os.PathLike[str]
"""Examples, or the path of a shots file."""


def qa_prompt(
    shots: Sequence[Shot],
    question: str,
    medium: MediumSource | Sequence[MediumSource] | None,
    inputs: InputFormat = PAPER,
    *,
    system: str | None = None,
    day: datetime.date = DAY,
) -> Request:
    """Question answering: support examples, then the question about `medium`.

    medium: one, None, or for models with a chat template a list of them. inputs: the forms, such as a model's `inputs`.
    system: instructions before the conversation, for models with a chat template. day: today, for templates that say it.
    Raises PromptError if an example has no question, the forms have no place for what is given, or the template refuses it.
    """
    for index, shot in enumerate(shots, start=1):
        if shot.question is None:
            raise PromptError(f"shot {index} is a caption, but a question is asked. Give each shot a question and an answer.")
    if inputs.prompts.template is not None:
        return _conversation(shots, medium, question, inputs, system, day)
    return _assemble(shots, inputs.prompts.question_example, medium, inputs.prompts.question, question, inputs, system)


def caption_prompt(
    shots: Sequence[Shot],
    medium: MediumSource | Sequence[MediumSource] | None,
    inputs: InputFormat = PAPER,
    *,
    system: str | None = None,
    day: datetime.date = DAY,
) -> Request:
    """Vision to text: support examples with captions, then `medium`. Arguments as `qa_prompt` takes them.

    Raises PromptError if an example asks a question, the forms have no place for what is given, or the template refuses it.
    """
    for index, shot in enumerate(shots, start=1):
        if shot.question is not None:
            raise PromptError(
                f"shot {index} asks a question, but a caption is wanted. Ask a question too (--question), or use captions."
            )
    if inputs.prompts.template is not None:
        return _conversation(shots, medium, None, inputs, system, day)
    return _assemble(shots, inputs.prompts.caption_example, medium, inputs.prompts.caption, None, inputs, system)


def as_shots(shots: Shots) -> Sequence[Shot]:
    """The examples themselves, or those of a shots file. Raises PromptError as `read_shots` does, or for what is neither."""
    if isinstance(shots, str | os.PathLike):
        return read_shots(shots)
    given = [shot for shot in shots if isinstance(shot, Shot)] if isinstance(shots, Sequence) else None
    if given is None or len(given) < len(shots):
        raise PromptError("shots are a list of flamingo_export.Shot, or the path of a shots file")
    return given


def without_media(shots: Sequence[Shot]) -> list[Shot]:
    """The same examples, their images left out: two of them make the paper's zero-shot prompt."""
    return [Shot(answer=shot.answer, question=shot.question) for shot in shots]


def read_shots(path: str | os.PathLike[str]) -> list[Shot]:
    """The examples of a shots file (see above).

    Raises PromptError naming the line of each fault: not JSON, unknown or missing keys, wrong types, missing files, kinds mixed.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line separators
    except FileNotFoundError:
        raise PromptError(f"shots file {file} does not exist") from None
    except IsADirectoryError:
        raise PromptError(f"shots file {file} is a folder; give a file of JSON lines") from None
    except OSError as error:
        raise PromptError(f"shots file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"shots file {file} is not UTF-8 text: {error}") from error
    shots: list[Shot] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                shots.append(_parse_shot(line, file.parent))
            except PromptError as error:
                faults.append(f"line {number}: {error}")
    if not faults and len({shot.question is None for shot in shots}) > 1:
        faults.append("some lines ask a question and some only have a caption; use one kind in a file")
    if faults:
        raise PromptError(f"shots file {file}: " + "; ".join(faults))
    if not shots:
        raise PromptError(f"shots file {file} has no examples")
    return shots


def _parse_shot(line: str, folder: Path) -> Shot:
    try:
        record = json.loads(line, object_pairs_hook=each_key_once)
    except PromptError:
        raise
    except json.JSONDecodeError as error:
        raise PromptError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise PromptError(f"not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise PromptError(f"a JSON {type(record).__name__}, expected an object like {{'image': 'a.png', 'caption': '...'}}")
    if unknown := sorted(set(record) - {"image", "video", "question", "answer", "caption"}):
        raise PromptError(f"unknown keys {', '.join(unknown)}; known: image, video, question, answer, caption")
    for key, value in record.items():
        if not isinstance(value, str) or not value.strip():
            raise PromptError(f"{key} is {json.dumps(value)}, expected a text that is not empty")
    if "image" in record and "video" in record:
        raise PromptError("both image and video; give one of them")
    medium: MediumSource | None = None
    for key in ("image", "video"):
        if key in record:
            place = folder / record[key]
            try:
                refuse_url(record[key])
                there = place.exists()
            except ImageError as error:
                raise PromptError(f"{key} {error}") from None
            except (OSError, ValueError) as error:
                raise PromptError(f"{key} {record[key][:80]!r} is not a path ({error})") from None
            if not there:
                raise PromptError(f"{key} {place} does not exist")
            medium = place if key == "image" else Video(source=place)
    return Shot(
        answer=_plain(_answer_of(record), PAPER.tags),
        question=_plain(record["question"], PAPER.tags) if "question" in record else None,
        medium=medium,
    )


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, of which JSON would keep the last without a word. Raises PromptError if a key is there twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise PromptError(f"{', '.join(twice)} is given twice; give each key once, and one example a line")
    return record


def _answer_of(record: dict[str, Any]) -> str:
    if "question" in record:
        if "answer" not in record or "caption" in record:
            raise PromptError("a question goes with an answer (and no caption)")
        return str(record["answer"])
    if "answer" in record:
        raise PromptError("an answer without a question; call it caption, or add the question")
    if "caption" not in record:
        raise PromptError("neither a caption nor a question with its answer")
    return str(record["caption"])


def _conversation(
    shots: Sequence[Shot],
    medium: MediumSource | Sequence[MediumSource] | None,
    question: str | None,
    inputs: InputFormat,
    system: str | None,
    day: datetime.date,
) -> Request:
    """Examples as turns, then the query, by the checkpoint's template."""
    forms, tags = inputs.prompts, inputs.tags

    def says(question: str | None, media: Sequence[MediumSource]) -> list[str | Shown]:
        before, _, after = (forms.caption if question is None else forms.question).partition("{image}")
        words = [part.replace("{question}", "" if question is None else _plain(question, tags)) for part in (before, after)]
        parts: list[str | Shown] = [words[0], *map(Shown, media), words[1]]
        return [part for part in parts if part != ""]

    turns = [] if system is None else [Turn(role="system", parts=[_plain(system, tags)], where="the system message")]
    for index, shot in enumerate(shots, start=1):
        shown = [] if shot.medium is None else [shot.medium]
        turns.append(Turn(role="user", parts=says(shot.question, shown), where=f"shot {index}"))
        turns.append(Turn(role="assistant", parts=[_plain(shot.answer, tags)], where=f"shot {index}"))
    turns.append(Turn(role="user", parts=says(question, _media(medium)), where="the question"))
    return request_of(written(turns, inputs, day), inputs)


def _media(medium: MediumSource | Sequence[MediumSource] | None) -> list[MediumSource]:
    if isinstance(medium, list | tuple):
        return list(medium)
    return [] if medium is None else [cast(MediumSource, medium)]


def _assemble(
    shots: Sequence[Shot],
    example: str,
    medium: MediumSource | Sequence[MediumSource] | None,
    query: str,
    question: str | None,
    inputs: InputFormat,
    system: str | None,
) -> Request:
    """The examples in one form, then the query in another. `<BOS>` stands once, at the start."""
    if system is not None:
        raise PromptError("this model's prompts have no place for a system message; put it into the question")
    shown = _media(medium)
    if len(shown) > 1:
        raise PromptError(
            f"the form {query!r} has one image, {len(shown)} were given. Write the prompt, with a tag for each: Request(prompt=..., media=[...])"
        )
    medium = shown[0] if shown else None
    tags = inputs.tags
    text, media = tags.bos or "", []
    for shot in shots:
        text += _filled(example, shot.medium, shot.question, shot.answer, tags)
        if shot.medium is not None:
            media.append(shot.medium)
    media += shown
    texts = [text for shot in shots for text in (shot.question, shot.answer)] + [question]
    return Request(
        prompt=text + _filled(query, medium, question, None, tags),
        media=media,
        quoted=tuple(text for text in texts if text is not None),
        forms=inputs.prompts,
    )


def _filled(form: str, medium: MediumSource | None, question: str | None, answer: str | None, tags: Tags) -> str:
    """A form with its fields put in, in one pass: a question may hold braces."""
    image = with_tags_around(tags.image, tags) if medium is not None else ""
    given = {"question": question, "answer": answer}
    fields = {"image": image, **{name: _plain(text, tags) for name, text in given.items() if text is not None}}
    return re.sub(r"\{(image|question|answer)\}", lambda field: fields[field[1]], form)


def _plain(text: str, tags: Tags) -> str:
    """The text without outer blanks. Raises PromptError if it is empty or contains a tag, which would shift every later image."""
    text = text.strip()
    if not text:
        raise PromptError("a question or answer is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PromptError(f"{text!a} holds half of a surrogate pair, which is not a character")
    for tag in tags.all:
        if tag in text:
            raise PromptError(f"{text!r} contains the tag {tag}; images are placed by the prompt's format, give plain text")
    return text
