"""`flamingo-export search`: the pictures of an index that are most like one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.options import AsJson, BackendName, Device, Fallback, Threads


def search(
    bundle: Annotated[Path, typer.Argument(help="The bundle that made the index.", show_default=False)],
    index: Annotated[Path, typer.Option("--index", metavar="FOLDER", help="An index, by `index`.", show_default=False)],
    image: Annotated[Path, typer.Option("--image", "-i", metavar="FILE", help="What to look for.", show_default=False)],
    top: Annotated[int, typer.Option("--top", min=1, help="How many to show.")] = 10,
    backend: BackendName = "auto",
    fallback: Fallback = None,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Find the pictures of an index that look most like one.

    \b
    flamingo-export search my.bundle --index index/ --image a.png
    """
    from flamingo_export.cli.options import opened
    from flamingo_export.cli.output import print_json, results, table
    from flamingo_export.evaluation.bundles import BundleModel
    from flamingo_export.evaluation.index.search import nearest
    from flamingo_export.evaluation.index.store import Index

    found = Index(index)
    with opened(bundle, backend, device, threads, fallback) as model:
        asked = BundleModel(model)
        found.check_bundle(asked.identity["digest"], bundle.name)
        rows, cosines = nearest(found, asked.features([image]), min(top, found.record.count))
    items = found.items()
    hits = [(items[row], float(cosine)) for row, cosine in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)]
    if as_json:
        print_json([{"cosine": cosine, "item": item} for item, cosine in hits])
        return
    lines = [(f"{cosine:.4f}", item.id, item.image or item.video or "", item.answer) for item, cosine in hits]
    results().print(table(("cosine", "id", "file", "says"), lines, right=(0,)))
