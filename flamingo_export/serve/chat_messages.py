"""Messages of the API as the turns of a conversation (`runtime/chat.py`). `shots` are examples before the first turn."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from flamingo_export.errors import PromptError
from flamingo_export.runtime.chat import Role, Shown, Turn, written
from flamingo_export.runtime.chat_template import DAY
from flamingo_export.serve.bodies import AudioPart, ImagePart, Message, Part, Shot, TextPart, VideoPart
from flamingo_export.serve.refusals import ApiError
from flamingo_reference.input_format import InputFormat


@dataclass(frozen=True)
class MediumUrl:
    """A medium that a prompt has a tag for. video: its frames are wanted, `frames` of them."""

    url: str
    video: bool = False
    frames: int | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """text: with a tag for each of `media`, in order. quoted: the texts in it that are the user's own, where tags are not allowed."""

    text: str
    media: tuple[MediumUrl, ...]
    quoted: tuple[str, ...]


def chat_prompt(messages: Sequence[Message], shots: Sequence[Shot], inputs: InputFormat, day: str | None = None) -> ChatPrompt:
    """The prompt of a conversation. day: today as YYYY-MM-DD, for templates that say it.

    Raises ApiError for roles, parts or orders that the form has no place for, and what a template refuses.
    """
    if not messages:
        raise _bad("messages is empty")
    turns = [turn for number, shot in enumerate(shots) for turn in _shot(number, shot)]
    turns += [_turn(f"messages[{number}]", message) for number, message in enumerate(messages)]
    try:
        found = written(turns, inputs, _day(day))
    except PromptError as error:
        raise _bad(str(error)) from error
    return ChatPrompt(found.text, found.media, found.quoted)


def _turn(where: str, message: Message) -> Turn:
    if message.tool_calls or message.role in ("tool", "function"):
        raise _bad(f"{where}: the models of this server have no tools")
    role: Role = "assistant" if message.role == "assistant" else "user" if message.role == "user" else "system"
    return Turn(role=role, parts=[_part(where, part) for part in _parts(message)], where=where)


def _shot(number: int, shot: Shot) -> list[Turn]:
    where = f"shots[{number}]"
    if shot.image is not None and shot.video is not None:
        raise _bad(f"{where}: give an image or a video")
    answer = shot.answer if shot.question is not None else shot.caption
    if answer is None or (shot.question is None and shot.answer is not None) or (shot.question and shot.caption):
        raise _bad(f"{where}: give a question with its answer, or a caption")
    parts: list[Part] = []
    if shot.image is not None:
        parts.append(ImagePart(shot.image))
    if shot.video is not None:
        parts.append(VideoPart(shot.video))
    if shot.question is not None:
        parts.append(TextPart(shot.question))
    return [
        Turn(role="user", parts=[_part(where, part) for part in parts], where=where, text_only=not parts),
        Turn(role="assistant", parts=[answer], where=where),
    ]


def _part(where: str, part: Part) -> str | Shown:
    if isinstance(part, AudioPart):
        raise _bad(f"{where}: the models of this server do not listen to audio")
    if isinstance(part, TextPart):
        return part.text
    return Shown(MediumUrl(part.url, video=True, frames=part.frames) if isinstance(part, VideoPart) else MediumUrl(part.url))


def _parts(message: Message) -> Sequence[Part]:
    if message.content is None:
        return []
    return [TextPart(message.content)] if isinstance(message.content, str) else message.content


def _day(day: str | None) -> datetime.date:
    if day is None:
        return DAY
    try:
        return datetime.date.fromisoformat(day)
    except ValueError:
        raise ApiError(400, f"date is {day!r:.40}, expected a day as YYYY-MM-DD", param="date") from None


def _bad(message: str) -> ApiError:
    return ApiError(400, message, param="messages")
