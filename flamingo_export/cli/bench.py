"""`flamingo-export bench`: a bundle's speed on this machine, on made-up images and tokens."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from flamingo_export.cli.common_options import AsJson
from flamingo_export.cli.groups import Running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flamingo_export.deploy.capacity.costs import StepCosts
    from flamingo_export.runtime.model import Model
    from flamingo_export.runtime.request import Request
    from flamingo_export.runtime.timings import Timings
    from flamingo_reference.config import ModelConfig

_QUESTION_TOKENS = 16


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One setting: medians over the repetitions, in seconds. `step` is None if every text ended at its first token."""

    case: str
    beams: int
    media_encoding: float
    prefill: float
    first_token: float
    step: float | None
    reused_tokens: int
    reused_media: int


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """A step of `requests` requests side by side of `beams` branches each: its seconds, and new tokens of all of them per second."""

    requests: int
    beams: int
    slots: int
    step: float
    tokens_per_second: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, where and on what."""

    bundle: str
    model: str
    backend: str
    decoder_parts: int
    cores: int
    images: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    load_seconds: float
    rows: list[Row]
    grid: Any = None
    """With --grid: `StepCosts`, what `capacity` reckons with."""
    batches: list[BatchRow] | None = None
    """With --batch."""


def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", show_default=False)],
    beams: Annotated[int, typer.Option("--beams", min=2, help="Beams to compare with one.")] = 3,
    images: Annotated[int, typer.Option("--images", min=1, help="Images in the prompt.")] = 4,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens", min=1, help="Tokens of the prompt. Default 256, or half of the cache.", show_default=False
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate at most.")] = 24,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Repetitions; medians are shown.")] = 5,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Also measure what steps cost by rows, beams and length, for `capacity`."),
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N,N,...",
            help="Also measure steps of so many requests side by side, as 1,8,64.",
            show_default=False,
        ),
    ] = None,
    run: Running = Running(),
    as_json: AsJson = False,
) -> None:
    """Measure time to first token and time per step, with one beam and several, and what a second question about the same images costs.

    \b
    flamingo-export bench nano.bundle
    flamingo-export bench nano.bundle --batch 1,8,64 --beams 3
    flamingo-export bench nano.bundle --grid --json > bench.json; flamingo-export capacity --bench bench.json --rate 200 --p95 1.5
    """
    from flamingo_export.cli.output import print_json, waiting
    from flamingo_export.machine import usable_cores

    counts = _counts(batch)
    started = time.perf_counter()
    with run.opened(bundle, rows=max(counts, default=None)) as model:
        loaded = time.perf_counter() - started
        length = prompt_tokens or min(256, model.manifest.limits.max_length // 2)
        if length < images + _QUESTION_TOKENS + 1:
            raise typer.BadParameter(
                f"{length} tokens hold no {images} images and a question; at least {images + _QUESTION_TOKENS + 1}",
                param_hint="--prompt-tokens",
            )
        with waiting("measuring"):
            rows = measure(model, beams=beams, images=images, prompt_tokens=length, new_tokens=new_tokens, repeat=repeat)
            costs = step_costs(model, beams=beams, slots=length + beams * new_tokens, repeat=repeat) if grid else None
            batches = batch_rows(model, counts, beams=beams, slots=length + beams * new_tokens, repeat=repeat)
        result = Result(
            bundle=str(bundle),
            model=model.config.name,
            backend=model.backend.name,
            decoder_parts=len(model.manifest.decoder_graphs()),
            cores=usable_cores(),
            images=images,
            prompt_tokens=length,
            new_tokens=new_tokens,
            repetitions=repeat,
            load_seconds=loaded,
            rows=rows,
            grid=costs,
            batches=batches or None,
        )
    if as_json:
        print_json(result)
    else:
        _print(result)


def step_costs(model: Model, *, beams: int, slots: int, repeat: int) -> StepCosts:
    """What the engine's actions cost with as many rows as it has, one beam and `beams`, up to `slots` cache slots."""
    from flamingo_export.deploy.capacity.grid import GridMeter

    return GridMeter(model, widths=(1, beams), rows=model.engine.rows, repeat=repeat).measure(slots)


def batch_rows(model: Model, counts: Sequence[int], *, beams: int, slots: int, repeat: int) -> list[BatchRow]:
    """Steps of each number of requests side by side, with one beam and with `beams`, about `slots` cache slots of each in use.

    Raises InputError where the bundle cannot hold so many.
    """
    from flamingo_export.deploy.capacity.grid import GridMeter

    if not counts:
        return []
    found = GridMeter(model, widths=(1, beams), rows=counts, repeat=repeat).steps(slots)
    slots = min(slots, model.manifest.limits.max_length)
    return [
        BatchRow(requests=rows, beams=width, slots=slots, step=seconds, tokens_per_second=rows / seconds)
        for (rows, width), seconds in found.items()
    ]


def _counts(text: str | None) -> list[int]:
    """`1,8,64`. Raises typer.BadParameter."""
    if text is None:
        return []
    try:
        found = sorted({int(each) for each in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise typer.BadParameter(f"{text} is not a list of numbers of requests, as 1,8,64", param_hint="--batch")
    return found


def measure(model: Model, *, beams: int, images: int, prompt_tokens: int, new_tokens: int, repeat: int) -> list[Row]:
    """One beam and `beams` beams on new images, each followed by a second question about the same images.

    Every repetition shows images and tokens that were never shown before, so nothing is reused but in the second question.
    """
    rows: list[Row] = []
    for width in (1, beams):
        first: list[Timings] = []
        second: list[Timings] = []
        for repetition in range(repeat + 1):
            requests = make_requests(model.config, images=images, prompt_tokens=prompt_tokens, seed=1000 * width + repetition)
            found = [model.generate(request, beams=width, max_new_tokens=new_tokens).timings for request in requests]
            if repetition:  # the first one warms up: the cache grows, the backend takes its memory
                first.append(found[0])
                second.append(found[1])
        rows += [_row("new images", width, first), _row("second question", width, second)]
    return rows


def make_requests(config: ModelConfig, *, images: int, prompt_tokens: int, seed: int) -> tuple[Request, Request]:
    """Two prompts of random tokens about the same random images, alike but for the question at their end."""
    import numpy as np

    from flamingo_export.runtime.request import Request

    rng = np.random.default_rng(seed)
    side = config.vision.image_size
    pictures = list(rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8))
    ids = config.tokens
    special = {ids.pad, ids.bos, ids.eoc, ids.image}
    words = np.array([token for token in range(config.language_model.vocab_size) if token not in special])

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.choice(words, count)]

    spread = np.diff(np.linspace(0, prompt_tokens - 1 - images - _QUESTION_TOKENS, images + 1).astype(int))
    shared = [ids.bos]
    for count in spread:
        shared += [ids.image, *text(int(count))]
    one, other = (Request(prompt=[*shared, *text(_QUESTION_TOKENS)], media=pictures) for _ in range(2))
    return one, other


def _row(case: str, beams: int, timings: Sequence[Timings]) -> Row:
    steps = [seconds for each in timings for seconds in each.steps]
    return Row(
        case=case,
        beams=beams,
        media_encoding=median(each.media for each in timings),
        prefill=median(each.prefill for each in timings),
        first_token=median(each.first_token for each in timings),
        step=median(steps) if steps else None,
        reused_tokens=min(each.reused_tokens for each in timings),
        reused_media=min(each.media_reused for each in timings),
    )


def _print(result: Result) -> None:
    from rich.markup import escape

    from flamingo_export.cli.output import results, table

    console = results()
    parts = f", decoder in {result.decoder_parts} parts" if result.decoder_parts > 1 else ""
    console.print(
        f"[bold]{escape(result.bundle)}[/bold] ({result.model}{parts}) on {result.backend}, {result.cores} cores, "
        f"loaded in {result.load_seconds:.2f} s\n"
        f"prompt of {result.prompt_tokens} tokens with {result.images} images, up to {result.new_tokens} new tokens, "
        f"medians of {result.repetitions}"
    )
    rows = [
        (
            row.case,
            str(row.beams),
            f"{1000 * row.media_encoding:.1f}",
            f"{1000 * row.prefill:.1f}",
            f"{1000 * row.first_token:.1f}",
            "-" if row.step is None else f"{1000 * row.step:.2f}",
            f"{row.reused_tokens} tokens, {row.reused_media} images",
        )
        for row in result.rows
    ]
    columns = ("prompt", "beams", "images, ms", "prefill, ms", "first token, ms", "a step, ms", "reused")
    console.print(table(columns, rows, right=(1, 2, 3, 4, 5)))
    if result.batches:
        slots = result.batches[0].slots
        side_by_side = [
            (str(row.requests), str(row.beams), f"{1000 * row.step:.2f}", f"{row.tokens_per_second:.1f}")
            for row in result.batches
        ]
        title = f"requests side by side, up to {slots} cache slots each"
        of_batches = ("requests", "beams", "a step, ms", "new tokens per second, of all")
        console.print(table(of_batches, side_by_side, title=title, right=range(4)))
    if result.grid is not None:
        _print_grid(result.grid)


def _print_grid(costs: StepCosts) -> None:
    from flamingo_export.cli.output import results, table

    rows = [
        (str(count), *(f"{1000 * costs.decode[place][width][-1]:.2f}" for width in range(len(costs.widths))))
        for place, count in enumerate(costs.rows)
    ]
    columns = ("rows", *(f"{width} beams, ms" if width > 1 else "1 beam, ms" for width in costs.widths))
    results().print(table(columns, rows, title=f"a step with {costs.slots[-1]} cache slots", right=range(len(columns))))
    chunks = ", ".join(f"{size}: {1000 * costs.prefill[place][-1]:.1f} ms" for place, size in enumerate(costs.chunks))
    frames = ", ".join(f"{size}: {1000 * costs.encode[place]:.1f} ms" for place, size in enumerate(costs.frames))
    results().print(
        f"prompt tokens at once: {chunks}\nimages at once: {frames}; reading one: {1000 * costs.prepare_image:.1f} ms"
    )
