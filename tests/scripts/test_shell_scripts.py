"""Scripts of the shell: what they refuse. What they do is done by `make test-oldest`, `make test-newest` and continuous integration."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [[], ["oldest", "torch==2.13.0"], ["lowest"], ["lowest", ""]])
def test_versions_wants_to_know_which_and_makes_no_environment_before(arguments: list[str]) -> None:
    done = subprocess.run([ROOT / "scripts" / "test_versions", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "lowest or newest" in done.stderr
    assert not (ROOT / ".venv-oldest").exists()


@pytest.mark.parametrize("script", ["scripts/test_versions", "scripts/wheel_check", ".ci/run"])
def test_they_are_executable_and_stop_at_the_first_failure(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", path], timeout=60).returncode == 0


def test_continuous_integration_checks_formatting_wheel_and_documentation() -> None:
    """`make coverage` is `make test` with a report; that begins with `make lint`, which formatting is part of; the wheel is installed with the
    runtime for CPUs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = re.findall(r"^make (\S+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"coverage", "docs", "wheel-check"} <= set(called)
    assert re.search(r"(?m)^coverage:\n\t.*\$\(MAKE\) .*\btest\b", makefile)
    assert re.search(r"(?m)^test: lint$", makefile)
    assert re.search(r"(?m)^lint: .*\n(?:\t.*\n)*\t.*ruff format --check \.$", makefile)
    steps = (ROOT / "scripts" / "wheel_check").read_text(encoding="utf-8")
    assert '--no-index "$wheel[cpu]"' in steps
    assert {"doctor", "build", "generate", "parity"} <= set(re.findall(r"^flamingo (\w+)", steps, flags=re.MULTILINE))
