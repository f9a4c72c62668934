"""Plots as inline SVG that keeps its text's size at any width: places across are percentages, heights and letters are pixels.

Colours are the style's classes (`good`, `bad`, `other`, `faint`, `ink`), so that a plot follows light and dark. Each has a shape or a dash of
its own beside it, and a legend says what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Literal

Tone = Literal["good", "bad", "other", "faint", "ink"]
Shape = Literal["dot", "ring", "cross", "tick", "square", "diamond", "none"]
_SHAPES: dict[Shape, str] = {
    "dot": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "ring": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "cross": "M-5-5L5 5M-5 5L5-5",
    "tick": "M0-8V8",
    "square": "M-3.5-3.5h7v7h-7z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "none": "",
}
_LEFT, _RIGHT = 3.0, 97.0
"""Percentages between which data lie."""


@dataclass(frozen=True)
class Mark:
    """A value shown by a shape. None or not a number: at the right edge."""

    value: float | None
    shape: Shape
    tone: Tone


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of `rows_plot`.

    name: its label. says: what it shows, for who does not see it.
    marks: from back to front. within: values up to this one are shaded. bar: a bar from 0 to (value, tone), its value written beside it.
    failed: whether the name stands out.
    """

    name: str
    says: str
    marks: Sequence[Mark] = ()
    within: float | None = None
    bar: tuple[float, Tone] | None = None
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of `curves_plot`: a value at each place, NaN where there is none; low and high: ends of intervals."""

    name: str
    values: Sequence[float]
    tone: Tone
    shape: Shape = "dot"
    dash: str = ""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Axis:
    """Values from low to high, as shares from 0 to 1."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ticks", _decades(self.low, self.high) if self.log else _round_steps(self.low, self.high))

    def at(self, value: float) -> float:
        """A value's share of the way, kept inside."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def across(self, value: float | None) -> str:
        """A value's place from the left; without a number: at the right edge."""
        share = 1.0 if value is None or math.isnan(value) else self.at(value)
        return f"{_LEFT + (_RIGHT - _LEFT) * share:.2f}%"


def axis_of(values: Sequence[float], *, log: bool, zero: bool = False) -> Axis:
    """An axis with room for the values; zero: one that begins there."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return Axis(1e-7, 1.0, log=True) if log else Axis(0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        return Axis(low / 2, high * 2, log=True)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Axis(0.0 if zero else low - room, high + room)


def rows_plot(rows: Sequence[Row], axis: Axis, *, caption: str, legend: Sequence[tuple[str, Mark]] = ()) -> str:
    """A line for each row with its marks or its bar, the first on top; names stand beside, or above where the page is narrow."""
    grid = "".join(f'<line class="grid" x1="{axis.across(t)}" x2="{axis.across(t)}" y1="0" y2="24"/>' for t in axis.ticks)
    lines = []
    for row in rows:
        inside = [grid]
        if row.within is not None:
            inside.append(f'<rect class="within" x="0" width="{axis.across(row.within)}" y="7" height="10"/>')
        if row.bar is not None:
            value, tone = row.bar
            start, end = axis.across(0.0).rstrip("%"), axis.across(value).rstrip("%")
            width = float(end) - float(start)
            inside.append(f'<rect class="bar-of {tone}" x="{start}%" width="{width:.2f}%" y="5" height="14" rx="2"/>')
            late = width > 75  # near the right edge the number goes inside of the bar's end
            side = 'dx="-4" text-anchor="end" style="fill:var(--on)"' if late else 'dx="4"'
            inside.append(f'<text class="value" x="{end}%" y="16" {side}>{value:.3g}</text>')
        inside += [_mark(mark, axis.across(mark.value), 12) for mark in row.marks]
        name = f'<div class="name{" no" if row.failed else ""}">{escape(row.name)}</div>'
        lines.append(
            f'<div class="row">{name}<svg height="24" role="img" aria-label="{escape(row.says)}">{"".join(inside)}</svg></div>'
        )
    numbers = "".join(
        f'<text x="{axis.across(t)}" y="14" text-anchor="middle">{escape(_number(t, axis.log))}</text>' for t in axis.ticks
    )
    lines.append(f'<div class="row"><div></div><svg height="18" aria-hidden="true">{numbers}</svg></div>')
    shown = _legend([(name, _mark(mark, "50%", 7), "") for name, mark in legend])
    lines.append(f'<div class="row"><div></div><p class="caption">{escape(caption)}</p></div>')
    return f'<div class="plot">{shown}{"".join(lines)}</div>\n'


def curves_plot(
    places: Sequence[str],
    curves: Sequence[Curve],
    axis: Axis,
    *,
    across: str,
    up: str,
    says: str,
    failed: Sequence[int] = (),
    height: int = 260,
) -> str:
    """Curves over evenly spaced places. across, up: labels of the axes. failed: places that are marked. says: for who does not see it."""
    bottom, top = height - 22, 16

    def x(index: float) -> str:
        return f"{10 + 87 * (index + 0.5) / max(1, len(places)):.2f}%"

    def y(value: float) -> str:
        return f"{bottom - (bottom - top) * axis.at(value):.1f}"

    inside = [
        f'<rect class="failed-place" x="{x(index - 0.45)}" width="{87 * 0.9 / len(places):.2f}%" y="{top}" height="{bottom - top}"/>'
        for index in failed
    ]
    for tick in axis.ticks:
        inside.append(f'<line class="grid" x1="0" x2="100%" y1="{y(tick)}" y2="{y(tick)}"/>')
        inside.append(f'<text x="0" y="{float(y(tick)) - 3:.1f}">{escape(_number(tick, axis.log))}</text>')
    step = max(1, -(-len(places) // 9))
    inside += [
        f'<text x="{x(index)}" y="{height - 4}" text-anchor="middle">{escape(places[index])}</text>'
        for index in range(0, len(places), step)
    ]
    for curve in curves:
        inside += _drawn(curve, x, y)
    legend = [(curve.name, _mark(Mark(None, curve.shape, curve.tone), "50%", 7), _stroke(curve)) for curve in curves]
    if failed:
        legend.append(("failed", _mark(Mark(None, "cross", "bad"), "50%", 7), ""))
        for index in failed:
            value = next((curve.values[index] for curve in curves if curve.shape == "dot"), math.nan)
            inside.append(_mark(Mark(None, "cross", "bad"), x(index), bottom if math.isnan(value) else float(y(value))))
    svg = f'<svg height="{height}" role="img" aria-label="{escape(says)}">{"".join(inside)}</svg>'
    return f'<div class="plot">{_legend(legend)}<p class="small">{escape(up)}</p>{svg}<p class="caption">{escape(across)}</p></div>\n'


def bars_plot(bars: Sequence[tuple[str, float, bool]], caption: str) -> str:
    """A horizontal bar for each (name, value, whether it stands out), the first on top. caption: of the axis."""
    values = [value for _, value, _ in bars]
    rows = [
        Row(
            name=f"{name} ▲" if marked else name,
            says=f"{name}: {value:.3g}{', stands out' if marked else ''}",
            bar=(value, "bad" if marked else "good"),
            failed=marked,
        )
        for name, value, marked in bars
    ]
    plot = rows_plot(rows, axis_of([0.0, *values], log=False, zero=True), caption=caption)
    if not any(marked for *_, marked in bars):
        return plot
    return plot.replace(
        '<div class="plot">', '<div class="plot"><div class="legend"><span class="no">▲ stands out</span></div>', 1
    )


def _drawn(curve: Curve, x: Callable[[float], str], y: Callable[[float], str]) -> list[str]:
    points = [(x(index), y(value)) if math.isfinite(value) else None for index, value in enumerate(curve.values)]
    out = []
    for one, two in pairwise(points):
        if one is not None and two is not None:
            out.append(
                f'<line class="line {curve.tone}"{_dash(curve)} x1="{one[0]}" y1="{one[1]}" x2="{two[0]}" y2="{two[1]}"/>'
            )
    for index, point in enumerate(points):
        if point is None:
            continue
        if curve.low is not None and curve.high is not None:
            low, high = y(curve.low[index]), y(curve.high[index])
            out.append(f'<line class="line {curve.tone}" x1="{point[0]}" x2="{point[0]}" y1="{low}" y2="{high}"/>')
            caps = f'<path class="line {curve.tone}" d="M-4 0H4"/>'
            out += [f'<svg x="{point[0]}" y="{end}" overflow="visible">{caps}</svg>' for end in (low, high)]
        out.append(_mark(Mark(None, curve.shape, curve.tone), point[0], float(point[1])))
    return out


def _mark(mark: Mark, across: str, down: float) -> str:
    """A shape whose middle is at a place: an svg of its own there, since a path knows no percentages."""
    if mark.shape == "none":
        return ""
    solid = " solid" if mark.shape in ("dot", "square", "diamond") else ""
    path = f'<path class="mark{solid} {mark.tone}" d="{_SHAPES[mark.shape]}"/>'
    return f'<svg x="{across}" y="{down:.1f}" overflow="visible">{path}</svg>'


def _dash(curve: Curve) -> str:
    return f' stroke-dasharray="{curve.dash}"' if curve.dash else ""


def _stroke(curve: Curve) -> str:
    return f'<line class="line {curve.tone}"{_dash(curve)} x1="0" x2="100%" y1="7" y2="7"/>'


def _legend(entries: Sequence[tuple[str, str, str]]) -> str:
    if not entries:
        return ""
    each = "".join(
        f'<span><svg height="14" aria-hidden="true">{line}{mark}</svg>{escape(name)}</span>' for name, mark, line in entries
    )
    return f'<div class="legend">{each}</div>'


def _decades(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten, or 1, 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    step = max(1, -(-(last - first + 1) // 6))
    ticks = (factor * 10.0**power for power in range(first, last + 1, step) for factor in factors)
    return tuple(tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9))


def _round_steps(low: float, high: float) -> tuple[float, ...]:
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(step * index for index in range(first, last + 1))


def _number(value: float, log: bool) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if log else f"{value:.4g}"
