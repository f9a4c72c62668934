"""What HTTP costs, and what a server that is full says: nano behind `flamingo-export serve` on a loopback port.

    python benchmarks/serving_http.py [--clients 8] [--seconds 8] [--rounds 3] [--bundle nano.bundle] [--save]

Closed-loop clients ask for captions of PNG files, from threads with the Python API and over HTTP in turns; answers a second of both. Then
the server, its rows and queue full, is sent bodies of 10 kB more: how long it takes to refuse them.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import socket
import subprocess
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
from PIL import Image

import flamingo_export
from flamingo_export.sources.choice import source_for_size


def pictures(count: int, side: int = 64) -> list[bytes]:
    """PNG files of random pixels."""
    found = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        found.append(file.getvalue())
    return found


def body(picture: bytes, **settings: Any) -> bytes:
    """A chat request about a picture."""
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": "nano", "messages": [{"role": "user", "content": content}], **settings}).encode()


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[int]:
    """A server in a process of its own; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    line = [sys.executable, "-m", "flamingo_export", "serve", "--name", f"nano={bundle}", "--port", str(port), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 120
            while ask(port, "GET", "/health/ready")[0] != 200:
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError("the server does not start")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def ask(port: int, method: str, path: str, data: bytes = b"") -> tuple[int, bytes]:
    """One request over a connection of its own; status 0 where there was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, data, {"content-type": "application/json"})
        found = connection.getresponse()
        return found.status, found.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def closed_loop(clients: int, seconds: float, client: Callable[[int], Callable[[], None]]) -> float:
    """Answers a second of so many clients, each of which asks as soon as it was answered. client: makes one that asks once."""
    counts = [0] * clients
    end = time.perf_counter() + seconds

    def run(index: int) -> None:
        once = client(index)
        while time.perf_counter() < end:
            once()
            counts[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def over_http(port: int, bodies: Sequence[bytes]) -> Callable[[int], Callable[[], None]]:
    """Clients with connections that stay open."""

    def client(index: int) -> Callable[[], None]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

        def once() -> None:
            connection.request(
                "POST", "/v1/chat/completions", bodies[index % len(bodies)], {"content-type": "application/json"}
            )
            found = connection.getresponse()
            found.read()
            if found.status != 200:
                raise RuntimeError(f"status {found.status}")

        return once

    return client


def refusals(bundle: Path, count: int) -> dict[str, float]:
    """Seconds until a full server has refused a body of 10 kB."""
    large = body(pictures(1, side=50)[0], beams=8, max_tokens=200, min_tokens=200)
    with serving(bundle, "--threads", "1", "--rows", "1", "--max-queue", "1") as port:
        full = threading.Event()

        def keep_full() -> None:
            while not full.is_set():
                ask(port, "POST", "/v1/chat/completions", large)

        threads = [threading.Thread(target=keep_full) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        times: list[float] = []
        while len(times) < count:
            started = time.perf_counter()
            status, _ = ask(port, "POST", "/v1/chat/completions", large)
            if status == 429:
                times.append(time.perf_counter() - started)
        full.set()
        for thread in threads:
            thread.join()
    return {"bytes": float(len(large)), **{f"p{share}": float(np.percentile(times, share)) for share in (50, 95, 99)}}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--refusals", type=int, default=300)
    parser.add_argument("--bundle", type=Path, help="of nano; default: one is built")
    parser.add_argument("--save", action="store_true", help="write results/serving_http.json")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = asked.bundle or Path(folder) / "nano.bundle"
        if asked.bundle is None:
            flamingo_export.build(source_for_size("nano"), out=bundle, parity="skip")
        files = pictures(asked.clients)
        bodies = [body(file) for file in files]
        rates: dict[str, list[float]] = {"engine": [], "http": []}
        with flamingo_export.load(bundle, threads=1) as model, serving(bundle, "--threads", "1") as port:

            def direct(index: int) -> Callable[[], None]:
                return lambda: print(end="" if model.caption(files[index], beams=1).text is not None else "?")

            closed_loop(asked.clients, 1, direct)
            closed_loop(asked.clients, 1, over_http(port, bodies))
            for _ in range(asked.rounds):
                rates["engine"].append(closed_loop(asked.clients, asked.seconds, direct))
                rates["http"].append(closed_loop(asked.clients, asked.seconds, over_http(port, bodies)))
        found = {name: float(np.median(values)) for name, values in rates.items()}
        ratios = [http / engine for engine, http in zip(rates["engine"], rates["http"], strict=True)]
        result: dict[str, Any] = {
            **found,
            "ratio": float(np.median(ratios)),
            "ratios": ratios,
            "refusals": refusals(bundle, asked.refusals),
        }
    print(f"engine {found['engine']:.1f}, HTTP {found['http']:.1f} answers a second: {result['ratio']:.2f}")
    late = result["refusals"]
    times = ", ".join(f"p{share} {1000 * late[f'p{share}']:.1f} ms" for share in (50, 95, 99))
    print(f"refusals of {late['bytes'] / 1000:.0f} kB: {times}")
    if asked.save:
        print(common.save("serving_http", {"clients": asked.clients, "seconds": asked.seconds, **result}))


if __name__ == "__main__":
    main(sys.argv[1:])
