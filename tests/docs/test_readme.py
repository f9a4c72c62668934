"""The README says what is so: its commands parse, its files and links exist, its Python runs on names that are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import flamingo_export
from flamingo_export.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "cli.md"]  # which `make docs` writes from the commands themselves


def commands(page: Path) -> list[str]:
    """Lines of the page's code blocks that call flamingo-export, without their remarks."""
    blocks = re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.sub(r" > \S+", "", line) for line in lines if line.startswith("flamingo-export ")]


def test_the_page_of_commands_shows_every_verb():
    shown = {shlex.split(line, comments=True)[1] for line in commands(ROOT / "docs" / "commands.md")}
    group: Any = get_command(app)
    assert shown == set(group.commands)


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_commands_of_the_pages_are_accepted(line):
    _, verb, *arguments = shlex.split(line, comments=True)
    group: Any = get_command(app)
    with group.make_context("flamingo-export", [verb], resilient_parsing=True) as parent:
        group.commands[verb].make_context(verb, arguments, parent=parent)


def test_an_unknown_option_would_be_noticed():
    group: Any = get_command(app)
    with (
        group.make_context("flamingo-export", ["inspect"], resilient_parsing=True) as parent,
        pytest.raises(Exception, match="No such option"),
    ):
        group.commands["inspect"].make_context("inspect", ["--no-such-option"], parent=parent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert set(missing) <= {"reference/cli.md"}  # made by `make docs` from the command line itself


def test_the_file_tree_exists():
    tree = re.search(r"## Files\n\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert tree
    folder = Path()
    for line in tree[1].splitlines():
        name = line.strip().split("  ")[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir(), name
        else:
            for part in name.split():
                assert (folder / part).exists(), f"{folder / part}"


def test_the_names_that_its_python_uses_are_public():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code
    compile(code[1], "README.md", "exec")
    for name in re.findall(r"flamingo_export\.(\w+)", code[1]):
        assert name in flamingo_export.__all__


def test_the_readme_is_short():
    """A screen and a half, and no cell of a table that is longer than two lines."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in line.strip("|").split("|")]
    assert max(map(len, cells)) <= 120


def test_every_page_is_in_the_site():
    """A page that no list names fails the site, which is built after the tests."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = {
        line.strip() for block in re.findall(r"```\{toctree\}\n(.*?)```", index, flags=re.DOTALL) for line in block.splitlines()
    }
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages - named == set()
