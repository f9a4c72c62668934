"""Whether `capacity` foresees what happens: one replica under a real load beside the simulation of the same requests.

    python benchmarks/capacity_cpu.py [--clock wall|cpu] [--threads 1] [--load 0.6] [--requests 30] [--windows 4] [--work DIR] [--save]

A decoder of 110M parameters, or of fewer layers. A machine with other work on it changes its pace from one minute to the next. So costs are
measured before, between and after windows of the real run, and their mean is what the simulation is given: both sides see the same stretch
of time. Each window gets its requests at the same times as its simulation. Two loads are tried: independent arrivals at `--load` of what
the replica can carry at most, and all requests at once, whose throughput does not follow from the arrivals. Asked: throughput and median
within 15 %, p95 within 30 %. With `--clock cpu` the costs and the real run are measured in the processor's time of one thread, which other
programs do not stretch. `--bench BUNDLE` prints such costs in place of all that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import msgspec
import numpy as np

import flamingo_export
from flamingo_export.deploy.capacity.costs import Benched, StepCosts
from flamingo_export.deploy.capacity.grid import GridMeter
from flamingo_export.deploy.capacity.load import Load, arrivals
from flamingo_export.deploy.capacity.simulate import Asked, requests, simulate
from flamingo_export.runtime.beam_search import BeamSearch
from flamingo_export.runtime.media import medium_of
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.request import Prepared, prepared_from_ids
from flamingo_export.runtime.sampling import Sampling
from flamingo_export.runtime.search import Search, StopRule
from flamingo_reference.config import NANO

SLOTS = 256


def prepared(model: Model, asked: Asked, pictures: dict[int, Any]) -> Prepared:
    """The real form of a simulated request: its ids within this model's vocabulary, its images as pixels."""
    config = model.config
    ids = np.where(asked.token_ids == NANO.tokens.image, config.tokens.image, asked.token_ids + 8)
    side = config.vision.image_size
    for number in asked.images:
        if number not in pictures:
            pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
            pictures[number] = medium_of([pixels], config)
    return prepared_from_ids(ids, tuple(pictures[number] for number in asked.images), config)


def submitted(model: Model, each: Asked, request: Prepared, beams: int, wake: bool) -> Any:
    """A request that ends after so many tokens and not before."""
    rule = StopRule(eoc=-1, banned=model.config.tokens.never, max_new_tokens=each.new_tokens)
    search: Search = BeamSearch(rule, beams=beams) if beams > 1 else Sampling(rule)
    return model.engine.submit_search(request, search, cost=len(request.token_ids) + beams * each.new_tokens, wake=wake)


def real(model: Model, asked: Sequence[Asked], arrived: Any, beams: int) -> Fared:
    """Of requests that arrive on the clock, at an engine that runs its own thread."""
    ready = [prepared(model, each, {}) for each in asked]
    tickets = []
    started = time.perf_counter()
    for each, request, at in zip(asked, ready, arrived, strict=True):
        time.sleep(max(0.0, started + at - time.perf_counter()))
        tickets.append((submitted(model, each, request, beams, True), time.perf_counter() - started - at))
    taken = []
    for ticket, late in tickets:
        ticket.result(timeout=600)
        taken.append(late + ticket.timings.first_token + sum(ticket.timings.steps))
    return Fared(np.array(taken), time.perf_counter() - started - arrived[0])


def real_in_cpu_time(model: Model, asked: Sequence[Asked], arrived: Any, beams: int) -> Fared:
    """As `real`, the engine's actions run here and the clock stands still while other programs have the processor: for busy machines."""
    ready = [prepared(model, each, {}) for each in asked]
    now, following = 0.0, 0
    tickets: list[Any] = []
    running: dict[Any, float] = {}
    taken: dict[Any, float] = {}
    with model.engine.by_hand() as loop:
        while following < len(asked) or running:
            while following < len(asked) and arrived[following] <= now:
                tickets.append(submitted(model, asked[following], ready[following], beams, False))
                running[tickets[-1]] = arrived[following]
                following += 1
            started = time.process_time()
            worked = loop.tick()
            now += time.process_time() - started
            if not worked and following < len(asked):
                now = max(now, arrived[following])
            for ticket in [each for each in running if each.done]:
                taken[ticket] = now - running.pop(ticket)
    return Fared(np.array([taken[ticket] for ticket in tickets]), now - arrived[0])


@dataclass(frozen=True)
class Fared:
    """How a window's requests fared: seconds to each answer, and from the first arrival to the last answer."""

    taken: Any
    seconds: float


def figures(windows: Sequence[Fared]) -> dict[str, float]:
    """Of all windows together; the first tenth of each, which finds the engine empty, is left out of the percentiles."""
    counted = np.concatenate([each.taken[len(each.taken) // 10 :] for each in windows])
    return {
        "throughput": sum(len(each.taken) for each in windows) / sum(each.seconds for each in windows),
        "median": float(np.percentile(counted, 50)),
        "p95": float(np.percentile(counted, 95)),
    }


def mean_of(measured: Sequence[StepCosts]) -> StepCosts:
    """Of measurements before, between and after windows: each window counts those on both sides of it."""
    weights = np.array([0.5, *(1.0 for _ in measured[2:]), 0.5]) if len(measured) > 1 else np.ones(1)

    def mean(name: str) -> Any:
        return as_tuples(np.average([np.array(getattr(each, name)) for each in measured], axis=0, weights=weights).tolist())

    names = ("decode", "prefill", "encode", "copy_slot")
    return StepCosts(
        **{name: mean(name) if name in names else getattr(measured[0], name) for name in StepCosts.__struct_fields__}
    )


def as_tuples(value: Any) -> Any:
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine with other work, one thread"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.6, help="of the throughput at which requests never stop waiting")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder; 12 are 110M parameters")
    parser.add_argument("--requests", type=int, default=30, help="of a window")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4, help="of each load")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--bench", type=Path, metavar="BUNDLE", help="print this bundle's costs for `capacity --bench`")
    parser.add_argument("--work", type=Path, help="where the bundle is kept; default: a temporary folder")
    parser.add_argument("--save", action="store_true", help="write results/capacity_cpu.json")
    asked = parser.parse_args(arguments)
    if asked.bench is not None:
        with flamingo_export.load(asked.bench, threads=asked.threads) as model:
            grid = GridMeter(
                model, widths=(1, 3), rows=model.engine.rows, repeat=asked.repeat, clock=time.process_time
            ).measure(SLOTS)
            head = Benched(bundle=asked.bench.name, model=model.config.name, backend=model.backend.name, cores=1, grid=grid)
        print(msgspec.json.encode(head).decode())
        return
    clock, run = (time.perf_counter, real) if asked.clock == "wall" else (time.process_time, real_in_cpu_time)
    with tempfile.TemporaryDirectory() as folder:
        name = "decoder-110m" if asked.layers == 12 else f"decoder-{asked.layers}-layers"
        config = common.model_config(name, layers=asked.layers, width=768, heads=12, every=asked.layers)
        path = common.bundle(config, asked.work or Path(folder))
        load = Load(
            prompt=(asked.prompt // 2, asked.prompt), new_tokens=(asked.new_tokens // 2, asked.new_tokens), beams=asked.beams
        )
        with flamingo_export.load(path, threads=asked.threads) as model:
            rows = model.engine.rows
            meter = GridMeter(model, widths=(1, asked.beams), rows=rows, repeat=asked.repeat, clock=clock)
            costs = [meter.measure(SLOTS)]
            windows = []
            for number in range(2 * asked.windows):
                work = requests(load, asked.requests, number)
                if number % 2:
                    arrived = np.zeros(len(work))
                else:
                    most = simulate(costs[-1], work, np.zeros(len(work)), beams=asked.beams, rows=rows, queue=None).throughput
                    arrived = arrivals("poisson", asked.load * most, len(work), number)
                windows.append((work, arrived, run(model, work, arrived, asked.beams)))
                if number % 2:
                    costs.append(meter.measure(SLOTS))
        mean = mean_of(costs)
        drifts = [each.decoding(4, 1, SLOTS) / mean.decoding(4, 1, SLOTS) - 1 for each in costs]
        print("costs beside their mean: " + ", ".join(f"{100 * each:+.0f} %" for each in drifts))
        results = {}
        for kind, chosen in ((f"poisson at {asked.load:g}", windows[::2]), ("all at once", windows[1::2])):
            foreseen = [simulate(mean, work, at, beams=asked.beams, rows=rows, queue=None) for work, at, _ in chosen]
            found = figures([fared for *_, fared in chosen])
            expected = figures([Fared(each.answer, each.seconds) for each in foreseen])
            errors = {name: expected[name] / found[name] - 1 for name in found}
            busy = sum(each.busy * each.seconds for each in foreseen) / sum(each.seconds for each in foreseen)
            results[kind] = {"real": found, "simulated": expected, "error": errors, "busy": busy}
            texts = (f"{name} {found[name]:.3f} and {expected[name]:.3f} ({100 * errors[name]:+.0f} %)" for name in found)
            print(f"{kind}, busy {busy:.2f}: " + ", ".join(texts), flush=True)
    if asked.save:
        settings = {key: value for key, value in vars(asked).items() if key not in ("work", "save", "bench")}
        print(common.save("capacity_cpu", {**settings, "costs_beside_their_mean": drifts, "loads": results}))


if __name__ == "__main__":
    main(sys.argv[1:])
