"""Paths and modules in back-ticks, in README, CONTRIBUTING and docs/, are there; every public name is in the reference."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import flamingo_export
import flamingo_export.errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Decisions say what was so on their day.
PAGES = [page for page in PAGES if page.parent.name != "decisions" and page.name != "cli.md"]
FOLDERS = (
    "flamingo_export",
    "reference",
    "calibration",
    "trt_plugins",
    "tests",
    "benchmarks",
    "scripts",
    "examples",
    "docs",
    "requirements",
)
PACKAGES = ("flamingo_export", "flamingo_reference", "flamingo_calibration")
MADE = re.compile(r"_build|build/gpu-wheels|NNNN|DEVICE|[*{}<>]| ")


def ticked(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths(page: Path) -> None:
    named = [name for name in ticked(page) if name.partition("/")[0] in FOLDERS and "/" in name and not MADE.search(name)]
    missing = [
        name for name in named if not (ROOT / name.partition("::")[0].rstrip("/")).exists() and not re.search(r":\d", name)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules(page: Path) -> None:
    wrong: list[str] = []
    found: Any
    for name in ticked(page):
        if not re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", name):
            continue
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ImportError:
                continue
            for attribute in parts[length:]:
                found = getattr(found, attribute, None)
            if found is None:
                wrong.append(name)
            break
    assert wrong == []


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"flamingo_export\.(\w+)", page))
    errors = {name for name in flamingo_export.__all__ if getattr(flamingo_export.errors, name, None) is not None}
    assert set(flamingo_export.__all__) - {"__version__"} - errors == shown - {"errors"}
    assert ".. automodule:: flamingo_export.errors" in page
