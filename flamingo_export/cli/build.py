"""`flamingo-export build`: a checkpoint or a size becomes a bundle."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from flamingo_export.cli.common_options import (
    AsJson,
    Overwrite,
    Parity,
    ParityChoice,
    SizeName,
    among,
)
from flamingo_export.cli.groups import Beside, Quantised

if TYPE_CHECKING:
    from flamingo_export.pipeline.plan import BuildPlan, Machine
    from flamingo_export.pipeline.run import BuildResult
    from flamingo_export.precision import StorageType


class Storage(StrEnum):
    """How weights are stored."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Compiler(StrEnum):
    """What runs the graphs: as they are, or compiled."""

    onnxruntime = "onnxruntime"
    tensorrt_rtx = "tensorrt-rtx"
    tensorrt = "tensorrt"


def build(
    size: SizeName = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="A checkpoint: a folder, or a file of tensors. Its family is recognised by its files.",
            show_default=False,
        ),
    ] = None,
    beside: Beside = Beside(),
    vision_module: Annotated[
        str | None,
        typer.Option(
            "--vision-module",
            metavar="PACKAGE.MODULE:CALLABLE",
            help='Python callable that returns the vision encoder, for checkpoints whose config has "type": "own".',
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle. Default flamingo-SIZE.bundle or CHECKPOINT.bundle.", show_default=False),
    ] = None,
    storage: Annotated[
        Storage | None,
        typer.Option(
            "--storage",
            help="How weights are stored. Default fp32 below a billion parameters, bf16 above.",
            show_default=False,
        ),
    ] = None,
    quantised: Quantised = Quantised(),
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Ranges of activations, by flamingo-export calibrate. Default for --fp8: found while building.",
            show_default=False,
        ),
    ] = None,
    uncalibrated: Annotated[
        bool, typer.Option("--uncalibrated", help="Quantise activations without knowing their ranges, which costs accuracy.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Seed of random weights, also for nano.", show_default=False),
    ] = None,
    backend: Annotated[
        Compiler,
        typer.Option(
            "--backend",
            help="onnxruntime: only graphs. tensorrt-rtx: engines too, on any machine. tensorrt: engines too, on the GPU host.",
        ),
    ] = Compiler.onnxruntime,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="smNN", help="GPU of the engines, such as sm89. Default this machine's.", show_default=False
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=2,
            help="Cache slots at most. Default what the model was made for, less for engines where the card has no room for it.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            min=1,
            help="Requests side by side in an engine. Default what fits in the card's memory, up to 64; 8 where it is not known.",
            show_default=False,
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            "--card",
            metavar="NAME|GB",
            help="What engines will run on, for the defaults of --max-length and --max-batch: H200, 48GB, 2xH100. Default this machine's GPU.",
            autocompletion=among("L4", "RTX4090", "L40S", "A100", "H100", "Thor", "H200", "B200"),
            show_default=False,
        ),
    ] = None,
    parts: Annotated[
        int,
        typer.Option(
            "--parts",
            min=1,
            help="Graphs that the decoder is cut into, run one after the other: engines of a large model build in less memory.",
        ),
    ] = 1,
    parity: ParityChoice = Parity.auto,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what would be written; exits with 1 if this machine has too little for it.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make a bundle: ONNX graphs, weights, tokenizer and how parity stands. Interrupted, the same command resumes.

    \b
    flamingo-export build --size nano --out nano.bundle
    flamingo-export build --size 3b --backend tensorrt-rtx --target sm89 --out 3b.bundle
    flamingo-export build --size 9b --fp8
    """
    source = beside.source(size, checkpoint, seed)
    if vision_module is not None and plan:
        raise typer.BadParameter("a plan needs no module", param_hint="--vision-module")
    if vision_module is not None and checkpoint is None:
        raise typer.BadParameter("goes with a checkpoint: add --checkpoint", param_hint="--vision-module")
    if target is not None and backend is Compiler.onnxruntime:
        raise typer.BadParameter("only engines have a target: add --backend tensorrt-rtx", param_hint="--target")
    if card is not None and backend is Compiler.onnxruntime:
        raise typer.BadParameter("only engines are for a card: add --backend", param_hint="--card")
    chosen = quantised.chosen()
    if calibration is not None and uncalibrated:
        raise typer.BadParameter("goes without --calibration", param_hint="--uncalibrated")
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.pipeline import plan as build_plan
    from flamingo_export.pipeline import run as pipeline
    from flamingo_export.pipeline.build_request import BuildRequest, default_out
    from flamingo_export.pipeline.card import read_card
    from flamingo_export.pipeline.work_folder import BuildPaths, in_the_way
    from flamingo_export.sources.choice import with_vision_encoder

    target_out = out or default_out(source, chosen)
    if vision_module is not None:
        source = with_vision_encoder(source, made_by(vision_module))
    stored: StorageType | None = storage.value if storage else None
    request = BuildRequest(
        source=source,
        out=target_out,
        storage=stored,
        policy=chosen,
        calibration=calibration,
        uncalibrated=uncalibrated,
        max_length=max_length,
        max_batch=max_batch,
        card=None if card is None else read_card(card),
        parity=parity.value,
        overwrite=overwrite,
        backend=backend.value,
        target=target,
        parts=parts,
    )
    if plan:
        found = build_plan.plan(request)
        machine = build_plan.this_machine(found)
        _print_plan(found, machine, in_the_way(BuildPaths(target_out), overwrite=overwrite), as_json)
        if not (machine.disk_suffices and machine.memory_suffices):
            raise typer.Exit(1)
        return
    with reported() as progress:
        result = pipeline.build(request, progress=progress)
    print_result(result, as_json)


def made_by(name: str) -> Any:
    """What the user's own callable returns. Raises typer.BadParameter if it cannot be found or called."""
    import importlib
    import sys

    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` has it: what lies in the current folder
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"{name!r} is not a callable that makes a module: {error}; expected PACKAGE.MODULE:CALLABLE",
            param_hint="--vision-module",
        ) from error
    finally:
        sys.path.remove("")


def print_result(result: BuildResult, as_json: bool) -> None:
    """What was published, and what a user should know about it."""
    from flamingo_export.cli.output import human_bytes, print_json

    if as_json:
        print_json({"bundle": result.path, "notes": result.notes, "manifest": result.manifest})
        return

    manifest = result.manifest
    total = sum(file.size for file in manifest.files)
    weights = {
        "random": f"random weights, seed {manifest.source.seed}",
        "checkpoint": "weights of the checkpoint",
        "live": "weights of the live model",
    }[manifest.source.kind]
    print(
        f"{result.path}: Flamingo {manifest.config.name}, {human_bytes(total)}, {weights}, stored in {manifest.precision.name}"
    )
    for engine in manifest.engines:
        print(
            f"{engine.file}: {human_bytes(engine.size)}, {engine.backend} {engine.tool_version} for {engine.target}, {engine.compute}"
        )
    for note in result.notes:
        print(f"note: {note}")
    if result.parity is not None:
        print(result.parity.summary)
    else:
        print(f"parity not run; {parity_hint(result)}")


def parity_hint(result: BuildResult) -> str:
    """The command that runs parity on a bundle that was built without it."""
    manifest, command = result.manifest, f"flamingo-export parity {shlex.quote(str(result.path))}"
    if any(record.path.startswith("golden/") for record in manifest.files):
        return f"golden values to compare with are in the bundle: {command}"
    found = "" if manifest.source.kind == "random" else " --against reference" if manifest.source.place else " --checkpoint DIR"
    return f"where PyTorch is installed: {command}{found}"


def missing_files(absent: Sequence[Path]) -> str:
    """Says that files are missing, and which."""
    names = ", ".join(path.name for path in absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
    return f"{len(absent)} of the files that a build needs are not in {absent[0].parent}: {names}. Fetch them before building"


def _print_plan(found: BuildPlan, machine: Machine, refused: str | None, as_json: bool) -> None:
    from flamingo_export.cli.output import human_bytes, print_json, results, table

    if as_json:
        print_json({**msgspec.structs.asdict(found), "machine": machine, "out_refused": refused})
        return
    rows = [(name, human_bytes(size)) for name, size in found.bytes_per_component.items()]
    rows.append(("all weights", human_bytes(found.weight_bytes)))
    title = f"{found.out}: Flamingo {found.config.name}, weights in {found.precision.name}"
    results().print(table(("component", "size"), rows, title=title, right=(1,)))
    _print_graphs(found)
    _print_steps(found)
    print(_bank(found))
    verdict = {True: "enough", False: "too little"}
    print(
        f"needs {human_bytes(found.disk_bytes)} of disk; {machine.folder} has {human_bytes(machine.disk_free)} free: "
        f"{verdict[machine.disk_suffices]}"
    )
    print(
        f"needs {human_bytes(machine.memory_needed)} of memory; {human_bytes(machine.memory_available)} are available: "
        f"{verdict[machine.memory_suffices]}"
    )
    if refused:
        print(refused)
    if found.absent:
        print(f"planned from config.json and the index: {missing_files(found.absent)}")


def _bank(found: BuildPlan) -> str:
    """What the media bank of a GPU holds."""
    from flamingo_export.cli.output import human_bytes

    bank = found.bank
    size = f"{human_bytes(bank.row_bytes)} each, {human_bytes(bank.rows * bank.row_bytes)} in all"
    if bank.rows_of_image == 1:
        return f"media bank: {bank.rows} images or videos, {size}"
    return f"media bank: {bank.rows} tiles, {size}: {bank.rows // bank.rows_of_image} images of {bank.rows_of_image} tiles"


def _print_steps(found: BuildPlan) -> None:
    """Memory, disk and time of each step, and how many GPUs of a kind hold the result."""
    from flamingo_export.cli.output import human_bytes, results, table

    rows = [
        (
            step.name,
            human_bytes(step.memory),
            human_bytes(step.disk) if step.disk else "",
            f"{max(1, round(step.seconds / 60))} min",
        )
        for step in found.steps
    ]
    columns = ("step", "memory", "disk", "time, two cores")
    results().print(table(columns, rows, title="steps, without parity", right=(1, 2, 3)))
    runs: list[tuple[str, ...]] = [
        (
            run.where,
            f"{run.needs.requests} of {run.needs.positions}",
            *(human_bytes(size) for size in (run.needs.weights, run.needs.cache, run.needs.bank, run.needs.work, run.total)),
        )
        for run in found.runs
    ]
    of_runs = ("on a", "requests of slots", "weights", "cache", "media bank", "work", "in all")
    results().print(table(of_runs, runs, title="memory to run it, about", right=(1, 2, 3, 4, 5, 6)))
    _print_cards(found)


def _print_cards(found: BuildPlan) -> None:
    """Memory by requests and lengths, and how many GPUs of a kind hold the result."""
    from flamingo_export.cli.output import human_bytes, results, table

    if found.note is not None:
        print(found.note)
    memory = [(str(each.rows), *map(human_bytes, each.bytes)) for each in found.memory]
    columns = ("requests", *(f"{length} slots" for length in found.lengths))
    title = "memory on GPUs, were the engines built for so many requests of so many cache slots"
    results().print(table(columns, memory, title=title, right=range(len(columns))))
    limits, parts = found.limits, sum(graph.layers is not None for graph in found.graphs)
    cards = [
        (
            card.name,
            human_bytes(card.memory),
            _gpus(parts, card.count, card.parts),
            ""
            if card.count is not None and card.count == card.least
            else _gpus(parts, card.least, card.least_parts, card.rows),
        )
        for card in found.cards
    ]
    whole = f"{limits.batch} requests" if limits.batch > 1 else "1 request"
    columns = ("card", "memory", f"GPUs for {whole} of {limits.max_length} slots", "fewest, and what they hold")
    results().print(
        table(columns, cards, title="GPUs that would hold it (--device cuda:0,cuda:1,... names several)", right=(1,))
    )
    several = [card for card in found.cards if card.count is not None and card.count > 1]
    if several:
        shared = min(several, key=lambda card: card.count or 0)
        way = "; ".join(f"cuda:{gpu} {', '.join(names)}" for gpu, names in enumerate(shared.graphs))
        print(f"on {shared.count} of {shared.name}: {way}")


def _gpus(asked: int, count: int | None, parts: int | None, rows: int = 0) -> str:
    """asked: parts that the decoder is to be in."""
    if count is None:
        return f"not in {asked} parts" if asked > 1 else "more than 16"
    cut = "" if parts == 1 else f" with --parts {parts}"
    held = f": {rows} requests" if rows > 1 else ": 1 request" if rows else ""
    return f"{count}{cut}{held}"


def _print_graphs(found: BuildPlan) -> None:
    """What each graph reads and, where engines are built, what that takes; nothing where neither says more than the components do."""
    from flamingo_export.cli.output import human_bytes, results, table

    compiled = any(graph.engine_memory is not None for graph in found.graphs)
    if not compiled and not any(graph.name == "decoder.0" for graph in found.graphs):
        return
    rows = []
    for graph in found.graphs:
        layers = f"{graph.layers[0]} to {graph.layers[1] - 1}" if graph.layers is not None else ""
        row = [graph.name, layers, human_bytes(graph.weight_bytes)]
        if graph.engine_memory is not None and graph.engine_seconds is not None:
            row += [human_bytes(graph.engine_memory), f"{graph.engine_seconds:.0f} s"]
        rows.append(tuple(row))
    columns = (
        "graph",
        "LM layers",
        "weights it reads",
        *(("memory to build its engine", "time, one core") if compiled else ()),
    )
    results().print(table(columns, rows, title="graphs", right=tuple(range(2, len(columns)))))
