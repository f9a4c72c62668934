"""Plots: each value stands where it belongs, says what it is in words and in shape, and users' texts are closed."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from flamingo_export.pages.plots import Axis, Curve, Mark, Row, axis_of, bars_plot, curves_plot, rows_plot


def parsed(plot: str) -> ElementTree.Element:
    return ElementTree.fromstring(plot)


def share(place: str) -> float:
    """A place between the margins as a share."""
    return (float(place.rstrip("%")) - 3) / 94


@pytest.mark.parametrize(("value", "wanted"), [(1e-8, 0.0), (1e-6, 0.25), (1e-4, 0.5), (1.0, 1.0), (9.0, 1.0)])
def test_a_logarithmic_axis(value: float, wanted: float) -> None:
    assert Axis(1e-8, 1.0, log=True).at(value) == pytest.approx(wanted)


def test_ticks_are_round_and_inside() -> None:
    assert Axis(0.0, 10.0).ticks == pytest.approx((0, 5, 10))
    assert Axis(47.0, 58.0).ticks == pytest.approx((50, 55))
    assert Axis(1e-9, 1.0, log=True).ticks == pytest.approx((1e-9, 1e-7, 1e-5, 1e-3, 1e-1))
    assert Axis(4e-7, 3e-6, log=True).ticks == pytest.approx((5e-7, 1e-6, 2e-6))


def test_an_axis_without_values_still_is_one() -> None:
    assert axis_of([], log=True).ticks
    assert axis_of([math.nan], log=False).ticks
    assert axis_of([0.0, math.inf], log=True).ticks
    assert axis_of([3.0, 3.0], log=False).at(3.0) == 0.5


def test_marks_stand_at_their_values_and_missing_ones_at_the_edge() -> None:
    marks = [Mark(1e-4, "tick", "ink"), Mark(1e-8, "dot", "good"), Mark(None, "cross", "bad")]
    plot = parsed(rows_plot([Row(name="a <b>", says="error", marks=marks)], Axis(1e-8, 1.0, log=True), caption="c & d"))
    row = plot.find("div[@class='row']")
    assert row is not None
    assert row.findtext("div") == "a <b>"
    places = [share(each.attrib["x"]) for each in row.findall("svg/svg")]
    assert places == pytest.approx([0.5, 0.0, 1.0])
    svg = row.find("svg")
    assert svg is not None
    assert svg.attrib["aria-label"] == "error"
    assert plot.findtext("div/p[@class='caption']") == "c & d"


def test_bars_are_as_long_as_their_values_and_what_stands_out_is_marked_by_a_sign() -> None:
    plot = bars_plot([("one", 4.0, True), ("two", 1.0, False)], "share")
    widths = [float(width) for width in re.findall(r'class="bar-of \w+" x="3.00%" width="([\d.]+)%"', plot)]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.02)
    assert "one ▲" in plot
    assert "▲ stands out" in plot
    assert "two ▲" not in plot
    assert "▲" not in bars_plot([("two", 1.0, False)], "share")


def test_curves_break_where_there_is_no_value_and_differ_without_colour() -> None:
    curves = [
        Curve(name="one", values=[1.0, math.nan, 3.0, 4.0], tone="good"),
        Curve(name="two", values=[1.0, 2.0, 3.0, 4.0], tone="other", shape="diamond", dash="5 4"),
    ]
    text = curves_plot(list("abcd"), curves, Axis(0.0, 5.0), across="x", up="y", says="two curves", failed=[2])
    plot = parsed(text)
    svg = plot.findall("svg")[-1]
    assert len(svg.findall("line[@class='line good']")) == 1
    assert len(svg.findall("line[@class='line other']")) == 3
    assert all("stroke-dasharray" in line.attrib for line in svg.findall("line[@class='line other']"))
    assert "failed" in "".join(plot.itertext())
    heights = [
        float(each.attrib["y"]) for each in svg.findall("svg") if each.find("path[@class='mark solid other']") is not None
    ]
    assert heights == sorted(heights, reverse=True)
    assert [round(a - b, 1) for a, b in pairwise(heights)] == pytest.approx([heights[0] - heights[1]] * 3, abs=0.2)


def test_intervals_are_drawn() -> None:
    curve = Curve(name="one", values=[2.0], tone="good", low=[1.0], high=[4.0])
    plot = parsed(curves_plot(["a"], [curve], Axis(0.0, 5.0), across="x", up="y", says="s"))
    line = plot.find("svg/line[@class='line good']")
    assert line is not None
    assert float(line.attrib["y1"]) - float(line.attrib["y2"]) == pytest.approx(3 / 5 * (260 - 22 - 16), abs=0.2)
