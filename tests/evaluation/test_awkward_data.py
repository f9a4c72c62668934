"""Answers in any script, and media that are half there, from the file to the report."""

from __future__ import annotations

import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flamingo_export
from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.metrics.base import Outcome
from flamingo_export.evaluation.metrics.text import Exact, Top1
from flamingo_export.evaluation.protocol import Answer
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.task import Item

ANSWERS = ["naïve café", "東京タワー", "שלום, עולם", "🙂‍↔️ <b>&", 'with "quotes", commas\u2028and separators', "Straße"]


class Saying:
    """Says the answers one after the other, by the number in the question, accents as letters of their own."""

    identity = {"name": "saying", "digest": "digest of saying", "precision": "none", "backend": "none", "parity": "none"}  # noqa: RUF012

    def __init__(self) -> None:
        from flamingo_reference.input_format import PAPER

        self.inputs = PAPER

    def check(self, requests: Any, *, beams: int, max_new_tokens: int) -> None:
        pass

    def generate(self, requests: Any, *, beams: int, max_new_tokens: int) -> list[Answer]:
        found = []
        for request in requests:
            number = int(str(request.prompt).rsplit("picture ", 1)[1].split("?")[0])
            text = unicodedata.normalize("NFD", ANSWERS[number])
            found.append(Answer(text=text, token_ids=(5, 6), token_logprobs=(-0.5, -0.25), finished=True))
        return found

    def score(self, requests: Any, candidates: Any) -> list[list[float]]:
        return [[0.0 for _ in each] for each in candidates]


def task(folder: Path) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "mine.toml").write_text('metric = "exact"\nsupport = "mine.jsonl"\n', encoding="utf-8")
    lines = []
    for number, answer in enumerate(ANSWERS):
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(folder / f"bild-{number}-ü.png")
        lines.append(
            {"id": f"ü{number}", "image": f"bild-{number}-ü.png", "question": f"What is picture {number}?", "answer": answer}
        )
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return folder / "mine.toml", folder / "mine.jsonl"


def test_answers_in_any_script_go_through_a_whole_run(tmp_path: Path) -> None:
    toml, data = task(tmp_path / "data")
    out = tmp_path / "out"
    settings = Settings(shots=(0, 2), unit=2)
    found = flamingo_export.evaluate(Saying(), toml, data=data, settings=settings, out=out)
    assert [cell.value for cell in found.cells if cell.group == "all"] == [100, 100]
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_bytes().split(b"\n") if line][1:]
    assert {unicodedata.normalize("NFC", line["text"]) for line in predictions} == set(ANSWERS)
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>&" not in page
    again = flamingo_export.evaluate(Saying(), toml, data=data, settings=settings, out=out)
    assert again.cells == found.cells


@pytest.mark.parametrize("metric", [Exact(), Top1()], ids=["exact", "top1"])
def test_accents_in_two_forms_are_one_letter(metric: Any) -> None:
    item = Item(id="1", medium=None, answer="café", references=("café",))
    said = [Outcome(text=text, logprobs=()) for text in ("cafe\u0301", " café ", "cafe")]
    assert metric.score([item] * 3, said).items.tolist() == [100, 100, 0]


def test_an_empty_file_is_gone_and_counted(tmp_path: Path) -> None:
    toml, data = task(tmp_path / "data")
    (tmp_path / "data" / "bild-3-ü.png").write_bytes(b"")
    settings = Settings(shots=(0,))
    with pytest.raises(
        EvaluationError, match=r"the media of 1 of 6 items are not there, or are empty files:\n  .*bild-3-ü\.png"
    ):
        flamingo_export.evaluate(Saying(), toml, data=data, settings=settings)
    out = tmp_path / "out"
    found = flamingo_export.evaluate(Saying(), toml, data=data, settings=settings, out=out, skip_missing=True)
    assert found.left_out == {"queries whose media are gone": 1}
    assert "queries whose media are gone" in (out / "report.html").read_text(encoding="utf-8")
