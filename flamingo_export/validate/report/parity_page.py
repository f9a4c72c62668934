"""The parity report as one self-contained page: styles, plots and pictures inside, nothing fetched, no scripts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flamingo_export.files import write_atomically
from flamingo_export.pages.template import render
from flamingo_export.validate.expected.cases import END_TO_END_CASE, LAYERS_CASE, PHI_CASES, RESET_CASE, TREE_CASE
from flamingo_export.validate.report.gate_plots import gates_plot, layers_plot
from flamingo_export.validate.report.parity_report import ParityReport, Row, Strip, Trace
from flamingo_export.validate.tolerances import INDEPENDENT_ROUNDING, RULE

LEVELS = {
    "weights": "Codes and scales",
    "subgraph": "Subgraphs",
    "layer": "Layers",
    "phi": "Hard cases of phi",
    "end_to_end": "End to end",
    "trace": "Token traces",
    "task": "Captions and answers",
}
# One colour per bank row, far apart in hue; rows beyond begin anew.
HUES = (24, 205, 145, 280, 340, 50, 175, 245)


def write_html(path: Path, report: ParityReport) -> None:
    """Writes the page, as a whole or not at all. Raises OSError if it cannot be written."""
    write_atomically(path, render_html(report).encode())


def render_html(report: ParityReport) -> str:
    """The page."""
    from markupsafe import Markup

    shown = [*PHI_CASES, *((RESET_CASE,) if RESET_CASE in report.strips else ()), END_TO_END_CASE]
    plotted = [row for row in report.rows if row.level not in ("weights", "layer", "trace", "task")]
    return render(
        __package__,
        "parity.html.j2",
        {"number": _number, "share": _share},
        report=report,
        gates_plot=Markup(gates_plot(plotted)) if plotted else "",
        layers_plot=Markup(layers_plot(report.layers)) if report.layers else "",
        phi=[(name, _row_of(report.rows, name), _strips(report, name)) for name in shown],
        tree_case=TREE_CASE,
        layers_case=LAYERS_CASE,
        traces=[(trace, _row_of(report.rows, _trace_case(trace))) for trace in report.traces],
        levels=[(title, [row for row in report.rows if row.level == level]) for level, title in LEVELS.items()],
        passed=sum(row.passed for row in report.rows),
        equal=sum(trace.outcome == "equal" for trace in report.traces),
        ties=sum(trace.outcome == "tie" for trace in report.traces),
        rule=RULE,
        exception=INDEPENDENT_ROUNDING,
    )


def _trace_case(trace: Trace) -> str:
    return f"{trace.case}, {'greedy' if trace.num_beams == 1 else f'beam {trace.num_beams}'}"


def _row_of(rows: Iterable[Row], case: str) -> Row | None:
    """The gate of a case's last output: logits, or the trace."""
    found = [row for row in rows if row.case == case and row.level != "layer"]
    wrong = [row for row in found if not row.passed]
    chosen = wrong or found
    return chosen[-1] if chosen else None


def _strips(report: ParityReport, name: str) -> list[list[dict[str, Any]]]:
    return [_cells(strip) for strip in report.strips.get(name, ())]


def _cells(strip: Strip) -> list[dict[str, Any]]:
    return [
        {
            "image": value < 0,
            "hue": HUES[(abs(value) - 1) % len(HUES)] if value else None,
            "label": _letter(value),
            "decoded": index >= strip.prompt,
        }
        for index, value in enumerate(strip.tokens)
    ]


def _letter(value: int) -> str:
    """A capital at an image, the same letter in small where text sees it, a point where it sees none."""
    capital = chr(ord("A") + (abs(value) - 1) % 26)
    return "·" if value == 0 else capital if value < 0 else capital.lower()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _share(row: Row) -> float | None:
    """Error as a share of the limit, in percent."""
    if row.error is None or not row.limit:
        return None
    return 100.0 * row.error / row.limit
