"""`flamingo-export debug`: the smallest graph on which something still fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.common_options import AsJson


def debug(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", show_default=False)],
    reduce: Annotated[
        str,
        typer.Option(
            "--reduce", metavar="GRAPH", help="The graph to reduce: decoder, vision_encoder and so on.", show_default=False
        ),
    ],
    layer: Annotated[
        int | None,
        typer.Option("--layer", min=0, help="Only this LM layer of the decoder, with its gated block.", show_default=False),
    ] = None,
    check: Annotated[
        str,
        typer.Option(
            "--check",
            metavar="onnxruntime|parser|COMMAND",
            help="onnxruntime: results as bundles are run against those of each node by itself. parser: TensorRT for RTX's, of the lowered "
            "graph. A command is given the path of a graph last and exits with 0 where nothing is wrong with it.",
        ),
    ] = "onnxruntime",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for what is found. Default GRAPH.reduced.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Reduce a graph of a bundle to the fewest nodes that a parser still refuses, or that still diverge (needs the extra debug).

    Exits with 1 where something fails, and with 0 where the check finds nothing wrong with the whole graph.

    \b
    flamingo-export debug nano.bundle --reduce decoder
    flamingo-export debug nano.bundle --reduce decoder --check parser
    flamingo-export debug 3b.bundle --reduce decoder --layer 0 --check 'polygraphy run --trt --onnxrt'
    """
    from flamingo_export.cli.output import print_json, results
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.validate.reduction import REDUCED, VALUES
    from flamingo_export.validate.reduction import reduce as reduced

    folder = out if out is not None else Path(f"{reduce if layer is None else f'{reduce}.layer{layer}'}.reduced")
    with reported() as progress:
        found = reduced(bundle, reduce, out=folder, check=check, layer=layer, progress=progress)
    if as_json:
        print_json(found)
    elif not found.failing:
        print(
            f"{found.graph}: the check passes the whole graph of {found.nodes[0]} nodes, so there is nothing to reduce ({found.said})"
        )
    else:
        counted = ", ".join(name if count == 1 else f"{count} {name}" for name, count in found.operators.items())
        console = results()
        console.print(
            f"{found.graph}: of {found.nodes[0]} nodes {found.nodes[1]} still fail: {counted}", markup=False, soft_wrap=True
        )
        console.print(found.said, markup=False, soft_wrap=True)
        console.print(
            f"{folder / REDUCED}; every tensor of the whole graph by name is in {folder / VALUES}", markup=False, soft_wrap=True
        )
    if found.failing:
        raise typer.Exit(1)
