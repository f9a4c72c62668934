"""What sharing one engine brings on a CPU: clients side by side against one after the other, on a decoder of 110M parameters.

    python benchmarks/serving_cpu.py [--threads 1] [--clients 8] [--prompt 512] [--new-tokens 128] [--rounds 3] [--only shots]
        [--work DIR] [--save]

Closed-loop clients, each in a thread of its own, ask for prompts that are in the cache; decode tokens per second, both ways in turns in one
run. With shared shots also with a row for each request, the shots copied. Also: the loop's share of a step beside the decoder's, and the
distribution of the time between tokens of other streams while a prompt with 8 images joins, beside the bound: a step and one piece of work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np

import flamingo_export
from flamingo_export.runtime.cache import Sharing
from flamingo_export.runtime.loop import Loop
from flamingo_export.runtime.model import Model
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Request

IMAGES = 8


def prompts(model: Model, count: int, *, length: int, shared: int, seed: int) -> list[Request]:
    """Prompts of random tokens that begin alike, without media."""
    rng = np.random.default_rng(seed)
    start = [1, *rng.integers(10, model.config.language_model.vocab_size, shared - 1).tolist()] if shared else [1]
    rest = (rng.integers(10, model.config.language_model.vocab_size, length - len(start)).tolist() for _ in range(count))
    return [Request(prompt=[*start, *tokens]) for tokens in rest]


def one_by_one(model: Model, requests: Sequence[Request], settings: dict[str, Any]) -> float:
    """Decode tokens per second of requests that wait for each other, prefill not counted."""
    found = [model.generate(request, **settings) for request in requests]
    return sum(len(each.token_ids) - 1 for each in found) / sum(sum(each.timings.steps) for each in found)


def together(model: Model, requests: Sequence[Request], settings: dict[str, Any]) -> float:
    """Decode tokens per second of clients side by side, from the first token of the last to begin on."""
    found: list[Any] = [None] * len(requests)
    barrier = threading.Barrier(len(requests))

    def client(index: int) -> None:
        barrier.wait()
        found[index] = model.generate(requests[index], **settings)

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(len(each.token_ids) - 1 for each in found) / max(sum(each.timings.steps) for each in found)


def overhead(model: Model, requests: Sequence[Request], settings: dict[str, Any]) -> dict[str, float]:
    """Share of the loop's time that is not the decoder's, searches (choosing from whole logits) by themselves."""
    seconds = {"decoder": 0.0, "search": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **rest: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **rest)
            seconds[name] += time.perf_counter() - started
            return result

        return run

    decoder: Any = model.engines.decoder
    run = decoder.run
    decoder.run = timed("decoder", run)
    try:
        options = GenerateOptions(**settings)
        for request in requests:
            model.engine.submit(model.prepare(request), options, wake=False)
        with model.engine.by_hand() as loop:
            while len(loop.schedule.decoding) < len(requests):
                loop.tick()
            job: Any
            for job in loop.schedule.decoding:
                job.search.advance = timed("search", job.search.advance)
            seconds.update(decoder=0.0, search=0.0)
            started = time.perf_counter()
            while loop.tick():
                pass
            whole = time.perf_counter() - started
    finally:
        decoder.run = run
    return {
        "scheduler, share of a step": 1 - (seconds["decoder"] + seconds["search"]) / whole,
        "search, share of a step": seconds["search"] / whole,
    }


def step_alone(model: Model, requests: Sequence[Request], settings: dict[str, Any]) -> float:
    """The processor's seconds of a step in which all of them decode."""
    options = GenerateOptions(**settings, min_new_tokens=settings["max_new_tokens"])
    tickets = [model.engine.submit(model.prepare(request), options, wake=False) for request in requests]
    times: list[float] = []
    with model.engine.by_hand() as loop:
        while len(loop.schedule.decoding) < len(requests):
            loop.tick()
        while len(loop.schedule.decoding) == len(requests) and len(times) < 9:
            started = time.process_time()
            loop.tick()
            times.append(time.process_time() - started)
        loop.revoked.extend(tickets)
        while loop.tick():
            pass
    return float(np.median(times))


def joining(model: Model, requests: Sequence[Request], settings: dict[str, Any], length: int) -> dict[str, float]:
    """Seconds between tokens of streams, by themselves and while a prompt with images joins; and of one chunk of it."""
    side = model.config.vision.image_size
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (IMAGES, side, side, 3), dtype=np.uint8))
    ids = rng.integers(10, model.config.language_model.vocab_size, length)
    ids[np.linspace(1, length - 2, IMAGES).astype(int)] = model.config.tokens.image
    for request in requests:
        model.engine.submit(model.prepare(request), GenerateOptions(**settings), wake=False)
    with model.engine.by_hand() as loop:
        while len(loop.schedule.decoding) < len(requests):
            loop.tick()
        quiet = [gap for gap, _ in gaps(loop, 12)]
        joins = Request(prompt=ids.tolist(), media=pictures)
        model.engine.submit(model.prepare(joins), GenerateOptions(beams=1, max_new_tokens=2), wake=False)
        work: list[float] = []
        busy = gaps(loop, IMAGES + -(-length // model.manifest.limits.chunk), work)
        while loop.tick():
            pass
    found = {}
    for name, times in (("by itself", quiet), ("while a prompt joins", [gap for gap, _ in busy])):
        for label, share in (("median", 50), ("p95", 95), ("longest", 100)):
            found[f"{name}, {label}"] = float(np.percentile(times, share))
    found["pieces of work between two steps, at most"] = max(pieces for _, pieces in busy)
    found["longest piece of work"] = max(work)
    return found


def gaps(loop: Loop, count: int, work: list[float] | None = None) -> list[tuple[float, int]]:
    """Seconds between so many decoding steps, and the pieces of work that lay between them; seconds of each piece go to `work`."""
    found: list[tuple[float, int]] = []
    last, pieces = time.perf_counter(), 0
    while len(found) < count and loop.schedule.decoding:
        before, working = loop.counts["steps"], bool(loop.schedule.working)
        started = time.perf_counter()
        loop.tick()
        now = time.perf_counter()
        if loop.counts["steps"] > before:
            found.append((now - last, pieces))
            last, pieces = now, 0
        elif working:
            pieces += 1
            if work is not None:
                work.append(now - started)
    return found


@contextmanager
def rows_of_their_own(model: Model) -> Iterator[None]:
    """As an engine without bounds for shared rows: what is alike is copied."""
    cache = model.engine.loop.cache
    before, cache.sharing = cache.sharing, Sharing(columns=1, media=1, dense=False)
    try:
        yield
    finally:
        cache.sharing = before


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="the case whose name ends so: greedy, beams, shots")
    parser.add_argument("--work", type=Path, help="where the bundle is kept; default: a temporary folder")
    parser.add_argument("--save", action="store_true", help="write results/serving_cpu.json")
    asked = parser.parse_args(arguments)
    result: dict[str, Any] = {key: value for key, value in vars(asked).items() if key not in ("work", "save")}
    with tempfile.TemporaryDirectory() as folder:
        config = common.model_config("decoder-110m", layers=12, width=768, heads=12, every=12)
        path = common.bundle(config, asked.work or Path(folder))
        for name, shared, settings in (
            ("greedy", 0, {"beams": 1}),
            ("3 beams", 0, {"beams": 3}),
            ("greedy, shared shots", asked.prompt - 32, {"beams": 1}),
        ):
            if not name.endswith(asked.only):
                continue
            settings = {**settings, "max_new_tokens": asked.new_tokens}
            with flamingo_export.load(path, threads=asked.threads) as model:
                requests = prompts(model, asked.clients, length=asked.prompt, shared=shared, seed=1)
                together(model, requests, settings)  # so that the prompts are in the cache
                rates: dict[str, list[float]] = {"one by one": [], "together": []}
                before = model.engine.stats().shared_rows
                for _ in range(asked.rounds):
                    rates["one by one"].append(one_by_one(model, requests, settings))
                    rates["together"].append(together(model, requests, settings))
                    if shared:
                        with rows_of_their_own(model):
                            own = together(model, requests, settings)
                        rates.setdefault("together, a row for each", []).append(own)
                row = {key: float(np.median(values)) for key, values in rates.items()}
                row["requests in another's row"] = (model.engine.stats().shared_rows - before) / asked.rounds
                if shared:
                    row["a step, processor"] = step_alone(model, requests, settings)
                    with rows_of_their_own(model):
                        row["a step, a row for each, processor"] = step_alone(model, requests, settings)
                row["ratio"] = row["together"] / row["one by one"]
                if name == "greedy":
                    result["loop"] = overhead(model, requests, settings)
                    result["seconds between tokens"] = joining(model, requests[:4], settings, asked.prompt)
            result[name] = row
            print(
                f"{name}: {row['one by one']:.1f} and {row['together']:.1f} tokens per second, {row['ratio']:.2f} times",
                flush=True,
            )
            if shared:
                own, joined = row["together, a row for each"], row["requests in another's row"]
                print(
                    f"  {joined:.1f} of {asked.clients} requests in another's row; with a row for each "
                    f"{own:.1f}, {own / row['one by one']:.2f} times; a step takes {1e3 * row['a step, processor']:.0f} ms of the "
                    f"processor's time, {1e3 * row['a step, a row for each, processor']:.0f} with a row for each",
                    flush=True,
                )
    for part in ("loop", "seconds between tokens") if "loop" in result else ():
        print("; ".join(f"{key} {value:.3f}" for key, value in result[part].items()))
    if asked.save:
        print(common.save("serving_cpu", result))


if __name__ == "__main__":
    main(sys.argv[1:])
