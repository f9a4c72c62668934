"""The `flamingo-export` command. One file per verb: parse, make a request, call, print."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 (failure), 2 (usage) or 130 (interrupted)."""
    from flamingo_export.cli.app import run

    return run(argv)
