"""Every page in a browser, at three widths, light and dark: it fits the window, can be read, and no picture is without words."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import LOOK, browser, needs_chromium, window
from PIL import Image

from flamingo_export.evaluation import evaluation_page
from flamingo_export.evaluation.results import ALL, Cell, Cost, Results
from flamingo_export.evaluation.settings import Settings
from flamingo_export.pages import template
from flamingo_export.precision import Precision
from flamingo_export.quantize.policies import preset
from flamingo_export.sensitivity.findings import LayerError, MatrixError, Sensitivity
from flamingo_export.sensitivity.sensitivity_page import render_html as sensitivity_html
from flamingo_export.sensitivity.suggest import suggest
from flamingo_export.serve.app import page as ask_page
from flamingo_export.serve.openapi import page as api_page
from flamingo_export.validate.expected.cases import PHI_CASES
from flamingo_export.validate.report.parity_page import render_html as parity_html
from flamingo_export.validate.report.parity_report import LayerPoint, ParityReport, Row, Strip, TokenStep, Trace
from flamingo_reference.config import NANO

pytestmark = [pytest.mark.slow, needs_chromium]
ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (375, 768, 1280)
LONG = "decoder/layer.17/cross_attention/a_name_without_any_space_that_is_longer_than_a_telephone_is_wide"


def demo(folder: Path) -> str:
    """The demo's page of answers, one of them wrong, one to a clip."""
    spec = importlib.util.spec_from_file_location("demo_for_pages", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    (folder / "clip").mkdir()
    for path in (folder / "one.png", *(folder / "clip" / f"{index}.png" for index in range(6))):
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(path)
    (folder / "truth.jsonl").write_text(
        json.dumps({"image": "one.png", "question": f"What is {LONG}?", "answer": LONG})
        + "\n"
        + json.dumps({"video": "clip", "question": "What?", "answer": "a cross"})
    )
    one, two = module.flamingo_export.read_shots(folder / "truth.jsonl")
    answers = [module.Answer(truth=one, said=LONG, logprob=-0.1), module.Answer(truth=two, said="a circle", logprob=-3.25)]
    return module.render_html([module.Task(title="Questions", shots=[one], answers=answers, seconds=1.0)], parity())


def parity() -> ParityReport:
    """A report of two layers with everything in it: what passed, failed, was not measured, tied and differed."""
    cases = list(PHI_CASES)
    row = partial(Row, level="phi", subgraph="decoder", tensor="logits", limit=1e-6, torch_error=4e-7)
    rows = [row(case=case, error=3e-7, passed=True) for case in cases]
    rows.append(row(case=LONG, error=0.5, passed=False, note=f"worst at {LONG}"))
    rows.append(row(case="b", error=None, passed=False, note="not a number"))
    rows.append(row(case="c", error=None, passed=False, measured=False, note="out of memory"))
    layer = partial(LayerPoint, carried=2e-7, torch_alone=1e-7, torch_carried=1e-7, limit=4e-7)
    layers = [layer(layer=index, alone=[1e-7, 9e-5][index], passed=index == 0) for index in range(2)]
    png = _png()
    steps = [TokenStep(reference=1, engine=1, gap=0.1, reference_label=LONG, engine_label=LONG)]
    steps.append(TokenStep(reference=2, engine=3, gap=0.1, reference_label=" a", engine_label=" b"))
    trace = partial(
        Trace,
        case="caption",
        prompt=f"<image>{LONG}",
        steps=tuple(steps),
        media=(png,) * 12,
        engine_text=LONG,
        reference_text="a",
    )
    return ParityReport(
        verdict="failed",
        backend="onnxruntime",
        against="reference",
        model="nano",
        storage="fp32",
        weights="0" * 64,
        rows=tuple(rows),
        layers=tuple(layers),
        first_diverging_layer=LONG,
        traces=(
            trace(search="greedy", num_beams=1, outcome="tie"),
            trace(search="beam", num_beams=3, outcome="different"),
        ),
        strips={case: (Strip(tokens=(0, 0, -3, 3, 3, -40, 40, *range(1, 33)), prompt=20),) for case in cases},
        environment={"processor": LONG},
    )


def sensitivity() -> str:
    """Matrices of which one stands out."""
    names = ["decoder/layer.0/self_attention/qkv_proj", "decoder/layer.0/ffw_up", "decoder/layer.1/ffw_up", LONG]
    matrices = [
        MatrixError(
            name=name,
            layer=name.rsplit("/", 1)[0],
            kind="matrix",
            element="fp8",
            error=error,
            keep="storage",
            extra_bytes=90_000,
        )
        for name, error in zip(names, (0.3, 0.02, 0.018, 0.01), strict=True)
    ]
    layers = [LayerError(name=each.layer, error=each.error, share=0.5, kl=each.error / 10) for each in matrices]
    found = Sensitivity(
        config=NANO,
        precision=Precision(storage="fp32", policy=preset("fp8")),
        samples=3,
        tokens=40,
        images=4,
        matrices=tuple(matrices),
        layers=tuple(layers),
        kl=0.02,
    )
    suggestion = suggest(found)
    assert suggestion is not None
    return sensitivity_html(found, suggestion)


def evaluation() -> str:
    """A run beside another one, with items that were best and worst."""
    cell = partial(
        Cell, group=ALL, items=100, against=50.0, difference=3.0, difference_low=-1.0, difference_high=7.0, changed=12
    )
    cells = [
        cell(shots=shots, value=50.0 + shots, low=47.0 + shots, high=54.0 + shots, details={"R@5": 80.0})
        for shots in (0, 4, 32)
    ]
    results = Results(
        task="t",
        title=f"A task: {LONG}",
        metric="accuracy",
        unit="%",
        mode="open",
        split="validation",
        paper_split="test-dev",
        settings=Settings(shots=(0, 4, 32)),
        model={"name": LONG, "digest": "0" * 64},
        against={"name": "other.bundle"},
        version="0.1.0",
        data="0" * 64,
        features="",
        left_out={LONG: 3},
        cells=tuple(cells),
        costs=tuple(Cost(shots=each.shots, seconds=0.1, tokens=3.0) for each in cells),
    )
    shown = evaluation_page.Shown(
        id=LONG,
        score=1.0,
        picture=_png(),
        question="What?",
        text=LONG,
        references=(LONG,),
        examples=((_png(), LONG),) * 4,
        more_examples=4,
        other="b",
    )
    return evaluation_page.page_of(results, shots=32, best=[shown], worst=[shown], changed=[shown], num_changed=3)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 160, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "demo": demo(folder),
        "parity": parity_html(parity()),
        "sensitivity": sensitivity(),
        "evaluation": evaluation(),
        "ask": ask_page(),
        "api": api_page(),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["demo", "parity", "sensitivity", "evaluation", "ask", "api"])
def test_a_page_can_be_read(chromium: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    window(chromium, width, scheme)
    chromium.get(pages[name].as_uri())
    seen = chromium.execute_script(LOOK)
    assert seen["width"] <= width, seen["wide"]
    assert seen["wide"] == []
    assert seen["small"] == []
    assert seen["pale"] == []
    assert seen["silent"] == []


@pytest.mark.parametrize("name", ["demo", "parity", "sensitivity", "evaluation", "ask", "api"])
def test_dark_is_dark_and_light_is_light(chromium: Any, pages: dict[str, Path], name: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        window(chromium, 768, scheme)
        chromium.get(pages[name].as_uri())
        text = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(int(part) for part in text.strip("rgb()").split(",")) / 3)
    assert grounds[0] > 200
    assert grounds[1] < 60


def test_the_look_sees_what_is_wrong(chromium: Any, tmp_path: Path) -> None:
    """The check itself: a page with each fault, and each is found."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body style='background:#fff'><p style='font-size:10px'>small</p><p style='color:#bbb'>pale</p>"
        "<img src='data:,'><svg><circle r='3'/></svg><svg viewBox='0 0 1000 100' width='300' aria-hidden='true'>"
        "<text y='20' font-size='14'>shrunk</text></svg><div style='width:900px'>wide</div></body>"
    )
    window(chromium, 375, "light")
    chromium.get(page.as_uri())
    seen = chromium.execute_script(LOOK)
    assert [text for text, _ in seen["small"]] == ["small", "shrunk"]
    assert [text for text, _ in seen["pale"]] == ["pale"]
    assert len(seen["silent"]) == 2
    assert seen["width"] > 375
    assert seen["wide"]


def test_a_template_finds_the_style_and_closes_what_users_wrote(tmp_path: Path) -> None:
    (tmp_path / "t.html.j2").write_text('{% extends "base.html.j2" %}{% block main %}{{ text }}{% endblock %}')
    text = template.render(tmp_path, "t.html.j2", text="<b>")
    assert "--ink:" in text
    assert "&lt;b&gt;" in text
