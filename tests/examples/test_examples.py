"""The scripts in examples/ do what their first lines say, on the command that stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import flamingo_export
from flamingo_export.sources.choice import source_for_size

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nano.bundle and the examples, as a user has them."""
    folder = tmp_path_factory.mktemp("examples")
    flamingo_export.build(source_for_size("nano"), out=folder / "nano.bundle", parity="skip")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def test_there_are_five() -> None:
    assert len(SCRIPTS) == 5


EXPECTED = {
    "caption_folder": r"(?m)^scene_1\.png: a .+\n",
    "answer_with_shots": r"^\w+\n  or: ",
    "score_candidates": r"^(purple|red|green|blue): \d+\.\d %\n",
    "build_live_model": r"^live\.bundle: parity passed\n\(\d+",
    "stream_with_timings": r"^\w+ \w+.*\nfirst token after \d+ ms, then \d+\.\d ms per token\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_the_command_in_its_first_lines(place: Path, script: Path) -> None:
    command = re.search(r"^python (.+)$", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert command
    done = subprocess.run(
        [sys.executable, *shlex.split(command[1])],
        cwd=place,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[script.stem], done.stdout), done.stdout
