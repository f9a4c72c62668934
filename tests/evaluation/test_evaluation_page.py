"""The page of a run: the curve, the paper's figures, the best and the worst items, and where another model answers otherwise."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import published
import pytest
from made_models import Echo

import flamingo_export
from flamingo_export.evaluation.protocol import Answer
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.tasks import CLASSIFICATION, PAPER


def page(data: Path, out: Path, model: Any, task: str, **given: Any) -> str:
    flamingo_export.evaluate(model, task, data=data, out=out, **given)
    return (out / "report.html").read_text(encoding="utf-8")


def part(text: str, name: str) -> str:
    """A section as text, tags left out."""
    (found,) = re.findall(rf'<section id="{name}">(.*?)</section>', text, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", found)))


class Half(Echo):
    """Wrong about the things of even numbers."""

    def generate(self, requests: Any, *, beams: int, max_new_tokens: int) -> list[Answer]:
        texts = ["green" if str(request.prompt).rsplit("thing ", 1)[1][0] in "02" else "red" for request in requests]
        return [Answer(text=text, token_ids=(1, 2), token_logprobs=(-0.5, -0.25), finished=True) for text in texts]


def test_what_a_page_shows(tmp_path: Path) -> None:
    data = published.write("vqav2", tmp_path)
    text = page(data, tmp_path / "out", Half(), "vqav2", settings=Settings(shots=(0, 2)), against=Echo("original"))
    scores = part(text, "scores")
    assert "<svg" in text
    assert "50.00" in scores
    assert "original" in scores
    assert "Seconds an item Tokens an item" in scores
    assert " 2.0 " in scores  # tokens of each answer
    best, worst, changed = (part(text, name) for name in ("best", "worst", "changed"))
    assert best.count("expected: red") == 2
    assert best.count("green") == 0
    assert worst.count("green") == 2
    assert "2 answers with 2 shots" in changed
    assert changed.count("green original: red") == 2
    assert "0:" not in changed
    for name in ("best", "worst", "changed"):
        (section,) = re.findall(rf'<section id="{name}">(.*?)</section>', text, flags=re.DOTALL)
        # The item's own picture and its two examples', with what they say.
        assert section.count('class="asked"') == 2
        assert section.count('alt="example: What colour is thing') == 4
    run = part(text, "run")
    for said in ("digest of echo", "digest of original", "precision", flamingo_export.__version__, "seed 0"):
        assert said in run
    assert "53.2 56.3 63.1" in part(text, "paper")


def test_conflicts_are_shown_and_what_no_source_has_is_empty(tmp_path: Path) -> None:
    data = published.write("textvqa", tmp_path)
    found = part(page(data, tmp_path / "out", Echo(), "textvqa", settings=Settings(shots=(1,))), "paper")
    assert "Figures of Flamingo (arXiv 2204.14198), on val; here: val" in found
    assert "37.9 (elsewhere 36.0)" in found
    assert "4 shots 32 shots" in found  # nothing stands between them


@pytest.mark.parametrize("name", [*PAPER, *CLASSIFICATION])
def test_every_task_has_the_papers_figures(name: str) -> None:
    from flamingo_export.evaluation.paper import FIGURES

    assert re.match(r"\d\d\.\d|\d\d\d\.\d", FIGURES[name].at_32)
