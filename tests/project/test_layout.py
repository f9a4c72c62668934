"""docs/development.md names every file name that stands twice in the packages, and why."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_names_that_stand_twice_have_a_reason() -> None:
    folders = ["flamingo_export", "reference", "calibration"]
    tracked = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = Counter(Path(path).name for path in tracked.split() if path.endswith(".py") and not path.endswith("__init__.py"))
    twice = {name for name, count in names.items() if count > 1}
    assert len(names) > 200
    page = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    section = page.partition("## Names that stand twice on purpose")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    given = {Path(name).name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert twice == given
