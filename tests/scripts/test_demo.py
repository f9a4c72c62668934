"""The demo on stand-ins: random weights, made-up examples; what it says and shows follows from what was generated."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flamingo_export.sources.choice import source_for_size
from flamingo_export.validate.report.parity_report import ParityReport, Row

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "source_for_size", lambda size: source_for_size(size, seed=3))
    return module


@pytest.fixture
def examples(tmp_path):
    folder = tmp_path / "examples"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "truth_captions.jsonl").write_text(json.dumps({"image": "two.png", "caption": "<b>noise</b>"}))
    (folder / "shots_captions.jsonl").write_text(json.dumps({"image": "one.png", "caption": "grain"}))
    (folder / "truth_questions.jsonl").write_text(json.dumps({"image": "one.png", "question": "What?", "answer": "noise"}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("verdict", "code"), [("passed", 0), ("failed", 1)])
def test_transcript_page_and_verdict(demo, examples, tmp_path, monkeypatch, capsys, verdict, code):
    row = Row(level="phi", case="c", subgraph="decoder", tensor="logits", error=1.0, limit=1e-6, passed=verdict == "passed")
    report = ParityReport(
        verdict=verdict, backend="onnxruntime", against="golden", model="nano", storage="fp32", weights="0", rows=(row,)
    )
    monkeypatch.setattr(demo, "check_bundle", lambda bundle: report)
    out = tmp_path / "a report"
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(out), "--examples", str(examples)])
    assert demo.main() == code
    text = capsys.readouterr().out
    assert "after 1 shots" in text
    assert "0 of 1 right" in text
    assert text.rstrip().splitlines()[-1].startswith(f"parity {verdict}")
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "expected: &lt;b&gt;noise&lt;/b&gt;" in page
    assert re.findall(r'(?:src|href)="(?!data:|parity.html)', page) == []
    assert (out / "parity.html").read_text().startswith("<!doctype html>")


def test_the_shipped_examples_can_be_read(demo):
    for path in (ROOT / "examples").glob("*.jsonl"):
        for shot in demo.flamingo_export.read_shots(path):
            assert demo.data_uris(demo.medium_path(shot))
