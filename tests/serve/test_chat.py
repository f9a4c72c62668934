"""Messages to prompts: the right text, letter by letter, in each family's form."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flamingo_export.serve.bodies import Chat, Message, Shot, parse
from flamingo_export.serve.chat_messages import chat_prompt
from flamingo_export.serve.refusals import ApiError
from flamingo_reference.input_format import IDEFICS_INSTRUCT, OPENFLAMINGO, PAPER


def messages(*turns: tuple[str, Any]) -> list[Message]:
    return msgspec.convert([{"role": role, "content": content} for role, content in turns], list[Message])


def image(url: str = "data:,a") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_a_question_about_an_image() -> None:
    found = chat_prompt(messages(("user", [image(), text("What colour?")])), [], PAPER)
    assert found.text == "<BOS><image>Question: What colour? Answer:"
    assert [medium.url for medium in found.media] == ["data:,a"]
    assert found.quoted == ("What colour?",)


def test_an_image_without_text_is_a_caption() -> None:
    assert chat_prompt(messages(("user", [image()])), [], PAPER).text == "<BOS><image>Output:"


def test_text_without_an_image() -> None:
    assert chat_prompt(messages(("user", "Why?")), [], PAPER).text == "<BOS>Question: Why? Answer:"


def test_an_assistant_turn_closes_a_shot() -> None:
    turns = messages(
        ("user", [image("data:,a"), text("One?")]), ("assistant", " red "), ("user", [image("data:,b"), text("Two?")])
    )
    found = chat_prompt(turns, [], PAPER)
    assert found.text == "<BOS><image>Question: One? Answer: red<EOC><image>Question: Two? Answer:"
    assert [medium.url for medium in found.media] == ["data:,a", "data:,b"]


def test_images_inside_the_text_stand_where_they_were() -> None:
    parts = [image("data:,1"), image("data:,2"), text("Compare "), image("data:,3"), text(" with the first.")]
    found = chat_prompt(messages(("user", parts)), [], PAPER)
    assert found.text == "<BOS><image><image>Question: Compare <image> with the first. Answer:"
    assert [medium.url for medium in found.media] == ["data:,1", "data:,2", "data:,3"]
    assert found.quoted == ("Compare ", " with the first.")


def test_shots_come_first() -> None:
    shots = [
        Shot(image="data:,s", question="Q?", answer="A"),
        Shot(image="data:,t", caption="a dog"),
        Shot(caption="no picture"),
    ]
    found = chat_prompt(messages(("user", [image("data:,q")])), shots, PAPER)
    assert found.text == (
        "<BOS><image>Question: Q? Answer: A<EOC><image>Output: a dog<EOC>Output: no picture<EOC><image>Output:"
    )
    assert [medium.url for medium in found.media] == ["data:,s", "data:,t", "data:,q"]


def test_other_families_have_their_own_forms() -> None:
    turns = messages(("user", [image(), text("One?")]), ("assistant", "red"), ("user", [image(), text("Two?")]))
    assert chat_prompt(turns, [], OPENFLAMINGO).text == (
        "<image>Question:One? Short answer:red<|endofchunk|><image>Question:Two? Short answer:"
    )
    assert chat_prompt(turns, [], IDEFICS_INSTRUCT).text == (
        "<s>User:<image>One?<end_of_utterance>\nAssistant: red<end_of_utterance>\nUser:<image>Two?<end_of_utterance>\nAssistant:"
    )


def test_braces_in_a_question_are_text() -> None:
    assert chat_prompt(messages(("user", "{answer} {image}?")), [], PAPER).text == "<BOS>Question: {answer} {image}? Answer:"


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "messages is empty"),
        ([("system", "Be brief."), ("user", "a")], "no place for a system message"),
        ([("user", "a"), ("user", "b")], "two user messages follow each other"),
        ([("assistant", "a")], "there is none before it"),
        ([("user", "a"), ("assistant", "b")], "the last message is the assistant's"),
        ([("user", "a"), ("assistant", "  ")], "an answer is empty"),
        ([("user", " ")], "neither text nor an image"),
        ([("user", [{"type": "input_audio", "input_audio": {}}])], "audio"),
        ([("tool", "a")], "no tools"),
        ([("user", "a"), ("assistant", [image()])], "holds text and nothing else"),
    ],
)
def test_what_the_form_has_no_place_for_is_refused(turns: list[tuple[str, Any]], said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        chat_prompt(messages(*turns), [], PAPER)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "shot",
    [
        Shot(image="data:,a"),
        Shot(question="Q"),
        Shot(answer="A"),
        Shot(question="Q", answer="A", caption="C"),
        Shot(image="data:,a", video="data:,b", caption="C"),
    ],
)
def test_a_shot_that_says_too_little_or_too_much(shot: Shot) -> None:
    with pytest.raises(ApiError, match=r"shots\[0\]"):
        chat_prompt(messages(("user", "a")), [shot], PAPER)


def body(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})


def test_neutral_values_of_fields_that_are_not_offered_pass() -> None:
    parsed = parse(body(presence_penalty=0, tools=[], tool_choice="auto", store=False, metadata=None), Chat)
    assert parsed.model == "m"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"num_beams": 3}, 400, "num_beams"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"messages": "hello"}, 422, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "picture"}]}]}, 422, "messages"),
    ],
)
def test_other_values_are_refused_by_name(fields: dict[str, Any], status: int, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body(**fields), Chat)
    assert (caught.value.status, caught.value.param) == (status, param)


def test_an_unknown_field_gets_the_nearest_name() -> None:
    with pytest.raises(ApiError, match="Did you mean temperature"):
        parse(body(temperatur=1), Chat)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b'"a"', b"[" * 100_000])
def test_what_is_no_json_object_is_a_400(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(raw, Chat)
    assert caught.value.status == 400
