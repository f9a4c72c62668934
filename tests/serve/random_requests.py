"""Requests of every kind that a server takes, and of some that it refuses, at random."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .conftest import ROOT, data_url

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@dataclass
class Asked:
    """A request of the pool. search: greedy, beams, drawn or none; status: the only one that it may get, 0 for either of 200 and 503."""

    path: str
    body: Any
    search: str = "none"
    status: int = 200
    streams: bool = False
    alone: Any = None
    wanted: Callable[[str], bool] = field(default=lambda _: True)


class Kinds:
    """Makes requests at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pictures = [data_url(ROOT / "examples" / name) for name in ("a.png", "q.png")]
        for number in range(14):
            pixels = np.full((64, 64, 3), 255, np.uint8)
            x, y = 3 + 2 * number, 30 - 2 * number
            pixels[y : y + 24, x : x + 24] = [(200, 0, 0), (0, 160, 0), (0, 0, 200), (140, 0, 140)][number % 4]
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            self.pictures.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
        self.shots = [{"image": picture, "caption": f"{number} squares"} for number, picture in enumerate(self.pictures[:3])]
        try:
            import llguidance  # noqa: F401

            self.forms = True
        except ImportError:
            self.forms = False

    def one(self) -> Asked:
        made = self.rng.choices([self.chat, self.completion, self.echo, self.score, self.bad, self.timed], [9, 4, 2, 2, 3, 1])[
            0
        ]()
        if isinstance(made.body, dict):
            made.body.setdefault("model", "nano")
        return made

    def settings(self) -> tuple[str, dict[str, Any]]:
        """A way to search, and its fields."""
        rng = self.rng
        search = rng.choice(["greedy", "greedy", "beams", "drawn"])
        fields: dict[str, Any] = {"max_tokens": rng.randint(1, 12)}
        if search == "beams":
            fields |= {"beams": rng.randint(2, 4), "length_penalty": rng.choice([0, 1])}
            fields["n"] = rng.randint(1, fields["beams"])
        if search == "drawn":
            fields |= {"temperature": rng.choice([0.7, 1.5]), "seed": rng.randint(0, 5), "n": rng.randint(1, 3)}
            fields |= rng.choice([{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.05}])
        fields |= rng.choice([{}, {}, {"stop": ["square"]}, {"stop": [" a", "zz"]}, {"min_tokens": 5, "max_tokens": 9}])
        return search, fields | rng.choice(
            [{}, {}, {"repetition_penalty": 1.3}, {"no_repeat_ngram": 2}, {"logit_bias": {"20": 2}}]
        )

    def form(self, made: Asked) -> Asked:
        """Now and then with an answer of a given form."""
        if not self.forms or made.search == "beams" or self.rng.random() < 0.8:
            return made
        jsonschema = pytest.importorskip("jsonschema", reason="the oracle of JSON schemas")
        for name in ("stop", "min_tokens", "repetition_penalty", "no_repeat_ngram", "logit_bias"):
            made.body.pop(name, None)

        def of_schema(text: str) -> bool:
            jsonschema.validate(json.loads(text), SCHEMA)
            return True

        choices = ["a red square", "purple"]
        form, made.wanted = self.rng.choice(
            [
                ({"json_schema": SCHEMA, "max_tokens": 40}, of_schema),
                (
                    {"regex": "[0-9]{2} [ab]", "max_tokens": 12},
                    lambda text: re.fullmatch("[0-9]{2} [ab]", text.strip()) is not None,
                ),
                ({"choice": choices, "max_tokens": 12}, lambda text: text.strip() in choices),
            ]
        )
        made.body |= form
        return made

    def image(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.rng.choice(self.pictures)}}

    def messages(self) -> list[dict[str, Any]]:
        rng = self.rng
        parts: list[dict[str, Any]] = [self.image()]
        if rng.random() < 0.5:
            parts.append({"type": "text", "text": rng.choice(["What colour is the square?", "How many objects are there?"])})
        return [{"role": "user", "content": parts}]

    def chat(self) -> Asked:
        search, fields = self.settings()
        body = {"messages": self.messages(), "logprobs": True, "top_logprobs": 2, **fields}
        if self.rng.random() < 0.4:
            body["shots"] = self.shots[: self.rng.randint(1, 3)]
        return self.form(Asked("/v1/chat/completions", body, search, streams=True))

    def completion(self) -> Asked:
        search, fields = self.settings()
        rng = self.rng
        prompt: Any = rng.choice(["<image>Output:", "<image>Output: two<EOC><image>Output:", "A red", [1, 30, 31, 32, 33]])
        body: dict[str, Any] = {"prompt": prompt, "logprobs": 2, **fields}
        if isinstance(prompt, str):
            body["images"] = [rng.choice(self.pictures) for _ in range(prompt.count("<image>"))]
        if body.get("n", 1) == 1 and not body.get("images") and rng.random() < 0.3:
            return Asked("/v1/completions", body | {"prompt": ["A red", "Two"]}, search)
        return self.form(Asked("/v1/completions", body, search, streams=True))

    def echo(self) -> Asked:
        prompt = "<image>Output: " + self.rng.choice(["a red square", "two green triangles", "it is purple"])
        body = {"prompt": prompt, "images": [self.rng.choice(self.pictures)], "echo": True, "logprobs": 1}
        return Asked("/v1/completions", body | {"max_tokens": self.rng.choice([0, 0, 3])})

    def score(self) -> Asked:
        body: dict[str, Any] = {"candidates": self.rng.sample(["red", "green", "purple", "a blue square", "two"], 3)}
        if self.rng.random() < 0.5:
            body["messages"] = self.messages()
        else:
            body |= {"prompt": "<image>Output:", "images": [self.rng.choice(self.pictures)]}
        return Asked("/v1/score", body)

    def timed(self) -> Asked:
        """Given up by its deadline, unless it is sooner."""
        made = self.chat()
        made.body |= {"timeout": self.rng.choice([0.001, 0.2])}
        made.status, made.streams = 0, False
        return made

    def bad(self) -> Asked:
        rng = self.rng
        chat = {"messages": self.messages()}
        file = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
        broken = {"type": "image_url", "image_url": {"url": self.pictures[0][:80]}}
        status, body = rng.choice(
            [
                (404, chat | {"model": "other"}),
                (422, chat | {"max_tokens": "many"}),
                (400, chat | {"max_tokenz": 3}),
                (400, chat | {"n": 0}),
                (400, chat | {"temperature": -1}),
                (400, chat | {"tools": [{}]}),
                (400, chat | {"logit_bias": {"99999999": 1}}),
                (400, {"messages": [{"role": "user", "content": [file]}]}),
                (400, {"messages": [{"role": "user", "content": [broken]}]}),
                (400, {"messages": [{"role": "user", "content": "a <image> b"}]}),
                (400, {"messages": [{"role": "user", "content": "word " * 3000}]}),
                (400, {"messages": [{"role": "user", "content": [self.image()] * 70}]}),
                (400, b""),
                (400, b"[1, 2"),
            ]
        )
        return Asked("/v1/chat/completions", body, status=status)
