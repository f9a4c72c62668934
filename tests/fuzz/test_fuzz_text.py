"""Prompts, settings, shots files and calibration data that are not what they should be."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_chat import TEMPLATE
from PIL import Image

import flamingo_export
from flamingo_calibration import BadSample, read_samples
from flamingo_export.runtime.chat_template import ChatTemplate
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt, read_shots
from flamingo_export.runtime.request import Request
from flamingo_reference.input_format import IDEFICS, IDEFICS_INSTRUCT, OPENFLAMINGO, PAPER

from mutations import STRANGE, fuzz, mutated, mutated_json  # isort: skip

pytestmark = pytest.mark.slow

PICTURE = np.zeros((4, 5, 3), np.uint8)
PIECES = (
    "<image>", "<EOC>", "<BOS>", "<PAD>", "</s>", "<|endofchunk|>", "<fake_token_around_image>", "<end_of_utterance>", "<unused_7>",
    "Output:", "Question: {question} Answer:", "{image}", "{answer}", "{0}", "\\1", "\n", "\r", "\t", " ", "  ",
    "\0", "\ufeff", "\ud800", "\udfff",
    "\u2028", "\U0001f600", "e\u0301", "\u202e", "\uffff", "<ima", "ge>", "x" * 40, "\x7f", "ÿ", "a red square",
)  # fmt: skip
"""Tags, halves of them, what forms are filled by, and characters that are none."""


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with flamingo_export.load(bundle, threads=1) as model:
        yield model


def text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.choice((0, 1, 2, 3, 6))))


TEMPLATE_PIECES = (
    "{{", "}}", "{%", "%}", "{%-", "-%}", "{#", "#}", "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% endif %}",
    "{% set x = messages %}", "{% set ns = namespace(a=1) %}", "{% set ns.a = ns.a ~ ns.a %}", "{{ m['content'] | trim }}", "{{ m.role }}",
    "{{ x | tojson }}", "{{ x | join(x) }}", "{{ range(99999) | list }}", "{{ x * 99 }}", "{{ raise_exception(x) }}", "{{ strftime_now(x) }}",
    "{% macro f(x) %}", "{{ f(f) }}", "{% endmacro %}", "{% raw %}", "{{ self }}", "{{ loop }}", "{{ x.__class__ }}", "|", "~", "(", ")",
    "{{ x[0:9:2] }}", "{{ [x, x] }}", "{{ {x: x} }}", "{% include 'x' %}", "{% block b %}", "{% endblock %}", "{{ 1 // 0 }}", "{{ -x }}",
    "{{ x < ns }}", "{{ x in x }}", "{{ not x is defined }}", "{% break %}", "{{ 9 ** 9 ** 9 }}", "{{ x | sort(attribute='role') }}",
)  # fmt: skip


def test_chat_templates() -> None:
    """Templates of pieces, and a whole one with letters changed, about strange messages: a text or an error of ours, within a second."""

    def case(rng: random.Random) -> None:
        source = "".join(rng.choice(TEMPLATE_PIECES) for _ in range(rng.randrange(1, 8)))
        if rng.random() < 0.5:
            letters = list(TEMPLATE)
            for _ in range(rng.randrange(1, 6)):
                letters[rng.randrange(len(letters))] = rng.choice("{}%-|~.'\"[]()= \n0a_")
            source = "".join(letters)
        messages: Any = [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": [{"type": "image"}]}]
        if rng.random() < 0.3:
            messages = [rng.choice(STRANGE), *messages]
        found = ChatTemplate(source).render(
            messages, special={"bos_token": "a", "eos_token": "b"}, seconds=1, characters=100_000
        )
        assert isinstance(found, str)

    fuzz("chat template", 300, case)


def test_prompts(model: Model) -> None:
    """As text, as token ids, as other things, with as many images as tags more often than not."""

    def case(rng: random.Random) -> None:
        kind = rng.random()
        prompt: Any = text(rng)
        if kind < 0.2:
            prompt = [rng.choice((1, 3, 5, 100, 261, *STRANGE[:20])) for _ in range(rng.randrange(6))]
        elif kind < 0.3:
            prompt = rng.choice(STRANGE)
        count = prompt.count("<image>") if isinstance(prompt, str) and rng.random() < 0.8 else rng.randrange(3)
        given = Request(prompt=prompt, media=[PICTURE] * count) if rng.random() < 0.5 else prompt
        images = [] if isinstance(given, Request) else [PICTURE] * count
        model.generate(given, images=images, max_new_tokens=2, beams=1)

    fuzz("prompt", 150, case)


def test_candidates(model: Model) -> None:
    def case(rng: random.Random) -> None:
        candidates: Any = [rng.choice((text(rng), [5, 6], [rng.choice(STRANGE)])) for _ in range(rng.randrange(4))]
        if rng.random() < 0.1:
            candidates = rng.choice(STRANGE)
        model.score(text(rng).replace("<image>", ""), candidates)

    fuzz("candidates", 60, case)


def test_settings(model: Model) -> None:
    names = ("beams", "max_new_tokens", "length_penalty", "num_return", "temperature", "top_k", "top_p", "seed", "other")
    sensible = (0, 1, 2, 3, 0.5, 1.0)

    def case(rng: random.Random) -> None:
        chosen = rng.sample(names, rng.choice((1, 1, 2, 3)))
        settings = {name: rng.choice(sensible if rng.random() < 0.7 else STRANGE) for name in chosen}
        model.generate("Output:", **{"max_new_tokens": 2, **settings})

    fuzz("settings", 150, case)


@pytest.mark.parametrize(
    "form", [PAPER, OPENFLAMINGO, IDEFICS, IDEFICS_INSTRUCT], ids=["paper", "openflamingo", "idefics", "instruct"]
)
def test_forms_filled_with_text(form: Any) -> None:
    """Whatever text is asked: as many tags as media."""

    def case(rng: random.Random) -> None:
        medium = rng.choice((None, PICTURE))
        shots = [
            Shot(question=text(rng), answer=text(rng), medium=rng.choice((None, PICTURE))) for _ in range(rng.randrange(3))
        ]
        if rng.random() < 0.5:
            request = qa_prompt(shots, text(rng), medium, form)
        else:
            request = caption_prompt([Shot(answer=shot.answer, medium=shot.medium) for shot in shots], medium, form)
        assert isinstance(request.prompt, str)
        assert request.prompt.count(form.tags.image) == len(request.media)

    fuzz(f"forms {form.tags.image} {form.prompts.caption}", 150, case)


LINES = (
    {"image": "a.png", "caption": "a red square"},
    {"video": "a.png", "caption": "a ball moves left"},
    {"image": "a.png", "question": "What?", "answer": "red"},
    {"caption": "a blue circle"},
)


def jsonl(rng: random.Random, lines: tuple[dict[str, Any], ...]) -> bytes:
    """One to three lines; one of them is changed, or bytes anywhere."""
    chosen: list[Any] = [rng.choice(lines) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.7:
        number = rng.randrange(len(chosen))
        chosen[number] = mutated_json(chosen[number], rng)
        return "\n".join(json.dumps(line) for line in chosen).encode()
    return mutated("\n".join(json.dumps(line) for line in chosen).encode(), rng)


def test_shots_files(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")

    def case(rng: random.Random) -> None:
        (tmp_path / "shots.jsonl").write_bytes(jsonl(rng, LINES))
        shots = read_shots(tmp_path / "shots.jsonl")
        assert shots
        for form in (PAPER, IDEFICS):
            asked = shots[0].question is not None
            request = qa_prompt(shots, "What?", PICTURE, form) if asked else caption_prompt(shots, PICTURE, form)
            assert len(request.media) == 1 + sum(shot.medium is not None for shot in shots)

    fuzz("shots", 300, case)


def test_calibration_data(tmp_path: Path) -> None:
    lines = (
        {"prompt": "<image>Output: two dogs", "images": ["a.png"]},
        {"text": "two dogs", "images": ["a.png", "a.png"]},
        {"text": "two dogs", "videos": ["a.png"]},
    )

    def case(rng: random.Random) -> None:
        (tmp_path / "calib.jsonl").write_bytes(jsonl(rng, lines))
        for sample in read_samples(tmp_path / "calib.jsonl"):
            assert isinstance(sample, BadSample) or isinstance(sample.prompt, str)

    fuzz("calibration data", 200, case)
