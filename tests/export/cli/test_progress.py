"""Bars on a terminal: a stage, and inside of it what is under way. Lines in a log."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from flamingo_export.cli.output import human_seconds
from flamingo_export.cli.progress_bars import _Bars, _Lines
from flamingo_export.progress import Phase


@pytest.fixture
def bars():
    return Progress(console=Console(file=io.StringIO(), force_terminal=True), auto_refresh=False)


def shown(bars):
    return [(task.description, task.completed, task.total) for task in bars.tasks]


def test_phases_have_bars_below_their_stage_while_they_last(bars):
    reporter = _Bars(bars)
    reporter.stage("decoder", 1000)
    reporter.advance(100)
    reporter.within((Phase("Building", 1, 4), Phase("Timing [x]", 0, 2)))
    assert shown(bars) == [("decoder", 100, 1000), ("  Building", 1, 4), ("    Timing \\[x]", 0, 2)]
    reporter.within((Phase("Building", 3, 4),))
    assert shown(bars) == [("decoder", 100, 1000), ("  Building", 3, 4)]
    reporter.stage("media_kv", 10)
    assert shown(bars) == [("decoder", 1000, 1000), ("media_kv", 0, 10)]


def test_a_log_hears_of_a_long_stage_once_a_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    reporter = _Lines()
    reporter.stage("layers", 40)
    for seconds in (30, 61, 90, 122):
        clock[0] = seconds
        reporter.advance(10)
    reporter.stage("graphs", 1)
    reporter.stage("weights", 8 << 20, "bytes")
    clock[0] = 222
    reporter.advance(1 << 20)
    assert capsys.readouterr().err.splitlines() == [
        "layers (40)",
        "layers: 50 %, 0.3 a second, 1 min 1 s left",
        "layers: 100 %, 0.3 a second",
        "graphs",
        "weights (8.0 MiB)",
        "weights: 12 %, 10.2 KiB a second, 11 min 40 s left",
    ]


def test_bars_say_the_pace_of_what_is_counted(bars, monkeypatch):
    clock = [5.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    reporter = _Bars(bars)
    reporter.stage("requests", 40)
    clock[0] = 9.0
    for _ in range(10):
        reporter.advance(1)
    assert bars.tasks[0].fields["size"] == "2.5 a second"
    reporter.stage("weights", 1 << 20, "bytes")
    reporter.advance(1)
    assert bars.tasks[1].fields["size"] == "1.0 MiB"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_lengths_of_time(seconds, said):
    assert human_seconds(seconds) == said
