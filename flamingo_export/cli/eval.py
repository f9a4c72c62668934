"""`flamingo-export eval`: few-shot evaluation of a bundle on a task, beside another model where one is named."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_export.cli.common_options import AsJson, Fps, Frames
from flamingo_export.cli.groups import Running

if TYPE_CHECKING:
    from flamingo_export.evaluation.compare import Comparison
    from flamingo_export.evaluation.protocol import EvaluatedModel
    from flamingo_export.evaluation.results import Cell, Results


def eval_(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A bundle, or an IDEFICS checkpoint for transformers; with --compare, folders of results.", show_default=False
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="A server of `serve` in place of a bundle: http://127.0.0.1:8000/v1.",
            show_default=False,
        ),
    ] = None,
    served: Annotated[str | None, typer.Option("--model", help="Which of the server's models.", show_default=False)] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="The server's key, on its first line.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="A task (--list names them), or a file of your own: mine.toml.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FOLDER|FILE", help="The task's published files; items of a task of your own.", show_default=False
        ),
    ] = None,
    support: Annotated[
        Path | None,
        typer.Option("--support", metavar="FOLDER|FILE", help="Where examples come from, if elsewhere.", show_default=False),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split to ask. Default: the task's.", show_default=False)] = None,
    shots: Annotated[
        str, typer.Option("--shots", help="Numbers of examples, separated by commas.", metavar="N,N")
    ] = "0,4,8,16,32",
    select: Annotated[str, typer.Option("--select", help="Examples: random, rices (by likeness), shared, listed.")] = "random",
    index: Annotated[
        Path | None, typer.Option("--index", metavar="FOLDER", help="Features of the examples, by `index`.", show_default=False)
    ] = None,
    ensemble: Annotated[int, typer.Option("--ensemble", min=1, help="Orders of the examples to average over.")] = 1,
    zero_shot: Annotated[
        str, typer.Option("--zero-shot", help="With 0 shots: texts (two without images) or nothing.")
    ] = "texts",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Items to ask. Default all.", show_default=False)] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of items, examples and intervals.")] = 0,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of open answers; 1 is greedy.")] = 3,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Tokens of an answer. Default: the task's.", show_default=False),
    ] = None,
    frames: Frames = None,
    fps: Fps = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts that run together.")] = 8,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="PATH",
            help="Ask this one too, pair by pair: a bundle, an IDEFICS checkpoint, or the results of an earlier run.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Predictions, tables, page. Run again to resume.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove what another run left there.")] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out items whose media are gone, and count them.")
    ] = False,
    compared: Annotated[bool, typer.Option("--compare", help="Lay finished runs side by side.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the tasks and the files that each reads.")] = False,
    run: Running = Running(),
    as_json: AsJson = False,
) -> None:
    """Score a bundle on a benchmark with 0 to 32 examples, as the paper does.

    \b
    flamingo-export eval my.bundle --task vqav2 --data vqav2/ --shots 0,4,8 --select rices --limit 500 --out results/
    flamingo-export eval fp8.bundle --against my.bundle --task coco --data coco/ --out cost/
    flamingo-export eval --compare results/ cost/
    """
    from flamingo_export.cli.output import print_json
    from flamingo_export.cli.progress_bars import reported

    places = list(targets or ())
    if listed:
        _print_tasks(as_json)
        return
    if compared:
        from flamingo_export.evaluation.compare import compare

        found = compare(places)
        if as_json:
            print_json(found)
        else:
            _print_comparison(found)
        return
    if server is not None and places:
        raise typer.BadParameter(f"--server has the model, so {places[0]} is one too many", param_hint="--server")
    for option, given in {"--model": served, "--api-key-file": api_key_file}.items():
        if given is not None and server is None:
            raise typer.BadParameter("goes with a server: add --server", param_hint=option)
    if len(places) != 1 and server is None:
        raise typer.BadParameter(
            f"one bundle is evaluated, {len(places)} were given; --against names a second one", param_hint="TARGETS"
        )
    if task is None:
        raise typer.BadParameter("say what to ask: --task vqav2; --list names the tasks", param_hint="--task")
    from flamingo_export.evaluation.run import evaluate
    from flamingo_export.evaluation.settings import Settings
    from flamingo_export.evaluation.tasks import task_of

    settings = Settings(
        shots=_numbers(shots),
        select=select,  # type: ignore[arg-type]  # checked with the others
        ensemble=ensemble,
        zero_shot=zero_shot,
        limit=limit,
        seed=seed,
        beams=beams,
        max_new_tokens=max_new_tokens,
        fps=fps,
        num_frames=frames,
    )
    chosen = task_of(task)
    settings.check(chosen)
    with ExitStack() as stack:

        def opened(path: Path) -> EvaluatedModel:
            return _model(stack, path, run, batch_size=batch_size)

        model = opened(places[0]) if server is None else _behind(server, served, api_key_file, batch_size)
        other = None if against is None else against if _is_run(against) else opened(against)
        with reported() as progress:
            results = evaluate(
                model,
                chosen,
                data=data,
                support=support,
                split=split,
                settings=settings,
                against=other,
                index=index,
                out=out,
                overwrite=overwrite,
                skip_missing=skip_missing,
                progress=progress,
            )
    if as_json:
        print_json(results)
    else:
        _print_results(results, out)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}, expected numbers separated by commas, such as 0,4,8", param_hint="--shots"
        ) from None


def _model(stack: ExitStack, path: Path, run: Running, *, batch_size: int) -> EvaluatedModel:
    """A bundle, or an IDEFICS checkpoint by transformers."""

    if (path / "config.json").is_file() and not (path / "manifest.json").is_file():
        from flamingo_export.evaluation.transformers_idefics import TransformersIdefics

        return TransformersIdefics(path)
    from flamingo_export.evaluation.bundles import BundleModel

    return BundleModel(stack.enter_context(run.opened(path)), batch_size=batch_size)


def _behind(url: str, name: str | None, key_file: Path | None, parallel: int) -> EvaluatedModel:
    """A server's model."""
    from flamingo_export.evaluation.reading import text_of
    from flamingo_export.evaluation.server import ServerModel

    key = text_of(key_file, "the server's key").split("\n")[0].strip() if key_file is not None else None
    return ServerModel(url, model=name, api_key=key, parallel=parallel)


def _is_run(path: Path) -> bool:
    return (path / "predictions.jsonl").is_file()


def _print_results(found: Results, out: Path | None) -> None:
    from flamingo_export.cli.output import remarks, results, table
    from flamingo_export.evaluation.evaluation_page import score_text, signed_text

    columns = ["shots", "kind", "items", found.metric, "95 % interval"]
    details = sorted({name for cell in found.cells for name in cell.details})
    columns += details
    if found.against is not None:
        columns += [found.against.get("name", "against"), "difference", "95 % interval", "changed"]

    def row(cell: Cell) -> list[str]:
        cells = [
            str(cell.shots),
            cell.group,
            str(cell.items),
            score_text(cell.value),
            f"{score_text(cell.low)} to {score_text(cell.high)}",
            *(score_text(cell.details.get(name)) for name in details),
        ]
        if found.against is not None:
            cells += [
                score_text(cell.against),
                signed_text(cell.difference),
                f"{signed_text(cell.difference_low)} to {signed_text(cell.difference_high)}",
                str(cell.changed),
            ]
        return cells

    model = found.model
    title = f"{found.title} ({found.split}): {model.get('name')}, {model.get('precision')}, seed {found.settings.seed}"
    right = [0, *range(2, len(columns))]
    results().print(table(columns, [row(cell) for cell in found.cells], title=title, right=right))
    if found.paper is not None:
        rows = [
            ("4 shots, 3B / 9B / 80B", " / ".join(value or "–" for value in found.paper.at_4)),
            ("80B, 32 shots", found.paper.at_32 or "–"),
            ("80B fine-tuned", found.paper.fine_tuned or "–"),
            ("state of the art then, fine-tuned", found.paper.best_then or "–"),
        ]
        results().print(table(("the paper (arXiv 2204.14198)", found.metric), rows, title=f"on {found.paper_split}"))
    for name, count in found.left_out.items():
        results().print(f"left out: {count} {name}")
    if out is not None:
        remarks().print(f"{out}: predictions, tables and report", style="dim")


def _print_comparison(found: Comparison) -> None:
    from flamingo_export.cli.output import results, table
    from flamingo_export.evaluation.evaluation_page import interval_text, signed_text

    columns = ["shots", "kind"]
    for place, name in enumerate(found.runs):
        columns.append(f"{name} ({found.results[place].model.get('name')})")
        if place:
            columns.append("from the first, same items")
    rows = []
    for each in found.rows:
        cells = [str(each.shots), each.group]
        for place, cell in enumerate(each.cells):
            cells.append("–" if cell is None else interval_text(cell))
            if place:
                apart = each.differences[place]
                cells.append(
                    "–"
                    if apart is None
                    else f"{signed_text(apart[0])} [{signed_text(apart[1])}, {signed_text(apart[2])}] of {each.shared_items[place]}"
                )
        rows.append(cells)
    first = found.results[0]
    results().print(table(columns, rows, title=f"{first.title}: {first.metric}", right=range(2, len(columns))))


def _print_tasks(as_json: bool) -> None:
    from flamingo_export.cli.output import print_json, results, table
    from flamingo_export.evaluation.metrics.registry import METRICS
    from flamingo_export.evaluation.tasks import NAMES, task_of

    tasks = [task_of(name) for name in NAMES]
    if as_json:
        fields = ("name", "title", "mode", "metric", "split", "paper_split", "media", "files", "source")
        print_json([{name: getattr(task, name) for name in fields} for task in tasks])
        return
    rows = [(task.name, METRICS[task.metric].title, task.mode, task.split, task.files) for task in tasks]
    results().print(table(("task", "metric", "answers", "split", "files"), rows))
