"""What holds for all tests: where they write, how signals stand, and that what they measured is told at the end.

It is here also so that this folder is on the import path: tests of every folder use `trt_wheels`.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".test-cache"
"""In place of the user's cache folder, for this process and those it starts: notes of bundles, fonts, TensorRT's wheels."""

os.environ["XDG_CACHE_HOME"] = str(CACHE)
os.environ["CHROME_CONFIG_HOME"] = str(CACHE)  # where Chromium, which draws pages in tests, keeps its crash reports' settings
# Some tests import ONNX Runtime before flamingo_export, which would see to this.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Property tests draw the same cases each time, so that a suite that passed today passes tomorrow. FLAMINGO_DRAWS=new draws others.
try:
    import hypothesis
except ImportError:  # the hosts' environments run no property tests
    pass
else:
    hypothesis.settings.register_profile("same", derandomize=True)
    if os.environ.get("FLAMINGO_DRAWS", "same") != "new":
        hypothesis.settings.load_profile("same")

# A shell that runs a command in the background, or nohup, has it ignore some signals, and its children inherit that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests that passed recorded as `measured`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "measured":
                terminalreporter.write_line(str(value))


MUST_RUN = os.environ.get("FLAMINGO_TESTS_MUST_RUN", "")
"""A regular expression: tests that would be skipped for a reason in which it is found fail. Continuous integration names what it installed."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails tests that were skipped for want of something that is there by FLAMINGO_TESTS_MUST_RUN."""
    report = yield
    if MUST_RUN and report.skipped and isinstance(report.longrepr, tuple) and re.search(MUST_RUN, report.longrepr[2]):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} must run here (FLAMINGO_TESTS_MUST_RUN={MUST_RUN}), and was skipped: {report.longrepr[2]}"
        )
    return report
