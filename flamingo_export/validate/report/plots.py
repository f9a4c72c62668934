"""The report's plots, as SVG to be set into the page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from flamingo_export.errors import ParityError, pip_install
from flamingo_export.validate.report.parity_report import LayerPoint, Row

PASSED, FAILED, TORCH, LIMIT, GRID = "#0f766e", "#dc2626", "#94a3b8", "#334155", "#e2e8f0"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#475569",
    "xtick.color": "#475569",
    "ytick.color": "#0f172a",
    "text.color": "#0f172a",
}


def gates_plot(rows: Sequence[Row]) -> str:
    """Error of each gate beside its limit and PyTorch's own error, on a logarithmic axis; failures without a number at the right edge."""
    with _matplotlib() as (figure_of, lines):
        figure, axes = figure_of(9.6, 0.9 + 0.27 * len(rows), "gates")
        values = [value for row in rows for value in (row.error, row.limit, row.torch_error) if value]
        low, high = (min(values) / 2, max(values) * 2) if values else (1e-7, 1.0)
        for place, row in enumerate(rows):
            colour = PASSED if row.passed else FAILED
            if row.limit:
                axes.plot([low, row.limit], [place, place], color="#f1f5f9", linewidth=9, solid_capstyle="butt", zorder=1)
                axes.plot([row.limit], [place], marker="|", markersize=11, markeredgewidth=2, color=LIMIT, zorder=3)
            if row.torch_error:
                axes.plot([row.torch_error], [place], marker="o", markersize=6, markerfacecolor="white", color=TORCH, zorder=2)
            if not row.measured:
                continue
            if row.error is None:
                axes.plot([high], [place], marker="X", markersize=8, color=FAILED, zorder=4, clip_on=False)
            else:
                axes.plot([max(row.error, low)], [place], marker="o", markersize=6, color=colour, zorder=4)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            if row.measured and not row.passed:
                tick.set_color(FAILED)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("largest difference from the fp64 reference, over the reference's rms")
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.legend(
            handles=[
                lines([], [], linestyle="", marker="o", color=PASSED, label="engine"),
                lines([], [], linestyle="", marker="o", markerfacecolor="white", color=TORCH, label="PyTorch, same dtype"),
                lines([], [], linestyle="", marker="|", markersize=11, markeredgewidth=2, color=LIMIT, label="limit"),
            ],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=3,
            frameon=False,
            handletextpad=0.2,
        )
        return _svg(figure)


def layers_plot(points: Sequence[LayerPoint]) -> str:
    """Error after each layer: fed with the reference's hidden states, and with the engine's own."""
    with _matplotlib() as (figure_of, _):
        figure, axes = figure_of(9.6, 3.4, "layers")
        numbers = [point.layer for point in points]

        def series(name: str) -> list[float]:
            return [math.nan if getattr(point, name) is None else getattr(point, name) for point in points]

        axes.plot(numbers, series("limit"), color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)), label="limit, layer alone")
        axes.plot(
            numbers, series("torch_carried"), color=TORCH, linewidth=1.2, marker="o", markersize=3, label="PyTorch, carried"
        )
        axes.plot(numbers, series("carried"), color="#7c3aed", linewidth=1.6, marker="o", markersize=4, label="engine, carried")
        axes.plot(numbers, series("alone"), color=PASSED, linewidth=1.6, marker="o", markersize=4, label="engine, layer alone")
        wrong = [point for point in points if not point.passed]
        if wrong:
            heights = [point.alone if point.alone is not None else math.nan for point in wrong]
            axes.plot(
                [point.layer for point in wrong], heights, linestyle="", marker="o", markersize=9, color=FAILED, label="failed"
            )
            for point in wrong:
                axes.axvspan(point.layer - 0.4, point.layer + 0.4, color="#fee2e2", zorder=0)
        if any(
            value and value > 0 for name in ("alone", "carried", "limit") for value in series(name) if not math.isnan(value)
        ):
            axes.set_yscale("log")
        axes.set_xlabel("LM layer, with the gated cross-attention block before it")
        axes.set_ylabel("error / rms")
        step = max(1, len(numbers) // 20)
        axes.set_xticks(numbers[::step])
        axes.grid(color=GRID, linewidth=0.8)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, frameon=False, handlelength=1.6, columnspacing=1.4)
        return _svg(figure)


def bars_plot(bars: Sequence[tuple[str, float, bool]], label: str, salt: str) -> str:
    """A horizontal bar for each (name, value, whether it stands out), the first on top.

    label: of the axis. salt: another for each plot of a page.
    """
    with _matplotlib() as (figure_of, _):
        figure, axes = figure_of(9.6, 0.7 + 0.25 * len(bars), salt)
        places = range(len(bars))
        axes.barh(
            places, [value for _, value, _ in bars], height=0.62, color=[FAILED if marked else PASSED for *_, marked in bars]
        )
        for place, (_, value, _) in enumerate(bars):
            axes.annotate(f"{value:.3g}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_xlim(0, 1.08 * max((value for _, value, _ in bars), default=0) or 1)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_yticks(places, [name for name, *_ in bars])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        return _svg(figure)


Series = tuple[str, str, Sequence[tuple[float, float, float]]]
"""Name, colour, and (value, low, high) at each place."""


def curves_plot(places: Sequence[str], series: Sequence[Series], *, across: str, up: str, salt: str) -> str:
    """Curves over evenly spaced places with their intervals as bands. across, up: labels of the axes."""
    with _matplotlib() as (figure_of, _):
        figure, axes = figure_of(9.6, 3.4, salt)
        numbers = list(range(len(places)))
        for name, colour, points in series:
            axes.fill_between(
                numbers, [low for _, low, _ in points], [high for *_, high in points], color=colour, alpha=0.15, linewidth=0
            )
            axes.errorbar(
                numbers,
                [value for value, *_ in points],
                yerr=[[value - low for value, low, _ in points], [high - value for value, _, high in points]],
                color=colour,
                linewidth=1.6,
                marker="o",
                markersize=5,
                capsize=3,
                label=name,
            )
        axes.set_xticks(numbers, places)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(color=GRID, linewidth=0.8)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False)
        return _svg(figure)


def _label(row: Row) -> str:
    subgraph = row.subgraph if row.case.startswith(row.subgraph) else ""
    case = row.case.removeprefix(f"{row.subgraph}, ")
    tensor = "" if row.tensor == "logits" else row.tensor
    return " · ".join(part for part in (subgraph, case, tensor) if part)


class _matplotlib:  # noqa: N801  # used as a function
    """Matplotlib with our style, without touching its global state. Raises ParityError with what to install if it is missing."""

    def __enter__(self) -> tuple[Any, Any]:
        try:
            import matplotlib
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
            from matplotlib.lines import Line2D
        except ImportError as error:
            raise ParityError(
                f"the HTML report's plots need matplotlib ({error}). Install it: {pip_install('report')}"
            ) from error

        def figure_of(width: float, height: float, salt: str) -> tuple[Any, Any]:
            # Names inside an SVG are hashed with the salt: two plots of one page must not share them.
            matplotlib.rcParams["svg.hashsalt"] = salt
            figure = Figure(figsize=(width, height), layout="constrained")
            FigureCanvasSVG(figure)
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            return figure, axes

        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()
        return figure_of, Line2D

    def __exit__(self, *details: Any) -> None:
        self._context.__exit__(*details)


def _svg(figure: Any) -> str:
    """The figure's `<svg>` element: no prolog, no doctype, no date, no fixed size."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    kept = [part for part in head.split('" ') if not part.strip().startswith(("width=", "height="))]
    return '" '.join(kept).rstrip('"') + '" role="img">' + rest
