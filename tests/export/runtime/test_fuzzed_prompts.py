"""Mutated prompts, settings and shots files: an answer or an error of ours, nothing else. Seeded, so that a run tells what the last one told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flamingo_export.errors import InputError, PromptError
from flamingo_export.runtime.options import GenerateOptions, options_from
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt, read_shots
from flamingo_export.runtime.request import Prepared, Request, prepare
from flamingo_reference.config import NANO
from flamingo_reference.input_format import IDEFICS, PAPER

from .test_tokenizer import BYTES, PIECES

PICTURE = np.zeros((4, 4, 3), np.uint8)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "<image>",
                "<BOS>",
                "<EOC>",
                "<PAD>",
                "</s>",
                "<|endofchunk|>",
                " ",
                "\n",
                "\u00a0",
                "\ufffd",
                "\x00",
                "🦩",
                "{image}",
            ]
        ),
        st.text(max_size=8),
        st.characters(categories=["Cs"]),
    ),
    max_size=8,
).map("".join)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.slow
@FUZZ
@given(prompt=st.one_of(TEXTS, st.lists(st.integers(-3, 400), max_size=6)), media=st.integers(0, 4))
@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "metaspace"])
def test_prompts(tokenizer: Any, prompt: Any, media: int) -> None:
    try:
        found = prepare(Request(prompt=prompt, media=[PICTURE] * media), NANO, tokenizer)
    except InputError:
        return
    assert isinstance(found, Prepared)
    assert len(found.token_ids) == len(found.phi) == len(found.keys)
    assert found.phi.max() == media == (found.token_ids == NANO.tokens.image).sum()
    again = prepare(Request(prompt=found.token_ids.tolist(), media=[PICTURE] * media), NANO, tokenizer)
    assert again.keys == found.keys


@FUZZ
@given(question=TEXTS, answer=TEXTS, forms=st.sampled_from([PAPER, IDEFICS]))
def test_what_users_write_never_becomes_structure(question: str, answer: str, forms: Any) -> None:
    """Either it is refused, or the prompt has the special tokens of its form and no other."""
    shots = [Shot(question=question, answer=answer, medium=PICTURE)]
    try:
        asked = qa_prompt(shots, question, PICTURE, forms)
        found = prepare(asked, NANO, BYTES, forms=PAPER.prompts)
        captioned = prepare(caption_prompt([Shot(answer=answer, medium=PICTURE)], PICTURE), NANO, BYTES)
    except PromptError:
        return
    tokens = NANO.tokens
    for prepared in (found, captioned):
        special = [token for token in prepared.token_ids.tolist() if token in BYTES.special]
        assert special == [tokens.bos, tokens.image, tokens.eoc, tokens.image]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
)
NAMES = st.sampled_from(
    ["beams", "max_new_tokens", "length_penalty", "num_return", "temperature", "top_k", "top_p", "seed", "num_beams", "n", "x"]
)


@FUZZ
@given(given_settings=st.dictionaries(NAMES, VALUES, max_size=4))
def test_settings(given_settings: Any) -> None:
    try:
        options = options_from(given_settings)
        options.check(NANO)
    except InputError:
        return
    assert isinstance(options, GenerateOptions)
    assert options.width >= options.num_return
    options.search(NANO, 4)


@pytest.mark.slow
def test_shots_files(tmp_path: Path) -> None:
    """Lines of good examples with bytes changed, dropped, doubled and moved."""
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    good = b"\n".join(
        json.dumps(line, ensure_ascii=False).encode()
        for line in (
            {"image": "a.png", "question": "Welche Farbe?", "answer": "grün"},
            {"question": "What?", "answer": "a cat"},
            {"video": "a.png", "question": "🦩?", "answer": "yes"},
        )
    )
    random_ = random.Random(7)
    path, read, refused = tmp_path / "shots.jsonl", 0, 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(random_.choice((1, 1, 3))):
            place = random_.randrange(len(data))
            match random_.randrange(4):
                case 0:
                    data[place] = random_.randrange(32, 200)
                case 1:
                    del data[place : place + random_.randint(1, 3)]
                case 2:
                    data[place:place] = data[place : place + random_.randint(1, 30)]
                case _:
                    data[place:place] = random_.choice(
                        [b"\\ud800", b'"', b"{", b"\n", b"\xff", b"1e999", b"<image>", b"[" * 3000]
                    )
        path.write_bytes(data)
        try:
            shots = read_shots(path)
        except PromptError:
            refused += 1
        else:
            assert shots
            assert all(shot.answer and shot.question for shot in shots)
            read += 1
    assert read > 20
    assert refused > 20
