"""Which GPU runs which graph, where several are named: the decoder's parts in order, each on one GPU, and the encoders together on one.

    cuda:0   vision_encoder, resampler, media_kv; decoder.0: its engine, caches of its layers, their rows of the media bank
    cuda:1   decoder.1: the same of its own layers                          hidden states are copied from each part to the next

Each part runs on the GPU of the one before it or on a later one, so hidden states go once from each GPU to the next. Of all such ways the one is
taken that fills the fullest GPU least.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import msgspec

from flamingo_export.backends.base import SessionOptions
from flamingo_export.bundle.manifest import GraphRecord, Manifest, ShapeLimits
from flamingo_export.errors import BackendError
from flamingo_export.estimates import GIB, Resident, graph_on_gpu, work_of_encoder, work_of_row
from flamingo_export.precision import Precision
from flamingo_export.weights.decoder_cuts import graph_bytes, graph_records
from flamingo_reference.config import ModelConfig

ENCODERS = ("vision_encoder", "resampler", "media_kv")
MOST_PARTS = MOST_GPUS = 16
"""How many are tried where those that there are do not suffice."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """graphs, used: names and bytes on each GPU, in the order in which these were given; rows: of the cache that fit."""

    graphs: tuple[tuple[str, ...], ...]
    used: tuple[int, ...]
    rows: int


def residents(
    config: ModelConfig, precision: Precision, limits: ShapeLimits, graphs: Sequence[GraphRecord], engines: Mapping[str, int]
) -> dict[str, Resident]:
    """What the graphs that generation runs keep on a GPU, by name, the decoder's parts in order. engines: bytes of each one's engine."""
    found = {}
    for graph in sorted(graphs, key=lambda graph: graph.layers or (0, 0)):
        decodes = graph.layers is not None or graph.name == "decoder"
        if decodes or graph.name in ENCODERS:
            layers = range(*(graph.layers or (0, config.language_model.num_layers))) if decodes else None
            found[graph.name] = graph_on_gpu(config, precision, limits, layers, engines[graph.name])
    return found


def place(needed: Mapping[str, Resident], room: Sequence[int], batch: int) -> Placement | None:
    """Graphs onto GPUs of so many free bytes each, with as many rows of the cache as fit, `batch` at most; None where not one does."""
    if sum(each.total(1) for each in needed.values()) > sum(room):
        return None
    encoders = tuple(name for name in needed if name in ENCODERS)
    parts = tuple(name for name in needed if name not in ENCODERS)
    found = None
    least, most = 1, batch
    rows = batch
    while least <= most:
        way = _fills_least(needed, encoders, parts, room, rows)
        if way is None:
            most = rows - 1
        else:
            least, found = rows + 1, way
        rows = (least + most) // 2
    return found


def _fills_least(
    needed: Mapping[str, Resident], encoders: tuple[str, ...], parts: tuple[str, ...], room: Sequence[int], rows: int
) -> Placement | None:
    """The way that fills the fullest GPU least; None where none fits."""
    sizes = [needed[name].total(rows) for name in parts]
    upto = [0, *itertools.accumulate(sizes)]
    beside = sum(needed[name].total(rows) for name in encoders)
    work = rows * max(needed[name].work for name in parts)
    best: tuple[float, float, int, tuple[int, ...]] | None = None
    for home in range(len(room)):
        # Of the first parts on the GPUs so far: share of the fullest one, sum of squares, where each GPU's parts begin.
        ways: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
        for gpu, free in enumerate(room):
            longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
            for start, (fullest, squares, begins) in ways.items():
                for stop in range(start, len(parts) + 1):
                    load = upto[stop] - upto[start] + (beside if gpu == home else 0) + (work if stop > start else 0)
                    if load > free:
                        break
                    share = load / max(free, 1)
                    way = (max(fullest, share), squares + share**2, (*begins, start))
                    longer[stop] = min(longer.get(stop, way), way)
            ways = longer
        if len(parts) in ways:
            fullest, squares, begins = ways[len(parts)]
            option = (fullest, squares, home, begins)
            best = option if best is None else min(best, option)
    if best is None:
        return None
    _, _, home, begins = best
    graphs = tuple(
        (*(encoders if gpu == home else ()), *parts[start:stop])
        for gpu, (start, stop) in enumerate(zip(begins, (*begins[1:], len(parts)), strict=True))
    )
    used = [
        sum(needed[name].total(rows) for name in names) + (work if stop > start else 0)
        for names, start, stop in zip(graphs, begins, (*begins[1:], len(parts)), strict=True)
    ]
    return Placement(graphs=graphs, used=tuple(used), rows=rows)


def on_one(manifest: Manifest, options: SessionOptions) -> dict[str, str]:
    """All graphs on the device that options name."""
    return {graph.name: options.device for graph in manifest.graphs}


def placed(
    manifest: Manifest, engines: Mapping[str, int], sizes: Mapping[str, int], gpus: Mapping[int, tuple[int, int]]
) -> dict[str, str]:
    """The device of each graph that generation runs, as `cuda:1`.

    engines: bytes of each graph's engine, intermediate results included; sizes: of each of the bundle's weights; gpus: free bytes and all of
    each GPU that was named. Raises BackendError saying what is needed, what there is, and what would fit.
    """
    needed = residents(manifest.config, manifest.precision, manifest.limits, manifest.graphs, engines)
    found = place(needed, [free for free, _ in gpus.values()], manifest.limits.batch)
    if found is None:
        raise BackendError(_refusal(manifest, needed, sizes, gpus))
    return {name: f"cuda:{gpu}" for gpu, names in zip(gpus, found.graphs, strict=True) for name in names}


class Cuts:
    """What a decoder in so many parts, and the encoders, keep on GPUs; each number of parts is worked out once."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        limits: ShapeLimits,
        sizes: Mapping[str, int],
        *,
        ratio: float,
        planned: bool = False,
    ) -> None:
        """sizes: bytes of each of the bundle's weights; ratio: of an engine to the weights of its graph.

        planned: whether engines are yet to be built, so that their intermediate results are estimated; else `ratio` has them.
        """
        self._config, self._precision, self._limits, self._sizes, self._ratio = config, precision, limits, sizes, ratio
        self._planned = planned
        self._found: dict[int, dict[str, Resident]] = {}

    def in_parts(self, parts: int) -> dict[str, Resident]:
        """By name, as `residents` does."""
        if parts not in self._found:
            records = graph_records(self._config, self._sizes, parts)
            engines = {record.name: int(self._ratio * graph_bytes(self._config, self._sizes, record)) for record in records}
            found = residents(self._config, self._precision, self._limits, records, engines)
            self._found[parts] = self._with_work(found) if self._planned else found
        return self._found[parts]

    def _with_work(self, found: Mapping[str, Resident]) -> dict[str, Resident]:
        encoding = work_of_encoder(self._config, self._precision)
        work = work_of_row(self._config, self._precision, self._limits)
        return {
            name: msgspec.structs.replace(each, engine=each.engine + (encoding if name == "vision_encoder" else 0))
            if name in ENCODERS
            else msgspec.structs.replace(each, work=work)
            for name, each in found.items()
        }

    def fit(self, room: Sequence[int], *, fewest: int = 1) -> tuple[int, Placement] | None:
        """The fewest parts that fit onto GPUs of so many free bytes, and how; None where MOST_PARTS do not."""
        for parts in range(fewest, min(MOST_PARTS, self._config.language_model.num_layers) + 1):
            found = place(self.in_parts(parts), room, self._limits.batch)
            if found is not None:
                return parts, found
        return None


def _refusal(
    manifest: Manifest, needed: Mapping[str, Resident], sizes: Mapping[str, int], gpus: Mapping[int, tuple[int, int]]
) -> str:
    config, limits = manifest.config, manifest.limits
    decoder = {name: each for name, each in needed.items() if name not in ENCODERS}
    each = ", ".join(
        f"{name} {one.total(1) / GIB:.2f} (engine {one.engine / GIB:.2f}, media bank {one.bank / GIB:.2f}, a cache of "
        f"{limits.max_length} slots {one.row / GIB:.2f})"
        for name, one in decoder.items()
    )
    encoders = sum(one.total(1) for name, one in needed.items() if name in ENCODERS)
    there = ", ".join(f"cuda:{gpu} {free / GIB:.2f} of {total / GIB:.2f} GiB" for gpu, (free, total) in gpus.items())
    said = f"the bundle does not fit on these GPUs: one request takes {each}, the encoders {encoders / GIB:.2f} GiB; free are {there}. "
    room = [free for free, _ in gpus.values()]
    fits = []
    for count in range(len(room) + 1, MOST_GPUS + 1):
        if place(needed, [max(room)] * count, 1) is not None:
            fits.append(f"on {count} GPUs with {max(room) / GIB:.2f} GiB free each (--device cuda:0,cuda:1,...)")
            break
    weights = sum(graph_bytes(config, sizes, graph) for graph in manifest.graphs if graph.name in needed)
    ratio = sum(one.engine for one in needed.values()) / max(weights, 1)
    if len(decoder) < config.language_model.num_layers:
        cut = Cuts(config, manifest.precision, limits, sizes, ratio=ratio).fit(room, fewest=len(decoder) + 1)
        if cut is not None:
            fits.append(f"in {cut[0]} parts (build with --parts {cut[0]})")
    length = limits.max_length // 2
    while length >= 256:
        less = {name: msgspec.structs.replace(one, row=one.row * length // limits.max_length) for name, one in needed.items()}
        if place(less, room, 1) is not None:
            fits.append(f"with --max-length {length}")
            break
        length //= 2
    if fits:
        return f"{said}It would fit {', or '.join(fits)}."
    return f"{said}Use more GPUs or larger ones, free memory, or build with weights in fewer bits (--fp8, --storage) and more --parts."
