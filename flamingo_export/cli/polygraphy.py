"""`flamingo-export parity --with polygraphy`: what Polygraphy says of a bundle's golden values, and the next steps with it."""

from __future__ import annotations

from pathlib import Path

import typer


def second_opinion(bundle: Path, export: Path | None, *, as_json: bool) -> None:
    """Runs, prints, and exits with 1 unless everything passed."""
    from flamingo_export.bundle.manifest import read_manifest
    from flamingo_export.cli.output import print_json, results, table
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.validate.polygraphy_check import check_with_polygraphy, commands

    with reported() as progress:
        report = check_with_polygraphy(bundle, export=export, progress=progress)
    if as_json:
        print_json(report)
    else:
        console = results()
        rows = [
            (each.case, each.tensor, f"{each.difference:.3g}", f"{each.allowed:.3g}", "passed" if each.passed else "failed")
            for each in report.comparisons
        ]
        console.print(table(("case", "tensor", "largest difference", "allowed", "Polygraphy"), rows, right=(2, 3)))
        for each in report.disagreements:
            ours = "passes" if each.ours else "fails"
            console.print(f"{each.case}, {each.tensor}: parity {ours} it, Polygraphy does not agree", markup=False)
        for line in report.not_run:
            console.print(f"not compared: {line}", markup=False)
        passed = sum(each.passed for each in report.comparisons)
        console.print(f"Polygraphy {report.version}: {passed} of {len(report.comparisons)} outputs within their limits")
        if export is not None:
            console.print("\n".join(commands(bundle, read_manifest(bundle), export)), markup=False, soft_wrap=True)
    if not report.passed:
        raise typer.Exit(1)
