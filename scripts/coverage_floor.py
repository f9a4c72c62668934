"""Which modules of the package the tests reach too little of, from coverage.py's JSON report.

    python scripts/coverage_floor.py build/coverage.json [--strict]

Prints the modules by their share of lines that were run, least first, and names those below the floor that are not among the exceptions.
Floor and exceptions, each with its reason, stand in pyproject.toml, `[tool.flamingo.coverage]`. --strict exits with 1 where a module is below.
An exception that this run did not need is named too and never fails: a machine with a GPU reaches more than one without.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 30


def shares(report: Mapping[str, object]) -> dict[str, float]:
    """Percent of each file's lines that were run. Files without a line to run are left out."""
    files = report["files"]
    assert isinstance(files, dict)
    found = {name: each["summary"] for name, each in files.items()}
    return {name: each["percent_covered"] for name, each in found.items() if each["num_statements"]}


def faults(found: Mapping[str, float], floor: float, exceptions: Mapping[str, str]) -> list[str]:
    """What is wrong, a line each. exceptions: a reason for each pattern of file names."""
    return [
        f"{name}: {share:.0f} % of its lines are run by tests, expected at least {floor:g} %. Add tests"
        for name, share in sorted(found.items())
        if share < floor and not any(fnmatch(name, pattern) for pattern in exceptions)
    ]


def unneeded(found: Mapping[str, float], floor: float, exceptions: Mapping[str, str]) -> list[str]:
    """Patterns of exceptions that no module below the floor has."""
    low = [name for name, share in found.items() if share < floor]
    return [pattern for pattern in exceptions if not any(fnmatch(name, pattern) for name in low)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="coverage.py's JSON report")
    parser.add_argument("--strict", action="store_true", help="fail where a module is below the floor")
    options = parser.parse_args()
    found = shares(json.loads(options.report.read_bytes()))
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flamingo"]["coverage"]
    exceptions: dict[str, str] = settings["exceptions"]
    for name, share in sorted(found.items(), key=lambda item: item[1])[:SHOWN]:
        reason = next((why for pattern, why in exceptions.items() if fnmatch(name, pattern)), "")
        print(f"{share:5.1f} %  {name}{f'  ({reason})' if reason else ''}")
    print(
        f"{len(found)} modules, {sum(share >= settings['floor'] for share in found.values())} at {settings['floor']} % or more"
    )
    wrong = faults(found, settings["floor"], exceptions)
    for line in wrong:
        print(line, file=sys.stderr)
    for pattern in unneeded(found, settings["floor"], exceptions):
        print(f"the exception {pattern} was not needed in this run")
    return 1 if wrong and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
