"""`flamingo-export parity`: whether a bundle's engines compute what the reference computes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_export.cli.common_options import AsJson, Device, check_written, fault_after
from flamingo_export.cli.groups import Beside

if TYPE_CHECKING:
    from flamingo_export.validate.report.parity_report import ParityReport


class AgainstWhat(StrEnum):
    """What engines are compared with."""

    reference = "reference"
    transformers = "transformers"
    golden = "golden"


class SecondOpinion(StrEnum):
    """Whose code checks golden values again."""

    polygraphy = "polygraphy"


def parity(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", show_default=False)],
    backend: Annotated[
        str, typer.Option("--backend", help="Whose engines to check: auto, onnxruntime, tensorrt-rtx or tensorrt.")
    ] = "auto",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="The checkpoint that the bundle was built from, where it does not lie beside it as it did then.",
            show_default=False,
        ),
    ] = None,
    beside: Beside = Beside(),
    against: Annotated[
        AgainstWhat | None,
        typer.Option(
            "--against",
            help="reference: PyTorch's. transformers: its own model, for IDEFICS and Llama 3.2 Vision. golden: values in the bundle. "
            "Default the reference where it is at hand, else golden.",
            show_default=False,
        ),
    ] = None,
    with_: Annotated[
        SecondOpinion | None,
        typer.Option(
            "--with",
            help="polygraphy: golden values, checked again by NVIDIA Polygraphy's runner and comparator.",
            show_default=False,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="With --with: a folder for inputs and outputs in Polygraphy's JSON.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the report as a self-contained page.", show_default=False)
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check every subgraph, logits and token traces: against PyTorch where it is installed, else against the bundle's golden values.

    Exits with 1 unless everything passed.

    \b
    flamingo-export parity nano.bundle
    flamingo-export parity idefics.bundle --against transformers
    flamingo-export parity nano.bundle --with polygraphy
    flamingo-export parity nano.bundle --backend onnxruntime --device cuda
    """
    from flamingo_export.cli.output import print_json
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.validate import check_bundle

    if export is not None and with_ is None:
        raise typer.BadParameter("inputs and outputs are exported for Polygraphy: add --with polygraphy", param_hint="--export")
    if with_ is not None:
        if checkpoint is not None or against is not None or html is not None or device != "cpu":
            raise typer.BadParameter("Polygraphy checks the bundle's golden values, and nothing else", param_hint="--with")
        from flamingo_export.cli.polygraphy import second_opinion

        second_opinion(bundle, export, as_json=as_json)
        return
    if checkpoint is None and beside:
        raise typer.BadParameter("parts go with a checkpoint: add --checkpoint", param_hint="--checkpoint")
    files = beside.files(checkpoint) if checkpoint is not None else None
    check_written(html, "--html")
    with reported() as progress:
        report = check_bundle(
            bundle,
            backend=backend,
            checkpoint=files,
            device=device,
            progress=progress,
            against=against.value if against else None,
        )

    def page() -> None:
        if html is not None:
            from flamingo_export.validate.report.parity_page import write_html

            write_html(html, report)

    with fault_after(page) as written:
        if as_json:
            print_json(report)
        else:
            _print(report, html if written else None)
    if report.verdict != "passed":
        raise typer.Exit(1)


def _print(report: ParityReport, html: Path | None) -> None:
    from flamingo_export.cli.output import results, table

    console = results()
    groups: dict[tuple[str, str], list[float | None]] = {}
    failed: dict[tuple[str, str], int] = {}
    for row in report.rows:
        key = (str(row.level), row.subgraph)
        share = row.error / row.limit if row.error is not None and row.limit else None
        groups.setdefault(key, []).append(share)
        failed[key] = failed.get(key, 0) + (not row.passed)
    rows = []
    for key, shares in groups.items():
        measured = [share for share in shares if share is not None]
        worst = f"{100 * max(measured):.0f} %" if measured else "-"
        rows.append((key[0].replace("_", " "), key[1], f"{len(shares) - failed[key]} of {len(shares)}", worst))
    if rows:
        console.print(table(("checked", "subgraph", "gates passed", "worst, of its limit"), rows, right=(2, 3)))
    for gate in report.failures[:10]:
        error = "no number" if gate.error is None else f"error {gate.error:.3g}, limit {gate.limit or 0:.3g}"
        console.print(f"failed: {gate.level} {gate.case}, {gate.subgraph} {gate.tensor}: {error}. {gate.note}", markup=False)
    for gate in report.unmeasured[:10]:
        console.print(f"not measured: {gate.level} {gate.case}, {gate.subgraph} {gate.tensor}: {gate.note}", markup=False)
    for trace in report.traces:
        if trace.outcome != "equal":
            console.print(
                f"trace {trace.case} ({trace.search}, {trace.num_beams} beams): {trace.outcome}. {trace.note}", markup=False
            )
    for left_out in report.not_run:
        console.print(f"not run: {left_out.name}: {left_out.reason}", markup=False)
    if html is not None:
        console.print(f"report: {html}", markup=False)
    console.print(report.summary, markup=False)
