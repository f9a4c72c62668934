"""`flamingo-export build`: a checkpoint or a size becomes a bundle."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_export.cli.options import AsJson

if TYPE_CHECKING:
    from flamingo_export.manifest import Manifest


class Storage(StrEnum):
    """How weights are stored."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Parity(StrEnum):
    """Whether to compare with the reference."""

    auto = "auto"
    skip = "skip"


def build(
    size: Annotated[
        str | None,
        typer.Option("--size", help="nano (trained weights), 3b, 9b or 80b (random weights).", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A folder with config.json and safetensors files.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle. Default flamingo-SIZE.bundle or CHECKPOINT.bundle.", show_default=False),
    ] = None,
    precision: Annotated[
        Storage | None,
        typer.Option(
            "--precision",
            help="How weights are stored. Default fp32 below a billion parameters, bf16 above.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Seed of random weights, also for nano.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", min=2, help="Cache slots at most. Default what the model was made for.", show_default=False
        ),
    ] = None,
    parity: Annotated[
        Parity, typer.Option("--parity", help="auto: compare with the reference where PyTorch is installed.")
    ] = Parity.auto,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a bundle: ONNX graphs, weights, tokenizer and how parity stands. Interrupted, the same command goes on where it was.

    \b
    flamingo-export build --size nano --out nano.bundle
    """
    if (size is None) == (checkpoint is None):
        raise typer.BadParameter("give either --size or --checkpoint", param_hint="--size")
    if checkpoint is not None and seed is not None:
        raise typer.BadParameter("a checkpoint has its weights; a seed makes random ones for --size", param_hint="--seed")
    from flamingo_export import api
    from flamingo_export.build_request import CheckpointFolder, source_for_size
    from flamingo_export.cli.options import known_size
    from flamingo_export.cli.output import print_json
    from flamingo_export.cli.progress import reported
    from flamingo_export.manifest import ShapeLimits

    source = (
        source_for_size(known_size(size).name, seed=seed) if size is not None else CheckpointFolder(path=checkpoint or Path())
    )
    with reported() as progress:
        result = api.build(
            source,
            out=out,
            storage=precision.value if precision else None,
            limits=ShapeLimits(max_length=max_length) if max_length else None,
            parity=parity.value,
            overwrite=force,
            progress=progress,
        )
    if as_json:
        print_json({"bundle": str(result.bundle), "manifest": result.manifest})
    else:
        _print(result.bundle, result.manifest)


def _print(path: Path, manifest: Manifest) -> None:
    from flamingo_export.cli.output import human_bytes

    total = sum(file.size for file in manifest.files)
    weights = (
        f"random weights, seed {manifest.source.seed}" if manifest.source.kind == "random" else "weights of the checkpoint"
    )
    stands = {
        "passed": f"parity passed on {', '.join(manifest.parity.backends)}",
        "failed": "parity failed",
        "not_run": f"parity not run; with PyTorch installed: flamingo-export parity {path}",
    }[manifest.parity.state]
    print(f"{path}: Flamingo {manifest.config.name}, {human_bytes(total)}, {weights} in {manifest.precision.storage}")
    print(stands)
