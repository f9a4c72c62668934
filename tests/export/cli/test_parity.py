"""parity: exit code and text follow the report."""

from __future__ import annotations

import errno
import json
import os

import pytest

import flamingo_export.validate
from flamingo_export.validate.report.parity_report import NotRun, ParityReport, Row, Verdict


def report_of(verdict: Verdict, *, passed: bool) -> ParityReport:
    rows = tuple(
        Row(level="subgraph", case=case, subgraph="media_kv", tensor="media_k.0", error=error, limit=4e-6, passed=error < 4e-6)
        for case, error in (("two media", 1e-6), ("another", 1e-6 if passed else 9e-2))
    )
    left_out = (NotRun(name="token traces", reason="no memory"),)
    return ParityReport(
        verdict=verdict, backend="onnxruntime", against="golden", model="nano", storage="fp32", weights="0" * 64, rows=rows, not_run=left_out
    )  # fmt: skip


@pytest.fixture
def answer(monkeypatch):
    def give(report):
        calls = []

        def check_bundle(bundle, **options):
            calls.append((bundle, options))
            return report

        monkeypatch.setattr(flamingo_export.validate, "check_bundle", check_bundle)
        return calls

    return give


def test_passed(cli, answer):
    calls = answer(report_of("passed", passed=True))
    outcome = cli("parity", "x.bundle", "--backend", "onnxruntime")
    assert outcome.code == 0
    assert str(calls[0][0]) == "x.bundle"
    assert calls[0][1]["backend"] == "onnxruntime"
    assert "2 of 2" in outcome.out
    assert "25 %" in outcome.out
    assert "not run: token traces: no memory" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("parity passed on onnxruntime against golden")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_failed_exits_with_1(cli, answer, form):
    answer(report_of("failed", passed=False))
    outcome = cli("parity", "x.bundle", *form)
    assert outcome.code == 1
    if form:
        assert json.loads(outcome.out)["verdict"] == "failed"
    else:
        assert "1 of 2" in outcome.out
        assert "failed: subgraph another" in outcome.out


def test_not_run_is_no_success(cli, answer):
    answer(report_of("not_run", passed=True))
    assert cli("parity", "x.bundle").code == 1


def test_a_page_that_cannot_be_written_is_said_before_the_work_or_after_the_verdict(cli, answer, tmp_path, monkeypatch):
    monkeypatch.setattr(flamingo_export.validate, "check_bundle", lambda *_, **__: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "page.html"):
        outcome = cli("parity", "x.bundle", "--html", place)
        assert outcome.code == 2
        assert "Invalid value for --html" in outcome.err

    def full(path, report):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    answer(report_of("passed", passed=True))
    monkeypatch.setattr("flamingo_export.validate.report.parity_page.write_html", full)
    outcome = cli("parity", "x.bundle", "--html", tmp_path / "page.html")
    assert outcome.code == 1
    assert "parity passed" in outcome.out
    assert "report:" not in outcome.out
    assert "No space left on device" in outcome.err
