"""The `flamingo-export` command. One file per verb: parse, make a request, call, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 (failure), 2 (usage), 130 (interrupted) or 143 (terminated)."""
    from flamingo_export.cli.interrupts import watched
    from flamingo_export.cli.standard_streams import usable

    with watched() as interrupts, usable():
        try:
            from flamingo_export.cli.app import run

            return run(argv, interrupts)
        except BaseException:
            if interrupts.received is None:
                raise
            code, word = interrupts.outcome()
            print(f"flamingo-export: {word}", file=sys.stderr)
            return code
