"""Twice the load that a server can carry, for minutes: nothing accepted is lost, memory stays flat, refusals come soon.

    python benchmarks/serving_overload.py [--minutes 10] [--times 2] [--bundle nano.bundle] [--rows 16] [--queue 64] [--save]

nano behind `flamingo-export serve`. First what it can carry: greedy captions of PNG files of 7 kB, from as many clients as it has rows, each of
which asks as soon as it was answered. Then requests at `times` that rate, at random moments (Poisson) whatever comes back, each over a
connection of its own. A machine that does other work too changes its pace, so the rate is always `times` what was answered in the last 20 s.
An answer must be the one that the same picture got when nothing else ran. The server's resident memory is printed each minute, and compared
between the second minute and the last one. Exit 1 if a request was neither answered nor refused with 429, if an answer was wrong, or if a row
of the cache or of the bank is still in use at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import psutil
from serving_http import ask, body, closed_loop, over_http, pictures, serving

import flamingo_export
from flamingo_export.sources.choice import source_for_size

PICTURES, SIDE = 60, 50
WINDOW = 20.0
"""Seconds over which it is counted what the server carries."""
PATH = "/v1/chat/completions"
IDLE = ("flamingo_requests_running", "flamingo_requests_waiting", "flamingo_cache_rows_in_use", "flamingo_bank_rows_in_use")


async def post(port: int, data: bytes) -> tuple[int, bytes]:
    """One request over a connection of its own; status 0 where it was not answered."""
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data)
        found = await reader.read(-1)
    except OSError:
        return 0, b""
    finally:
        if writer is not None:
            writer.close()
    first, _, rest = found.partition(b"\r\n")
    words = first.split()
    return (int(words[1]) if len(words) > 1 else 0), rest.partition(b"\r\n\r\n")[2]


def text_of(answer: bytes) -> str:
    """What a model said."""
    return str(json.loads(answer)["choices"][0]["message"]["content"])


class Overload:
    """Arrivals that do not wait for answers, and what became of them."""

    def __init__(self, port: int, bodies: Sequence[bytes], expected: Sequence[str]) -> None:
        self._port, self._bodies, self._expected = port, bodies, expected
        self.became: Counter[str] = Counter()
        self.refusals: list[float] = []
        self.answers: list[float] = []
        self._answered: deque[float] = deque()

    async def one(self, index: int) -> None:
        """Asks about a picture and counts what comes."""
        started = time.perf_counter()
        status, answer = await post(self._port, self._bodies[index])
        took = time.perf_counter() - started
        if status == 200:
            self.became["answered" if text_of(answer) == self._expected[index] else "wrong"] += 1
            self.answers.append(took)
            self._answered.append(time.perf_counter())
        elif status == 429:
            self.became["refused"] += 1
            self.refusals.append(took)
        else:
            self.became[f"status {status}"] += 1

    def carries(self) -> float:
        """Answers a second of late."""
        while self._answered and self._answered[0] < time.perf_counter() - WINDOW:
            self._answered.popleft()
        return max(1, len(self._answered)) / WINDOW

    async def run(self, carried: float, times: float, seconds: float, memory: psutil.Process) -> list[tuple[float, int]]:
        """Arrivals at `times` what the server carries, `carried` answers a second at first.

        Returns (seconds since the start, resident bytes) every 5 s.
        """
        rng = np.random.default_rng(0)
        began = due = time.perf_counter()
        sizes: list[tuple[float, int]] = []
        under_way: set[asyncio.Task[None]] = set()
        while due < began + seconds:
            if due > began + WINDOW:
                carried = self.carries()
            due += float(rng.exponential(1 / (times * carried)))
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            under_way.add(task := asyncio.ensure_future(self.one(int(rng.integers(len(self._bodies))))))
            task.add_done_callback(under_way.discard)
            if due - began >= 5 * len(sizes):
                sizes.append((due - began, memory.memory_info().rss))
                if len(sizes) % 12 == 1:
                    print(
                        f"{(due - began) / 60:.0f} min: {sizes[-1][1] / 2**20:.0f} MiB, {dict(self.became)}, carries {carried:.1f} a second",
                        flush=True,
                    )
        await asyncio.gather(*under_way)
        return sizes


def in_use(port: int) -> dict[str, float]:
    """What the server says is in use, once it has nothing to do or half a minute is over."""
    end = time.monotonic() + 30
    while True:
        lines = ask(port, "GET", "/metrics")[1].decode().splitlines()
        found = {line.partition("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(IDLE)}
        if not any(found.values()) or time.monotonic() > end:
            return found
        time.sleep(0.2)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--times", type=float, default=2.0)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--carry", type=float, default=20.0, help="seconds in which it is measured what the server can carry")
    parser.add_argument("--bundle", type=Path, help="of nano; default: one is built")
    parser.add_argument("--save", action="store_true", help="write results/serving_overload.json")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = asked.bundle or Path(folder) / "nano.bundle"
        if asked.bundle is None:
            flamingo_export.build(source_for_size("nano"), out=bundle, parity="skip")
        bodies = [body(picture) for picture in pictures(PICTURES, SIDE)]
        with serving(bundle, "--threads", "1", "--rows", str(asked.rows), "--max-queue", str(asked.queue)) as port:
            expected = [text_of(ask(port, "POST", PATH, each)[1]) for each in bodies]
            carried = closed_loop(asked.rows, asked.carry, over_http(port, bodies))
            print(
                f"carries {carried:.1f} answers a second; {asked.times:g} times that for {asked.minutes:g} minutes", flush=True
            )
            listening = next(
                each for each in psutil.net_connections("tcp") if each.laddr[1:] == (port,) and each.status == "LISTEN"
            )
            run = Overload(port, bodies, expected)
            sizes = asyncio.run(run.run(carried, asked.times, 60 * asked.minutes, psutil.Process(listening.pid)))
            left = in_use(port)
    return report(asked, run, carried, sizes, left, len(bodies[0]))


def report(
    asked: argparse.Namespace,
    run: Overload,
    carried: float,
    sizes: Sequence[tuple[float, int]],
    left: dict[str, float],
    size: int,
) -> int:
    """Prints, saves, and says whether all is well."""
    seconds = 60 * asked.minutes
    early = [rss for at, rss in sizes if min(60.0, seconds / 4) <= at < min(120.0, seconds / 2)]
    late = [rss for at, rss in sizes if at >= seconds - min(60.0, seconds / 4)]
    result: dict[str, Any] = {
        "minutes": asked.minutes,
        "carried": carried,
        "body": size,
        "became": dict(run.became),
        "answers_a_second": len(run.answers) / seconds,
        "refusals": {f"p{share}": float(np.percentile(run.refusals, share)) for share in (50, 95, 99)} if run.refusals else {},
        "answers": {f"p{share}": float(np.percentile(run.answers, share)) for share in (50, 95, 99)},
        "memory_mib": [(round(at), round(rss / 2**20)) for at, rss in sizes[::12]],
        "memory_growth": float(np.median(late) / np.median(early) - 1),
        "in_use": left,
    }
    print(f"{sum(run.became.values())} requests: {dict(run.became)}; {result['answers_a_second']:.1f} answers a second")
    for name in ("refusals", "answers"):
        print(f"{name}: " + ", ".join(f"{share} {1000 * value:.0f} ms" for share, value in result[name].items()))
    print(
        f"memory: {np.median(early) / 2**20:.0f} MiB in the second minute, {np.median(late) / 2**20:.0f} in the last: "
        f"{result['memory_growth']:+.1%}; in use at the end: {left}"
    )
    if asked.save:
        print(common.save("serving_overload", result))
    return int(bool(set(run.became) - {"answered", "refused"}) or any(left.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
