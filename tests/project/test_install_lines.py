"""Install lines work as written: from the source folder, with extras that there are. The project's name on a public index is not ours."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
READ = (".md", ".py", ".toml", ".j2", ".html", ".yaml", ".yml", ".sh", "Makefile", "Dockerfile")


def pages() -> dict[Path, str]:
    """Texts of the repository, the lock files' aside."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name.endswith(READ)]
    return {path: path.read_text(encoding="utf-8") for path in paths if path.is_file() and path != Path(__file__)}


def test_no_name_on_an_index_is_claimed():
    claimed = re.compile(
        r"(?:pip|uv|pipx) [a-z ]*install[^\n`]*?[ '\"]flamingo[-_]export(?!'s|[\w./-]*\.whl)\b|flamingo-export\\?\["
    )
    assert {str(path.relative_to(ROOT)): found[0] for path, text in pages().items() if (found := claimed.search(text))} == {}


def test_every_extra_that_is_named_exists():
    named = re.compile(r"install (?:-e )?'?\.\\?\[([\w,-]+)\\?\]|pip_install\(([^)]*)\)")
    lines = [found for text in pages().values() for found in named.finditer(text)]
    extras = {extra for found in lines for extra in re.findall(r"[\w-]+", found[1] or found[2])}
    assert {"cpu", "gpu", "torch"} <= extras
    assert extras - EXTRAS - {"extras", "str"} == set()
