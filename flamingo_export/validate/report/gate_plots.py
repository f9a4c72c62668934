"""The parity report's plots: each gate's error beside its limit, and errors layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flamingo_export.pages import plots
from flamingo_export.pages.plots import Curve, Mark, axis_of
from flamingo_export.validate.report.parity_report import LayerPoint, Row

_LEGEND = (
    ("engine", Mark(None, "dot", "good")),
    ("engine, failed", Mark(None, "cross", "bad")),
    ("PyTorch, same dtype", Mark(None, "ring", "faint")),
    ("limit (shaded: within it)", Mark(None, "tick", "ink")),
)


def gates_plot(rows: Sequence[Row]) -> str:
    """Error of each gate beside its limit and PyTorch's own error, on a logarithmic axis; failures without a number at the right edge."""
    values = [value for row in rows for value in (row.error, row.limit, row.torch_error) if value]
    return plots.rows_plot(
        [_gate(row) for row in rows],
        axis_of(values, log=True),
        caption="largest difference from the fp64 reference, over the reference's rms (logarithmic)",
        legend=_LEGEND,
    )


def layers_plot(points: Sequence[LayerPoint]) -> str:
    """Error after each layer: fed with the reference's hidden states, and with the engine's own."""

    def values(name: str) -> list[float]:
        return [math.nan if getattr(point, name) is None else float(getattr(point, name)) for point in points]

    curves = [
        Curve(name="limit, single layer", values=values("limit"), tone="ink", shape="none", dash="5 4"),
        Curve(name="PyTorch, carried", values=values("torch_carried"), tone="faint", shape="ring", dash="2 3"),
        Curve(name="engine, carried", values=values("carried"), tone="other", shape="diamond"),
        Curve(name="engine, single layer", values=values("alone"), tone="good", shape="dot"),
    ]
    known = [value for curve in curves for value in curve.values]
    wrong = [index for index, point in enumerate(points) if not point.passed]
    numbers = ", ".join(str(points[index].layer) for index in wrong)
    return plots.curves_plot(
        [str(point.layer) for point in points],
        curves,
        axis_of(known, log=any(value > 0 for value in known)),
        across="LM layer, with the gated cross-attention block before it",
        up="error / rms",
        says=f"Errors after each of {len(points)} layers; {f'failed: {numbers}' if wrong else 'all within their limits'}",
        failed=wrong,
    )


def _gate(row: Row) -> plots.Row:
    marks = []
    if row.torch_error:
        marks.append(Mark(row.torch_error, "ring", "faint"))
    if row.limit:
        marks.append(Mark(row.limit, "tick", "ink"))
    if row.measured:
        marks.append(Mark(row.error, "dot" if row.passed else "cross", "good" if row.passed else "bad"))
    numbers = [f"{name} {value:.1e}" for name, value in (("error", row.error), ("limit", row.limit)) if value is not None]
    name = _label(row)
    failed = row.measured and not row.passed
    return plots.Row(
        name=name, says=", ".join([name, row.outcome, *numbers]), marks=marks, within=row.limit or None, failed=failed
    )


def _label(row: Row) -> str:
    subgraph = row.subgraph if row.case.startswith(row.subgraph) else ""
    case = row.case.removeprefix(f"{row.subgraph}, ")
    tensor = "" if row.tensor == "logits" else row.tensor
    return " · ".join(part for part in (subgraph, case, tensor) if part)
