"""What the bodies of requests may hold. A field that is not known, or that no model here can honour, is refused by name."""

from __future__ import annotations

import difflib
from typing import Any, Literal, TypeVar

import msgspec

from flamingo_export.serve.refusals import ApiError

T = TypeVar("T")


class Url(msgspec.Struct, frozen=True):
    """An image's or video's URL, as OpenAI writes it. `detail` has no effect: every image is encoded at the model's one size."""

    url: str
    detail: str | None = None


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Text of a message."""

    text: str


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="image_url"):
    """An image, where it stands in the message."""

    image_url: Url | str

    @property
    def url(self) -> str:
        """Where it is."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class VideoPart(msgspec.Struct, frozen=True, tag_field="type", tag="video_url"):
    """A video, where it stands in the message."""

    video_url: Url | str
    frames: int | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return self.video_url if isinstance(self.video_url, str) else self.video_url.url


class AudioPart(msgspec.Struct, frozen=True, tag_field="type", tag="input_audio"):
    """Known so that it can be refused by name."""

    input_audio: Any


Part = TextPart | ImagePart | VideoPart | AudioPart


class Message(msgspec.Struct, frozen=True):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    refusal: str | None = None


class Shot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An example, shown before the messages."""

    image: str | None = None
    video: str | None = None
    question: str | None = None
    answer: str | None = None
    caption: str | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream holds besides text."""

    include_usage: bool = False


class NamedSchema(msgspec.Struct, frozen=True):
    """A JSON schema as OpenAI wraps it. `strict` makes no difference: every answer is of the schema."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """The form of an answer."""

    type: str
    json_schema: NamedSchema | None = None


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """What every request that generates may hold. Fields of ours beside OpenAI's: `generate`'s names, and timeout."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    timeout: float | None = None
    # Known, and without effect on the answer.
    user: str | None = None


class Chat(Sampled, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    shots: list[Shot] = []
    date: str | None = None
    """Of ours: today as YYYY-MM-DD, for chat templates that say it."""


class Completion(Sampled, frozen=True, kw_only=True):
    """POST /v1/completions. prompt: a text, token ids, or a list of either. images: URLs of media, one for each `<image>` of the prompt."""

    prompt: str | list[int | str | list[int]]
    images: list[str] = []
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/score: candidate answers by log-likelihood after a prompt or messages. end: whether they end there (`<EOC>`)."""

    model: str
    candidates: list[str]
    prompt: str | None = None
    images: list[str] = []
    messages: list[Message] | None = None
    shots: list[Shot] = []
    end: bool = True
    timeout: float | None = None
    user: str | None = None


# Fields of OpenAI's API whose default values clients send without meaning anything by them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "store": (True, False),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "safety_identifier": (),
}
_WITHOUT_EFFECT = {"store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}


# msgspec compiles a type's annotations each time it is asked for its fields, which took half the time of a refusal.
_FIELDS: dict[type[Any], frozenset[str]] = {
    kind: frozenset(field.encode_name for field in msgspec.structs.fields(kind)) for kind in (Chat, Completion, Scored)
}


def parse(body: bytes, kind: type[T]) -> T:
    """A body as what a route expects. Raises ApiError: 400 where it is not JSON or asks for what is not offered, 422 for wrong types."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(400, "The body is not a JSON object.", code="invalid_json")
    known = _FIELDS[kind]
    for name, value in list(raw.items()):
        if name in known:
            continue
        if name not in _NEUTRAL:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ApiError(400, f"{name!r} is not a field of this request.{hint}", param=name, code="unknown_field")
        if value is not None and name not in _WITHOUT_EFFECT and not any(value == neutral for neutral in _NEUTRAL[name]):
            raise ApiError(400, f"{name} is not offered by the models of this server.", param=name, code="unsupported")
        del raw[name]
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        param = text.rpartition("`$.")[2].rstrip("`").partition("[")[0] if "`$." in text else None
        raise ApiError(422, text, param=param, code="invalid_type") from None
