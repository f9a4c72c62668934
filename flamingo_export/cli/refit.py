"""`flamingo-export refit`: other weights of the same shapes in a bundle's graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.common_options import (
    AsJson,
    Overwrite,
    Parity,
    ParityChoice,
)
from flamingo_export.cli.groups import Beside


def refit(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose graphs are used.", show_default=False)],
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="Other weights of the same shapes: a folder or file.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new bundle.", show_default=False)],
    beside: Beside = Beside(),
    parity: ParityChoice = Parity.auto,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put a fine-tuned checkpoint into a bundle without building graphs anew. Interrupted, the same command resumes.

    \b
    flamingo-export refit my.bundle --checkpoint tuned/ --out tuned.bundle
    """
    from flamingo_export.cli.build import print_result
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.pipeline import run as pipeline
    from flamingo_export.pipeline.build_request import refit_request

    source = beside.files(checkpoint)
    request = refit_request(bundle, source, out, parity=parity.value, overwrite=overwrite)
    with reported() as progress:
        result = pipeline.build(request, progress=progress)
    print_result(result, as_json)
