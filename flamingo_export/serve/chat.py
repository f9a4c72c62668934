"""Messages to a prompt in the form that the model was trained with.

    user turn        images and videos become tags where they stand; text makes the question form, no text the caption form
    assistant turn   closes the user turn before it: the two are a support example
    last turn        the user's, left open for the model to answer

`shots` are examples before the first turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flamingo_export.serve.bodies import AudioPart, ImagePart, Message, Part, Shot, TextPart, VideoPart
from flamingo_export.serve.errors import ApiError
from flamingo_reference.input_format import InputFormat

_FIELD = re.compile(r"\{(image|question|answer)\}")


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


def chat_prompt(messages: Sequence[Message], shots: Sequence[Shot], inputs: InputFormat) -> ChatPrompt:
    """The prompt of a conversation. Raises ApiError for roles, parts or orders that the form has no place for."""
    if not messages:
        raise _bad("messages is empty")
    turns = _Turns(inputs)
    for number, shot in enumerate(shots):
        turns.shot(number, shot)
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.tool_calls or message.role in ("tool", "function"):
            raise _bad(f"{where}: the models of this server have no tools")
        if message.role in ("system", "developer"):
            raise _bad(f"{where}: this model's prompts have no place for a {message.role} message; put it into the user's text")
        if message.role == "user":
            turns.user(where, _parts(message))
        else:
            turns.assistant(where, _parts(message))
    return turns.finished()


class _Turns:
    def __init__(self, inputs: InputFormat) -> None:
        self._inputs = inputs
        self._text = inputs.tags.bos or ""
        self._media: list[MediumUrl] = []
        self._quoted: list[str] = []
        self._open: dict[str, str] | None = None
        """Fields of the user turn that waits for its answer."""

    def shot(self, number: int, shot: Shot) -> None:
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
        self.user(where, parts, text_only=not parts)
        self.assistant(where, [TextPart(answer)])

    def user(self, where: str, parts: Sequence[Part], *, text_only: bool = False) -> None:
        if self._open is not None:
            raise _bad(f"{where}: two user messages follow each other; put them into one, or an assistant message between them")
        tag = self._inputs.tags.image
        leading, question = "", ""
        for part in parts:
            if isinstance(part, AudioPart):
                raise _bad(f"{where}: the models of this server do not listen to audio")
            if isinstance(part, TextPart):
                self._quoted.append(part.text)
                question += part.text
                continue
            video = isinstance(part, VideoPart)
            self._media.append(MediumUrl(part.url, video=video, frames=part.frames if isinstance(part, VideoPart) else None))
            if question.strip():
                question += tag
            else:
                leading, question = leading + tag, ""
        question = question.strip()
        if not (leading or question or text_only):
            raise _bad(f"{where}: has neither text nor an image")
        self._open = {"image": leading} | ({"question": question} if question else {})

    def assistant(self, where: str, parts: Sequence[Part]) -> None:
        if self._open is None:
            raise _bad(f"{where}: an assistant message answers a user message, and there is none before it")
        if not all(isinstance(part, TextPart) for part in parts):
            raise _bad(f"{where}: an assistant message holds text and nothing else")
        answer = "".join(part.text for part in parts if isinstance(part, TextPart)).strip()
        if not answer:
            raise _bad(f"{where}: an answer is empty")
        self._quoted.append(answer)
        forms, fields = self._inputs.prompts, self._open
        self._text += _filled(
            forms.question_example if "question" in fields else forms.caption_example, fields | {"answer": answer}
        )
        self._open = None

    def finished(self) -> ChatPrompt:
        if self._open is None:
            raise _bad("the last message is the assistant's; the model answers a user's message")
        forms = self._inputs.prompts
        self._text += _filled(forms.question if "question" in self._open else forms.caption, self._open)
        return ChatPrompt(self._text, tuple(self._media), tuple(self._quoted))


def _filled(form: str, fields: dict[str, str]) -> str:
    """A form with its fields put in, in one pass: a question may hold braces."""
    return _FIELD.sub(lambda field: fields[field[1]], form)


def _parts(message: Message) -> Sequence[Part]:
    if message.content is None:
        return []
    return [TextPart(message.content)] if isinstance(message.content, str) else message.content


def _bad(message: str) -> ApiError:
    return ApiError(400, message, param="messages")
