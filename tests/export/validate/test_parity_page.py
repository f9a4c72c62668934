"""The report page: self-contained, complete, honest about failures. In a browser: tests/pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from flamingo_export.validate import ParityReport
from flamingo_export.validate.expected.cases import PHI_CASES
from flamingo_export.validate.report.parity_page import render_html
from flamingo_export.validate.report.parity_report import NotRun

SECTIONS = {"verdict", "gates", "layers", "phi", "traces", "all-gates", "environment"}
VOID = {"meta", "img", "br", "link", "input", "hr", "path", "use", "line", "rect"}


class Page(HTMLParser):
    """Collects ids, text and addresses, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and value]


@pytest.fixture(scope="module")
def report(checked: tuple[Path, ParityReport]) -> ParityReport:
    return checked[1]


@pytest.fixture(scope="module")
def text(report: ParityReport) -> str:
    return render_html(report)


def test_page_has_every_section_once_and_is_well_formed(text: str) -> None:
    page = Page(text)
    assert set(page.ids) >= SECTIONS
    assert all(page.ids.count(section) == 1 for section in SECTIONS)
    assert text.count('<div class="plot">') == 2
    assert "failures" not in page.ids


def test_nothing_is_fetched_and_nothing_runs(text: str) -> None:
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses), page.addresses
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in text
    assert "url(http" not in text


def test_page_names_every_case_and_gate(text: str, report: ParityReport) -> None:
    shown = Page(text).text
    for name in PHI_CASES:
        assert name in shown
    for row in report.rows:
        assert row.case in shown
        assert row.error is None or f"{row.error:.2e}" in shown
    assert f"{len(report.rows)} of {len(report.rows)}" in shown
    assert text.count("<img") == sum(len(trace.media) for trace in report.traces)


def test_a_failure_is_at_the_top_and_differences_are_marked(report: ParityReport) -> None:
    row = next(row for row in report.rows if row.case == "adjacent images")
    broken = msgspec.structs.replace(row, passed=False, error=0.5, note="worst at <here>")
    trace = report.traces[0]
    step = msgspec.structs.replace(trace.steps[0], engine=9, engine_label="<nine>")
    different = msgspec.structs.replace(trace, outcome="different", steps=(step, *trace.steps[1:]))
    changed = msgspec.structs.replace(
        report,
        verdict="failed",
        rows=tuple(broken if each is row else each for each in report.rows),
        traces=(different, *report.traces[1:]),
        first_diverging_layer="decoder/layer.1",
        not_run=(NotRun(name="something", reason="for want of memory"),),
    )
    text = render_html(changed)
    page = Page(text)
    assert page.ids.index("failures") < page.ids.index("gates")
    assert "not-run" in page.ids
    assert "Failed" in page.text
    assert "decoder/layer.1" in page.text
    assert "worst at <here>" in page.text  # escaped in the source, shown as it is
    assert "<here>" not in text
    assert page.tags.count("del") == 1
    assert "<nine>" in page.text


def test_a_report_without_anything_still_makes_a_page() -> None:
    empty = ParityReport(verdict="not_run", backend="onnxruntime", against=None, model="m", storage="fp32", weights="no torch")
    page = Page(render_html(empty))
    assert "Not run" in page.text
    assert "svg" not in page.tags
