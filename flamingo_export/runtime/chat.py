"""Conversations: turns of a user and the model, as one prompt in the form that the model was trained with.

Where the bundle has the checkpoint's chat template, the template makes the text. Else the prompt's forms do:

    user turn        media become tags where they stand; text makes the question form, no text the caption form
    assistant turn   closes the user turn before it: the two are a support example
    last turn        the user's, left open for the model to answer
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flamingo_export.errors import PromptError
from flamingo_export.runtime.chat_template import DAY, chat_template
from flamingo_export.runtime.images import ImageSource
from flamingo_export.runtime.request import Request
from flamingo_export.runtime.videos import Video
from flamingo_reference.input_format import InputFormat

Role = Literal["system", "user", "assistant"]
_FIELD = re.compile(r"\{(image|question|answer)\}")


@dataclass(frozen=True)
class Shown:
    """A medium where it stands in a turn: a source, or whatever stands for it."""

    medium: Any


@dataclass(frozen=True, kw_only=True)
class Turn:
    """role: whose it is. parts: texts and media, in order. where: what messages about it call it. text_only: whether a user's turn may say
    and show nothing, as an example without its image does."""

    role: Role
    parts: Sequence[str | Shown]
    where: str = "a turn"
    text_only: bool = False

    @property
    def text(self) -> str:
        """What is said, without what is shown."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Written:
    """text: with a tag for each of `media`, in order. quoted: the texts in it that are the user's own, where tags are not allowed."""

    text: str
    media: tuple[Any, ...]
    quoted: tuple[str, ...]


def written(turns: Sequence[Turn], inputs: InputFormat, day: datetime.date = DAY) -> Written:
    """The text of a conversation. day: today, for templates that say it.

    Raises PromptError for roles, parts or orders that the form has no place for, and what the template refuses, in its words.
    """
    if not turns:
        raise PromptError("messages is empty")
    for turn in turns:
        if turn.role != "user" and not all(isinstance(part, str) for part in turn.parts):
            article = "an" if turn.role == "assistant" else "a"
            raise PromptError(f"{turn.where}: {article} {turn.role} message holds text and nothing else")
        if turn.role == "assistant" and not turn.text.strip():
            raise PromptError(f"{turn.where}: an answer is empty")
        if turn.role == "user" and not turn.text_only and not turn.text.strip() and all(isinstance(p, str) for p in turn.parts):
            raise PromptError(f"{turn.where}: has neither text nor an image")
    return _by_template(turns, inputs, day) if inputs.prompts.template is not None else _by_forms(turns, inputs)


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    images: Iterable[ImageSource | Video] = (),
    *,
    inputs: InputFormat,
    day: datetime.date = DAY,
) -> Request:
    """A conversation as a Request, for `model.generate` and `model.stream`.

    messages: dictionaries with a role (system, user or assistant) and a content: a text, or a list of parts {"type": "text", "text": ...} and
    {"type": "image"}; an image's source stands there as "image", or the next of `images` is taken.
    inputs: the model's (`model.inputs`). day: today, for templates that say it.
    Raises PromptError.
    """
    given = list(images)
    left = iter(given)
    turns = [_turn(message, f"messages[{index}]", left) for index, message in enumerate(messages)]
    if (unused := sum(1 for _ in left)) > 0:
        raise PromptError(
            f"{len(given)} images were given, the messages show {len(given) - unused}. "
            'Put a part {"type": "image"} into a message for each, where it stands in the text.'
        )
    return request_of(written(turns, inputs, day), inputs)


def request_of(found: Written, inputs: InputFormat) -> Request:
    """The request of a conversation whose media are sources."""
    return Request(prompt=found.text, media=list(found.media), quoted=found.quoted, forms=inputs.prompts)


def _turn(message: Any, where: str, images: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is a {type(message).__name__}, expected a dictionary with role and content")
    if message.get("tool_calls") or message.get("role") in ("tool", "function", "ipython"):
        raise PromptError(f"{where}: tools are not offered; leave out tool calls and their results")
    if unknown := sorted(str(key) for key in message.keys() - {"role", "content", "tool_calls"}):
        raise PromptError(f"{where} has {', '.join(unknown)}; known are role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise PromptError(f"{where}: the role is {role!r:.80}, expected system, user or assistant")
    if isinstance(content, str):
        return Turn(role=role, parts=[content], where=where)
    if not isinstance(content, list | tuple):
        raise PromptError(f"{where}: the content is {type(content).__name__}, expected a text or a list of parts")
    return Turn(role=role, parts=[_part(part, where, images) for part in content], where=where)


def _part(part: Any, where: str, images: Any) -> str | Shown:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, Mapping) and part.get("type") in ("image", "video"):
        kind = part["type"]
        source = part.get(kind)
        if source is None:
            source = next(images, None)
            if source is None:
                raise PromptError(f"{where} shows an {kind} that was not given. Give it there, or one more of images=[...].")
        return Shown(Video(source=source) if kind == "video" and not isinstance(source, Video) else source)
    raise PromptError(
        f'{where} has a part {part!r:.80}, expected {{"type": "text", "text": ...}} or {{"type": "image", "image": SOURCE}}'
    )


def _by_template(turns: Sequence[Turn], inputs: InputFormat, day: datetime.date) -> Written:
    tags = inputs.tags
    messages: list[dict[str, Any]] = []
    media: list[Any] = []
    quoted: list[str] = []
    for turn in turns:
        shown = [part.medium for part in turn.parts if isinstance(part, Shown)]
        content = [_piece(part) for part in turn.parts]
        messages.append({"role": turn.role, "content": content if shown else turn.text})
        media += shown
        quoted += [part for part in turn.parts if isinstance(part, str)]
    if turns[-1].role != "user":
        raise PromptError(f"the last message is the {turns[-1].role}'s; the model answers a user's message")
    for text in quoted:
        if found := next((tag for tag in tags.all if tag in text), None):
            raise PromptError(f"{text!r} contains {found}, which the model reads as a token of its own; give plain text")
    special = {"bos_token": tags.bos or "", "eos_token": tags.eoc}
    template = chat_template(inputs.prompts.template or "")
    text = template.render(messages, special=special, day=day)
    if (count := text.count(tags.image)) != len(media):
        raise PromptError(
            f"{len(media)} images are shown, the model's chat template writes {count} {tags.image} tags: it is not one for images. "
            "Build the bundle with the template that the model was tuned with."
        )
    return Written(text, tuple(media), tuple(quoted))


def _piece(part: str | Shown) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _by_forms(turns: Sequence[Turn], inputs: InputFormat) -> Written:
    forms, tag = inputs.prompts, inputs.tags.image
    text = inputs.tags.bos or ""
    media: list[Any] = []
    quoted: list[str] = []
    waiting: dict[str, str] | None = None
    """Fields of the user turn that waits for its answer."""
    for turn in turns:
        if turn.role == "system":
            raise PromptError(
                f"{turn.where}: this model's prompts have no place for a system message; put it into the user's text"
            )
        if turn.role == "assistant":
            if waiting is None:
                raise PromptError(f"{turn.where}: an assistant message answers a user message, and there is none before it")
            answer = turn.text.strip()
            quoted.append(answer)
            form = forms.question_example if "question" in waiting else forms.caption_example
            text += _filled(form, waiting | {"answer": answer})
            waiting = None
            continue
        if waiting is not None:
            raise PromptError(
                f"{turn.where}: two user messages follow each other; put them into one, or an assistant message between them"
            )
        leading, question = "", ""
        for part in turn.parts:
            if isinstance(part, str):
                quoted.append(part)
                question += part
                continue
            media.append(part.medium)
            if question.strip():
                question += tag
            else:
                leading, question = leading + tag, ""
        question = question.strip()
        waiting = {"image": leading} | ({"question": question} if question else {})
    if waiting is None:
        raise PromptError("the last message is the assistant's; the model answers a user's message")
    text += _filled(forms.question if "question" in waiting else forms.caption, waiting)
    return Written(text, tuple(media), tuple(quoted))


def _filled(form: str, fields: Mapping[str, str]) -> str:
    """A form with its fields put in, in one pass: a question may hold braces."""
    return _FIELD.sub(lambda field: fields[field[1]], form)
