"""`flamingo-export index`: features of examples on the disk, for retrieval; and which of two indices' pictures are too alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.common_options import AsJson
from flamingo_export.cli.groups import Running

DUPLICATE = 0.98


def index(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle, whose vision encoder is used.", show_default=False)] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE|FOLDER", help="A file of shots (docs/prompts.md), or a task's folder.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Whose files --data is: its examples are indexed.", show_default=False)
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Split of the task. Default: its examples.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="The index. Run again to resume.", show_default=False)
    ] = None,
    dedup: Annotated[
        list[Path] | None,
        typer.Option(
            "--dedup", metavar="INDEX", help="Given twice: list pairs of the two that are too alike.", show_default=False
        ),
    ] = None,
    above: Annotated[float, typer.Option("--above", min=0.0, max=1.0, help="Cosine from which a pair is listed.")] = DUPLICATE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index of something else.")] = False,
    run: Running = Running(),
    as_json: AsJson = False,
) -> None:
    """Encode examples once, to retrieve the most similar ones later (RICES).

    \b
    flamingo-export index my.bundle --data train.jsonl --out index/
    flamingo-export index my.bundle --task vqav2 --data vqav2/ --out index/
    flamingo-export index --dedup train.index/ --dedup test.index/ --above 0.98
    """
    if dedup:
        _print_pairs(dedup, above, as_json)
        return
    if bundle is None or data is None or out is None:
        raise typer.BadParameter(
            "an index is made of a bundle's features: give the bundle, --data and --out", param_hint="BUNDLE"
        )
    from flamingo_export.cli.output import human_bytes, print_json, results
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.evaluation.bundles import BundleModel
    from flamingo_export.evaluation.index.index_entries import examples_of
    from flamingo_export.evaluation.index.similarity import index_of

    examples = examples_of(data, task, split)
    with run.opened(bundle) as model, reported() as progress:
        made = index_of(BundleModel(model), examples, out, overwrite=overwrite, progress=progress)
    record = made.record
    if as_json:
        print_json({"index": str(out), "count": record.count, "width": record.width, "features": record.features})
        return
    size = sum(path.stat().st_size for path in out.iterdir())
    results().print(f"{out}: {record.count} examples, {record.width} wide, {human_bytes(size)}; {record.features}")


def _print_pairs(folders: list[Path], above: float, as_json: bool) -> None:
    from flamingo_export.cli.output import print_json, results, table
    from flamingo_export.evaluation.index.exact_search import pairs_alike
    from flamingo_export.evaluation.index.store import Index

    if len(folders) != 2:
        raise typer.BadParameter(
            f"two indices are compared, {len(folders)} were given: --dedup a/ --dedup b/", param_hint="--dedup"
        )
    one, other = (Index(folder) for folder in folders)
    first, second = one.items(), other.items()
    pairs = [(first[row], second[column], cosine) for row, column, cosine in pairs_alike(one, other, above)]
    if as_json:
        print_json([{"first": mine.id, "second": theirs.id, "cosine": cosine} for mine, theirs, cosine in pairs])
        return
    rows = [(mine.id, theirs.id, f"{cosine:.4f}") for mine, theirs, cosine in pairs]
    results().print(table((str(folders[0]), str(folders[1]), "cosine"), rows, right=(2,)))
    results().print(f"{len(pairs)} pairs from {above:g} on")
