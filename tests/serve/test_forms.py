"""Answers of a given form over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Client, image_part, user

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "purple"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_answers_of_a_given_form(client: Client) -> None:
    pytest.importorskip("llguidance", reason="the extra `constraints`")
    jsonschema = pytest.importorskip("jsonschema", reason="the oracle of JSON schemas")
    wrapped = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    for form in (
        {"response_format": wrapped},
        {"json_schema": SCHEMA, "beams": 2},
        {"response_format": wrapped, "temperature": 1, "n": 2},
    ):
        for choice in client.chat(messages=user(image_part()), **form).json["choices"]:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    found = client.chat(messages=user(image_part()), response_format={"type": "json_object"}, max_tokens=200).json["choices"][0]
    assert found["finish_reason"] == "length" or isinstance(json.loads(found["message"]["content"]), dict)
    choices = ["a red square", "purple"]
    assert client.chat(messages=user(image_part()), choice=choices).json["choices"][0]["message"]["content"] in choices
    body = {"model": "nano", "prompt": "It is", "regex": "[0-9]{3}", "logprobs": 1}
    found = client.post("/v1/completions", body).json["choices"][0]
    assert found["text"].strip().isdigit()
    assert len(found["text"].strip()) == 3


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "no json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wrong"}}}},
            "Invalid type",
        ),
        ({"response_format": {"type": "json_object"}, "json_schema": {}}, "exclude each other"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a", "choice": ["a"]}, "only one of"),
        (
            {"json_schema": {"allOf": [{"anyOf": [{"properties": {f"k{a}{b}": {}}} for b in range(6)]} for a in range(8)]}},
            "form",
        ),
        ({"json_schema": {"enum": ["x" * 70_000]}}, "at most 65536"),
        ({"json_schema": {"$ref": "#"}}, "form"),
    ],
)
def test_forms_that_cannot_be(client: Client, form: dict[str, Any], said: str) -> None:
    pytest.importorskip("llguidance", reason="the extra `constraints`")
    found = client.chat(messages=user(image_part()), **form)
    assert found.status == 400
    assert said in found.error["message"]
