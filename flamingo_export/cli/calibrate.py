"""`flamingo-export calibrate`: how large activations become, for quantisation."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.common_options import (
    AsJson,
    Overwrite,
    SampleData,
    SizeName,
    SkipBad,
    chosen_samples,
)
from flamingo_export.cli.groups import Beside


class MethodName(StrEnum):
    """How a clipping threshold follows from what was seen."""

    amax = "amax"
    percentile = "percentile"
    mse = "mse"
    entropy = "entropy"


def calibrate(
    size: SizeName = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A checkpoint: a folder, or a file of tensors.", show_default=False)
    ] = None,
    beside: Beside = Beside(),
    data: SampleData = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The table.")] = Path("calibration.json"),
    method: Annotated[
        MethodName, typer.Option("--method", help="What quantisation takes by default; the table holds all.")
    ] = MethodName.amax,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of random weights, also for nano.", show_default=False)
    ] = None,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run samples through the PyTorch reference, one layer in memory at a time. Interrupted, the same command resumes.

    \b
    flamingo-export calibrate --checkpoint ckpt/ --data calib.jsonl --out calibration.json
    """
    named = beside.source(size, checkpoint, seed)
    import flamingo_calibration
    from flamingo_export.cli.output import print_json
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.errors import CalibrationError
    from flamingo_export.sources import open_source
    from flamingo_export.weights.calibration_table import write_table

    if out.is_dir() or (out.exists() and not overwrite):
        raise CalibrationError(
            f"{out} exists. Choose another --out{'' if out.is_dir() else ', or replace it with --overwrite'}."
        )
    source = open_source(named)
    spelled = flamingo_calibration.source_tokenizer(source)
    samples = chosen_samples(data, source, spelled)
    work = out.with_name(f".{out.name}.calibrating")
    with reported() as progress:
        table = flamingo_calibration.calibrate(
            source,
            samples,
            tokenizer=spelled,
            method=method.value,
            work=work,
            skip_bad=skip_bad,
            progress=progress,
        )
    write_table(out, table)
    flamingo_calibration.discard(work)
    skipped = len(samples) - table.samples
    if as_json:
        told = {name: getattr(table, name) for name in table.__struct_fields__ if name != "tensors"}
        print_json({"table": out, **told, "skipped": skipped, "tensors": len(table.tensors)})
        return
    left_out = f" ({skipped} left out)" if skipped else ""
    print(
        f"{out}: Flamingo {table.model}, {len(table.tensors)} tensors from {table.samples} samples{left_out} with {table.tokens} tokens "
        f"and {table.images} images, method {table.method}"
    )
