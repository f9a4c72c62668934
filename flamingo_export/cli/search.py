"""`flamingo-export search`: the pictures of an index that are most like an image or a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.common_options import AsJson
from flamingo_export.cli.groups import Running


def search(
    bundle: Annotated[Path, typer.Argument(help="The bundle that made the index.", show_default=False)],
    index: Annotated[Path, typer.Option("--index", metavar="FOLDER", help="An index, by `index`.", show_default=False)],
    image: Annotated[
        Path | None, typer.Option("--image", "-i", metavar="FILE", help="What to look for.", show_default=False)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", "-t", help="What to look for, in words: of bundles with a text tower.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many to show.")] = 10,
    faiss: Annotated[
        bool, typer.Option("--faiss", help="Search with FAISS (extra faiss): the same rows, in its memory.")
    ] = False,
    run: Running = Running(),
    as_json: AsJson = False,
) -> None:
    """Find the pictures of an index that are most like an image or a text.

    \b
    flamingo-export search my.bundle --index index/ --image a.png
    flamingo-export search my.bundle --index index/ --text "a dog on a beach"
    """
    from flamingo_export.cli.output import print_json, results, table
    from flamingo_export.evaluation.index.looking import found_by_image, found_by_text

    if (image is None) == (text is None):
        raise typer.BadParameter("give one of --image and --text, what to look for", param_hint="--text")
    if text is not None:
        hits = found_by_text(bundle, index, text, top, faiss=faiss, **asdict(run))
    else:
        assert image is not None
        hits = found_by_image(bundle, index, image, top, faiss=faiss, **asdict(run))
    if as_json:
        print_json([{"cosine": cosine, "item": item} for item, cosine in hits])
        return
    lines = [(f"{cosine:.4f}", item.id, item.image or item.video or "", item.answer) for item, cosine in hits]
    results().print(table(("cosine", "id", "file", "says"), lines, right=(0,)))
