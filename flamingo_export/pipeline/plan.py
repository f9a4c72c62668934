"""What a build would write and take, before anything is written: bytes, memory and time of each step, and which GPUs hold the result.

Times are those of two cores of a 2.5 GHz server, measured (docs/precision.md); they are for telling minutes from hours.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from flamingo_export import estimates
from flamingo_export.backends.placement import MOST_GPUS, Cuts, Placement, place
from flamingo_export.backends.registry import compiler_of
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.estimates import ENGINE_RATIO
from flamingo_export.machine import available_memory
from flamingo_export.pipeline.build_request import BuildRequest, resolve_limits, resolve_precision
from flamingo_export.pipeline.card import CARDS, Card, cuts
from flamingo_export.pipeline.write_weights import LARGE, THREADS
from flamingo_export.precision import Precision
from flamingo_export.quantize.policies import check_policy
from flamingo_export.sources import CheckpointSource, open_source
from flamingo_export.sources.choice import CheckpointFolder
from flamingo_export.weights import WeightIndex, bundle_weights, stored_bytes
from flamingo_export.weights.decoder_cuts import graph_bytes, graph_records
from flamingo_reference.config import ModelConfig

# Graphs, tokenizer, golden values and reports beside the weights.
OTHER_FILES_BYTES = 64_000_000
# Seconds for a number of a weight, on two cores: drawn or read, hashed and written; and on top of it to be quantised.
_WEIGHT_SECONDS = 18e-9
_QUANTISING_SECONDS = {"fp8": 7e-9, "int8": 2.2e-9, "int4": 16e-9}
# Of calibration on the shipped set, for a number of a weight: read, and multiplied with 512 tokens.
_CALIBRATING_SECONDS = 60e-9
SHORT_REQUEST = 512
"""Slots of a request with a short prompt."""
ROWS, LENGTHS = (1, 8, 64), (1024, 2048, 4096)
"""Of the table of memory, beside the limits' own."""


class PlannedGraph(msgspec.Struct, frozen=True, kw_only=True):
    """A graph of the bundle: for (parts of) the decoder its LM layers [start, stop); bytes of the weights that it reads; bytes of memory and
    seconds of one core that its engine takes to build, None where none is."""

    name: str
    layers: tuple[int, int] | None
    weight_bytes: int
    engine_memory: int | None = None
    engine_seconds: float | None = None


class PlannedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step of the build: seconds on two cores, bytes of memory at its peak, bytes that it adds to the disk."""

    name: str
    seconds: float
    memory: int
    disk: int


class PlannedBank(msgspec.Struct, frozen=True, kw_only=True):
    """The media bank: rows, how many an image takes at most (its tiles), bytes of a row on a GPU."""

    rows: int
    rows_of_image: int
    row_bytes: int


class PlannedRun(msgspec.Struct, frozen=True, kw_only=True):
    """What running the bundle takes: where, and bytes of weights, cache, media bank and work for so many requests of so many slots."""

    where: Literal["CPU", "GPU"]
    needs: estimates.Needs
    total: int


class PlannedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on GPUs of engines for so many requests side by side, for each of the plan's lengths: they, caches, bank, intermediate results."""

    rows: int
    bytes: tuple[int, ...]


class PlannedCard(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of GPU.

    count, parts: the fewest of them, and parts of the decoder, that hold engines, bank and caches of all requests of the limits; None where 16
    do not. least, least_parts, rows: the fewest that hold one request, and how many they hold.
    graphs: what each of `count` GPUs would run.
    """

    name: str
    memory: int
    count: int | None
    parts: int | None
    least: int | None
    least_parts: int | None
    rows: int
    graphs: tuple[tuple[str, ...], ...] = ()


class BuildPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a build would write. bytes_per_component: the bundle's weights, by the component they belong to. absent: files that a build needs
    and an index names, which are not there."""

    config: ModelConfig
    precision: Precision
    out: Path
    bytes_per_component: dict[str, int]
    weight_bytes: int
    graphs: tuple[PlannedGraph, ...]
    steps: tuple[PlannedStep, ...]
    device_bytes: int
    """Needed on a GPU: engines, caches of the limits' batch and length, media bank, intermediate results."""
    bank: PlannedBank
    runs: tuple[PlannedRun, ...]
    """On a CPU: a short request about an image; a long one, and several, with a full bank. With engines on a GPU: one request, and all."""
    limits: ShapeLimits
    lengths: tuple[int, ...]
    memory: tuple[PlannedMemory, ...]
    cards: tuple[PlannedCard, ...]
    disk_bytes: int
    """Needed at `out`'s disk, everything included, were the build to start anew."""
    absent: tuple[Path, ...] = ()
    note: str | None = None
    """About the limits that were chosen for a card."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this machine can carry out a plan. folder: on the disk that is written to; bytes that are free there, and of memory: needed at
    the step that takes most, and available now."""

    folder: Path
    disk_free: int
    memory_needed: int
    memory_available: int
    disk_suffices: bool
    memory_suffices: bool


def this_machine(found: BuildPlan) -> Machine:
    """What this machine has for a plan. Parity, whose needs follow from what is compared, is not part of it."""
    folder = next(parent for parent in found.out.resolve().parents if parent.exists())
    free, available = shutil.disk_usage(folder).free, available_memory()
    needed = max(step.memory for step in found.steps)
    return Machine(
        folder=folder,
        disk_free=free,
        memory_needed=needed,
        memory_available=available,
        disk_suffices=found.disk_bytes <= free,
        memory_suffices=needed <= available,
    )


def plan(request: BuildRequest) -> BuildPlan:
    """What `build` would write, without writing. Raises CheckpointError, UnsupportedModel or, for parts and policies, BuildError as it would,
    but not for shards that are missing: config.json and an index suffice."""
    absent: tuple[Path, ...] = ()
    source_bytes: dict[str, int] | None = None
    if isinstance(request.source, CheckpointFolder):
        checkpoint = CheckpointSource(request.source, may_be_absent=True)
        config, absent = checkpoint.config, checkpoint.checkpoint.absent
        source_bytes = checkpoint.number_bytes()
    else:
        config = open_source(request.source).config
    precision = resolve_precision(config, request.storage, request.policy)
    if precision.policy is not None:
        check_policy(precision.policy, [weight.name for weight in bundle_weights(config, precision) if weight.product])
        if (compiler := compiler_of(request.backend)) is not None:
            compiler.check_policy(precision.policy, request.target)
    sizes: dict[str, int] = {}
    for weight in bundle_weights(config, precision):
        component = weight.name.split("/", 1)[0]
        sizes[component] = sizes.get(component, 0) + stored_bytes(weight, precision)
    total = sum(sizes.values())
    limits, note = resolve_limits(request, config, precision, compiler_of(request.backend, target=request.target))
    device = estimates.device(config, precision, limits)
    ways = cuts(config, precision, limits)
    lengths = tuple(sorted({limits.max_length, *(length for length in LENGTHS if length < limits.max_length)}))
    return BuildPlan(
        config=config,
        precision=precision,
        out=request.out,
        bytes_per_component=sizes,
        weight_bytes=total,
        graphs=planned_graphs(request, config, precision),
        disk_bytes=total + engine_bytes(request, config, precision) + OTHER_FILES_BYTES,
        absent=absent,
        steps=_steps(request, config, precision, source_bytes),
        device_bytes=device,
        bank=PlannedBank(
            rows=limits.bank_rows,
            rows_of_image=config.tiled.max_tiles if config.tiled is not None else 1,
            row_bytes=estimates.media_row(config, precision),
        ),
        runs=_runs(config, precision, limits),
        limits=limits,
        lengths=lengths,
        memory=tuple(_memory(config, precision, limits, rows, lengths) for rows in sorted({*ROWS, limits.batch})),
        cards=tuple(_planned_card(ways, request.parts, limits.batch, name, int(size)) for name, size in CARDS.items()),
        note=note,
    )


def _memory(
    config: ModelConfig, precision: Precision, limits: ShapeLimits, rows: int, lengths: tuple[int, ...]
) -> PlannedMemory:
    of_length = (msgspec.structs.replace(limits, max_length=length, batch=rows) for length in lengths)
    return PlannedMemory(rows=rows, bytes=tuple(estimates.device(config, precision, each) for each in of_length))


def _planned_card(ways: Cuts, parts: int, batch: int, name: str, size: int) -> PlannedCard:
    """The fewest cards; a decoder that is not asked for in parts is cut into as many as there are cards, or more where that does not do."""
    least: tuple[int, int, Placement] | None = None
    for count in range(1, MOST_GPUS + 1):
        room = Card(name=name, memory=size, count=count).room
        if parts == 1:
            found = ways.fit(room, fewest=count)
        else:
            way = place(ways.in_parts(parts), room, batch)
            found = None if way is None else (parts, way)
        if found is None:
            continue
        least = least or (count, *found)
        if found[1].rows == batch:
            return PlannedCard(
                name=name, memory=size, count=count, parts=found[0], least=least[0], least_parts=least[1], rows=least[2].rows,
                graphs=found[1].graphs,
            )  # fmt: skip
    if least is None:
        return PlannedCard(name=name, memory=size, count=None, parts=None, least=None, least_parts=None, rows=0)
    return PlannedCard(
        name=name,
        memory=size,
        count=None,
        parts=None,
        least=least[0],
        least_parts=least[1],
        rows=least[2].rows,
        graphs=least[2].graphs,
    )


def _runs(config: ModelConfig, precision: Precision, limits: ShapeLimits) -> tuple[PlannedRun, ...]:
    """On a CPU caches grow with requests and the bank is filled row by row; engines have all that the limits allow."""
    tiles = config.tiled.max_tiles if config.tiled is not None else 1
    index = WeightIndex.planned(config, precision)
    short = min(SHORT_REQUEST, limits.max_length)
    loads = (
        (1, short, min(tiles, limits.bank_rows)),
        (1, limits.max_length, limits.bank_rows),
        (limits.batch, short, limits.bank_rows),
    )
    on_cpu = [
        estimates.on_cpu(config, index, requests=requests, positions=slots, media=media) for requests, slots, media in loads
    ]
    on_gpu = [
        estimates.on_gpu(config, precision, limits, requests=requests, positions=limits.max_length, media=limits.bank_rows)
        for requests in sorted({1, limits.batch})
    ]
    found: list[tuple[Literal["CPU", "GPU"], estimates.Needs]] = [("CPU", each) for each in on_cpu]
    found += [("GPU", each) for each in on_gpu]
    return tuple(PlannedRun(where=where, needs=needs, total=needs.total) for where, needs in found)


def _steps(
    request: BuildRequest, config: ModelConfig, precision: Precision, source_bytes: Mapping[str, int] | None
) -> tuple[PlannedStep, ...]:
    """Without parity, whose time depends on what is compared."""
    weights = bundle_weights(config, precision)
    numbers = sum(math.prod(weight.shape) for weight in weights)
    making = estimates.making(weights, precision, source_bytes=source_bytes, large=LARGE, threads=THREADS)
    total = sum(stored_bytes(weight, precision) for weight in weights)
    steps = []
    policy = precision.policy
    if policy is not None and policy.needs_ranges and request.calibration is None and not request.uncalibrated:
        steps.append(
            PlannedStep(
                name="calibration, on the shipped set",
                seconds=numbers * _CALIBRATING_SECONDS,
                memory=estimates.calibrating(config),
                disk=0,
            )
        )
    seconds = numbers * _WEIGHT_SECONDS
    for weight in weights:
        how = weight.quantisation(precision)
        seconds += math.prod(weight.shape) * _QUANTISING_SECONDS[how.element] if how is not None else 0.0
    steps.append(PlannedStep(name="weights", seconds=seconds, memory=making, disk=total))
    for graph in planned_graphs(request, config, precision):
        if graph.engine_memory is not None and graph.engine_seconds is not None:
            disk = int(ENGINE_RATIO * graph.weight_bytes)
            name = f"engine of {graph.name}"
            steps.append(PlannedStep(name=name, seconds=graph.engine_seconds, memory=graph.engine_memory, disk=disk))
    return tuple(steps)


def planned_graphs(request: BuildRequest, config: ModelConfig, precision: Precision) -> tuple[PlannedGraph, ...]:
    sizes = WeightIndex.planned(config, precision).sizes()
    graphs = tuple(
        PlannedGraph(name=record.name, layers=record.layers, weight_bytes=graph_bytes(config, sizes, record))
        for record in graph_records(config, sizes, request.parts)
    )
    compiler = compiler_of(request.backend)
    if compiler is None:
        return graphs
    needed = [compiler.estimate(graph.weight_bytes) for graph in graphs]
    return tuple(
        msgspec.structs.replace(graph, engine_memory=each.memory, engine_seconds=each.seconds)
        for graph, each in zip(graphs, needed, strict=True)
    )


def engine_bytes(request: BuildRequest, config: ModelConfig, precision: Precision) -> int:
    """Of all engines: each has the weights that its graph reads, so what two parts of the decoder read counts twice."""
    if compiler_of(request.backend) is None:
        return 0
    return int(ENGINE_RATIO * sum(graph.weight_bytes for graph in planned_graphs(request, config, precision)))
