"""The floor of coverage: modules below it fail unless they are excepted, and exceptions that are not needed fail."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import coverage_floor
import pytest

ROOT = Path(__file__).resolve().parents[2]


def report(**found: tuple[float, int]) -> dict[str, object]:
    return {
        "files": {
            name: {"summary": {"percent_covered": share, "num_statements": lines}} for name, (share, lines) in found.items()
        }
    }


@pytest.mark.parametrize(
    ("found", "exceptions", "wrong"),
    [
        ({"a.py": 85.0}, {}, []),
        ({"a.py": 84.9, "b.py": 99.0}, {}, ["a.py: 85 %"]),
        ({"gpu/a.py": 10.0, "gpu/b.py": 90.0}, {"gpu/*": "wants a GPU"}, []),
        ({"gpu/a.py": 90.0}, {"gpu/*": "wants a GPU"}, []),
    ],
)
def test_faults(found: dict[str, float], exceptions: dict[str, str], wrong: list[str]) -> None:
    faults = coverage_floor.faults(found, 85, exceptions)
    assert len(faults) == len(wrong)
    assert all(line.startswith(begin) for line, begin in zip(faults, wrong, strict=True))


@pytest.mark.parametrize(("share", "strict", "code"), [(84.0, True, 1), (84.0, False, 0), (85.0, True, 0)])
def test_a_module_below_the_floor_fails_the_strict_call(
    share: float, strict: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.flamingo.coverage]\nfloor = 85\n[tool.flamingo.coverage.exceptions]\n")
    (tmp_path / "coverage.json").write_text(json.dumps(report(**{"a.py": (share, 10), "b.py": (100.0, 3)})))
    monkeypatch.setattr(coverage_floor, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["coverage_floor", str(tmp_path / "coverage.json"), *["--strict"][:strict]])
    assert coverage_floor.main() == code
    printed = capsys.readouterr()
    assert f"{share:.1f} %  a.py" in printed.out
    assert f"2 modules, {1 + (share >= 85)} at 85 % or more" in printed.out
    assert printed.err.startswith("a.py: 84 % of its lines") == (share < 85)


def test_exceptions_that_were_not_needed() -> None:
    exceptions = {"gpu/*": "wants a GPU", "gone.py": "is not there", "a.py": "is low"}
    found = {"gpu/a.py": 90.0, "gpu/b.py": 85.0, "a.py": 10.0, "b.py": 10.0}
    assert coverage_floor.unneeded(found, 85, exceptions) == ["gpu/*", "gone.py"]
    assert coverage_floor.unneeded({**found, "gpu/b.py": 84.9}, 85, exceptions) == ["gone.py"]


def test_empty_modules_have_no_share() -> None:
    assert coverage_floor.shares(report(a=(50.0, 4), b=(100.0, 0))) == {"a": 50.0}


def test_every_exception_names_files_and_a_reason() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flamingo"]["coverage"]
    assert settings["floor"] >= 85
    for pattern, reason in settings["exceptions"].items():
        assert list(ROOT.glob(pattern)), pattern
        assert len(reason) > 15
