"""`flamingo-export capacity`: replicas, GPUs and cost for a load, by simulation of the real scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flamingo_export.cli.common_options import AsJson, among

if TYPE_CHECKING:
    from flamingo_export.deploy.capacity.costs import Benched
    from flamingo_export.deploy.capacity.plan import Plan


def capacity(
    bench: Annotated[
        Path, typer.Option("--bench", metavar="FILE", help="What `bench --json --grid` wrote.", show_default=False)
    ],
    rate: Annotated[
        list[float], typer.Option("--rate", help="Requests a second, on average; repeat for more rows.", show_default=False)
    ],
    p95: Annotated[
        float, typer.Option("--p95", metavar="SECONDS", help="95 of 100 answers are there by then.", show_default=False)
    ],
    arrivals: Annotated[
        str,
        typer.Option(
            "--arrivals", help="poisson, bursts (8 at once) or day.", autocompletion=among("poisson", "bursts", "day")
        ),
    ] = "poisson",
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="N|LOW:HIGH", help="Tokens of a prompt, image tags among them.")
    ] = "256",
    new_tokens: Annotated[str, typer.Option("--new-tokens", metavar="N|LOW:HIGH", help="Tokens of an answer.")] = "32",
    images: Annotated[int, typer.Option("--images", min=0, help="Images of a request.")] = 1,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of a request.")] = 1,
    shared_prompt: Annotated[
        int, typer.Option("--shared-prompt", min=0, help="Tokens that all prompts begin with: shots, say.")
    ] = 0,
    shared_images: Annotated[int, typer.Option("--shared-images", min=0, help="Images within that beginning.")] = 0,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows of an engine. Default those of the benchmark.", show_default=False)
    ] = None,
    max_queue: Annotated[int, typer.Option("--max-queue", min=0, help="Requests that wait beside them.")] = 64,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Of a replica and hour, in any currency.", show_default=False)
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus", min=0, help="GPUs of a replica, 0.5 say. Default 1 where one was benchmarked.", show_default=False
        ),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=100, help="Requests that are simulated on a replica.")] = 600,
    seed: Annotated[int, typer.Option("--seed", help="Of the arrivals and the requests.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Reckon how many replicas carry a load, and what they cost: the engine's own scheduler, with step costs that were measured.

    \b
    flamingo-export bench nano.bundle --json --grid > bench.json
    flamingo-export capacity --bench bench.json --rate 1 --rate 200 --p95 1.5 --price 0.40
    """
    import math

    from flamingo_export.backends.registry import COMPILERS
    from flamingo_export.cli.output import print_json, waiting
    from flamingo_export.deploy.capacity.costs import read_bench
    from flamingo_export.deploy.capacity.load import PATTERNS, Load
    from flamingo_export.deploy.capacity.plan import Fleet, Planner

    if arrivals not in PATTERNS:
        raise typer.BadParameter(f"{arrivals!r} is not one of {', '.join(PATTERNS)}", param_hint="--arrivals")
    for each in (*rate, p95):
        if not (math.isfinite(each) and each > 0):
            raise typer.BadParameter(f"{each} is not a positive number", param_hint="--rate, --p95")
    head, costs = read_bench(bench)
    load = Load(
        prompt=_range(prompt, "--prompt"),
        new_tokens=_range(new_tokens, "--new-tokens"),
        images=images,
        shared_prompt=shared_prompt,
        shared_images=shared_images,
        beams=beams,
    )
    on_gpu = head.backend in COMPILERS or costs.asynchronous
    fleet = Fleet(
        rows=rows or costs.rows[-1],
        queue=max_queue,
        gpus=gpus if gpus is not None else float(on_gpu),
        price=price,
        count=requests,
        seed=seed,
    )
    with waiting("simulating"):
        planner = Planner(costs, load, arrivals, p95, fleet)
        plans = [planner.plan(each) for each in sorted(rate)]
    if as_json:
        print_json(plans)
    else:
        _print(head, plans, p95, arrivals)


def _range(text: str, option: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    if not (low.isdecimal() and (high.isdecimal() or not colon)):
        raise typer.BadParameter(f"{text!r} is not a number or LOW:HIGH", param_hint=option)
    return int(low), int(high or low)


def _print(head: Benched, plans: list[Plan], p95: float, arrivals: str) -> None:
    from rich.markup import escape

    from flamingo_export.cli.output import results, table

    console = results()
    console.print(
        f"[bold]{escape(head.bundle)}[/bold] ({escape(head.model)}) on {head.backend}, {head.cores} cores; arrivals: {arrivals}; "
        f"95 of 100 answers within {p95:g} s"
    )
    rows = [
        (
            f"{plan.rate:g}",
            str(plan.replicas),
            f"{plan.gpus:g}",
            f"{100 * plan.busy:.0f} %",
            f"{plan.running:.1f} of {plan.rows}",
            f"{plan.first_token_p50:.2f} / {plan.first_token_p95:.2f}",
            f"{plan.answer_p50:.2f} / {plan.answer_p95:.2f} / {plan.answer_p99:.2f}",
            "-" if plan.price_an_hour is None else f"{plan.price_an_hour:.2f}",
            "-" if plan.price_per_thousand is None else f"{plan.price_per_thousand:.4f}",
            f"{plan.limit} ({100 * getattr(plan, plan.limit):.0f} %)" if plan.limit != "rows" else "rows",
        )
        for plan in plans
    ]
    columns = (
        "a second", "replicas", "GPUs", "busy", "running", "first token, s: p50 / p95", "answer, s: p50 / p95 / p99", "an hour",
        "per 1000", "limit",
    )  # fmt: skip
    console.print(table(columns, rows, right=range(9)))
    for plan in plans:
        if plan.preparing_cores >= 0.1:
            console.print(f"at {plan.rate:g} a second {plan.preparing_cores:.1f} cores decode images")
    if arrivals == "day":
        for plan in plans:
            console.print(
                f"at {plan.rate:g} a second: {plan.replica_hours} replica hours a day where replicas follow the load, "
                f"{24 * plan.replicas} where they do not; prices are of the former"
            )
