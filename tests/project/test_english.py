"""Habits of English that make our texts hard to read, in docs, docstrings, comments, messages and help texts: they do not come back.

CONTRIBUTING.md ("Words") says what to write in their place. What can be counted is checked; whether a sentence is good is for readers.
"""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = "second|step|branch|row|request|token|layer|head|call|job|prompt|image|frame|tile|process|beam|side"
COUNTS = r"(?:bytes|[KMG]i?B|tokens|requests|steps|frames|times|pixels|launches|time|kernels|ms)"
NOT_A = "longer|more|less|fewer|larger|smaller|wider|worse|better|earlier|later|slower|faster|further|other|such|different|matter|need|doubt|one"
HABITS = {
    'write "is not a" for "is no"': rf"(?<![Tt]here )\b(?:is|are|was|were) no (?!(?:{NOT_A})\b)[A-Za-z`+]",
    'write "only" or "by itself" for "alone"': r"(?<!leave )(?<!left )(?<!stands )(?<![`\"{(])\balone\b(?! and\b|[`\"]|\.\w)",
    'write "reported", "recognised" or "distinguished" for "told"': r"\btold\b",
    'write what it cannot be, or "is invalid"': r"\bcannot be(?:[.,;:)]|$)",
    'write "resumes", "continues" or "uses" for "goes on with"': r"\b(?:go|goes|going|gone|went) on with\b",
    'write "per" for "a"': rf"\b{COUNTS} an? (?:{UNITS})\b(?! question)",
}


def prose(path: Path) -> list[tuple[int, str]]:
    """Lines of text for people with their numbers: comments and strings of Python, all of a page but its blocks of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        text = re.sub(r"\n\| not \| but \|\n(?:\|.*\n)+", "\n", text)  # CONTRIBUTING's table of the habits
        lines, code = [], False
        for number, line in enumerate(text.split("\n"), start=1):
            code ^= line.lstrip().startswith("```")
            if not code:
                lines.append((number, line))
        return lines
    found = []
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            found += [(token.start[0] + index, line) for index, line in enumerate(token.string.split("\n"))]
    return found


def habits_of(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{number}: {advice}: {line.strip()[:120]}"
        for number, line in prose(path)
        for advice, pattern in HABITS.items()
        if re.search(pattern, line)
    ]


@pytest.mark.slow
def test_the_habits_are_gone() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.j2"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split() if not name.startswith("tests/") and name != "CHANGELOG.md"]
    assert len(paths) > 300
    found = [line for path in paths if path.is_file() for line in habits_of(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "habits"),
    [
        ('x = "a.png is no image"', 1),
        ('x = "there is no image, which is no longer than a row is"', 0),
        ("# for engines alone", 1),
        ("# a failure stands alone", 0),
        ("alone = 1", 0),
        ('"""What is told by its name."""', 1),
        ("# values that cannot be.", 1),
        ("# values that cannot be read.", 0),
        ("# it goes on with the next", 1),
        ("# 12 bytes per branch, 3 tokens a second", 1),
        ("# a second question, a row a file", 0),
    ],
)
def test_the_check_sees_them(tmp_path: Path, text: str, habits: int) -> None:
    (tmp_path / "x.py").write_text(text + "\n")
    assert len(habits_of(tmp_path / "x.py")) == habits
