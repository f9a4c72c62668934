"""No test is passed over: pytest enters every folder that has some."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_pytest_enters_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """Folders of some names (`build`, `dist`, `venv`) are left out by pytest's own settings when a folder above them is named, and nothing says
    so."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert Path("tests/export/build") in folders
    passed_over = [
        str(folder)
        for folder in sorted(folders)
        if any(fnmatch(name, pattern) for name in folder.parts for pattern in patterns)
    ]
    assert passed_over == []


def test_no_setting_leaves_tests_out(pytestconfig: pytest.Config) -> None:
    """What runs is chosen by a marker or on the command line, where it is seen."""
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert pytestconfig.getini("python_files") == ["test_*.py", "*_test.py"]
    conftests = [path for path in (ROOT / "tests").rglob("conftest.py") if "collect_ignore" in path.read_text(encoding="utf-8")]
    assert conftests == []
    assert "--ignore" not in " ".join(pytestconfig.getini("addopts"))
