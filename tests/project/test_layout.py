"""The layout is what the pages say of it: names that stand twice, and who may import whom."""

from __future__ import annotations

import re
import subprocess
import tomllib
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


def test_the_import_contract_names_every_package_and_has_no_exception() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract for contract in contracts if contract.get("containers") == ["flamingo_export"])
    assert layers["exhaustive"] is True
    assert not [contract["name"] for contract in contracts if contract.keys() & {"ignore_imports", "exhaustive_ignores"}]


def test_the_page_shows_the_rows_of_the_contract() -> None:
    """docs/architecture.md: who may import whom, in the order of pyproject.toml. Calibration has a contract of its own."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == ["flamingo_export"])
    wanted = [set(re.findall(r"\w+", row)) for row in layers if row != "(__main__)"]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = page.partition("## Packages, and who may import whom")[2].split("```")[1].strip("\n")
    left = re.sub(r",\n", ", ", "\n".join(line.split("  ")[0] for line in block.splitlines()))
    assert [set(re.findall(r"\w+", row)) - {"calibration"} for row in left.splitlines()] == wanted
