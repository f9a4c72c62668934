"""What the ingress of `package --for ray` takes of its process for one request, the replicas and Ray's own share left out.

    python benchmarks/ingress_cpu.py [--requests 400] [--rounds 5]

A request is a chat with one image, of so many bytes as base64; its key is found, a seed is given, and an answer of 400 bytes goes back. The
replica is a stand-in that answers at once. Milliseconds of the processor's time for each request, the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from starlette.requests import Request

from flamingo_export.deploy.ray.bounds import BoundedBodies
from flamingo_export.deploy.ray.ingress import Ingress
from flamingo_export.deploy.ray.settings import RaySettings

SIZES = (10_000, 130_000, 1_300_000)
_PIECE = 64 << 10
"""Bytes of a body that come at once, as uvicorn reads them."""


async def replica(scope: dict[str, Any], body: bytes, key: str) -> AsyncIterator[Any]:
    """Answers at once."""
    yield 200, [("content-type", "application/json")]
    yield msgspec.json.encode({"choices": [{"message": {"content": "x" * 380}}]})


def chat(size: int) -> bytes:
    """A body of so many bytes."""
    image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + "A" * (size - 160)}}
    return msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": [image]}], "temperature": 0.7})


async def ask(front: BoundedBodies, body: bytes, key: str) -> None:
    """One request through the bounds that stand in Ray's proxy and through the ingress."""
    pieces = [body[start : start + _PIECE] for start in range(0, len(body), _PIECE)]
    messages = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
        for number, piece in enumerate(pieces, start=1)
    ]
    waiting = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(waiting, {"type": "http.disconnect"})

    statuses = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers.append((b"authorization", b"Bearer " + key.encode()))
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    await front({**scope, "client": ("127.0.0.1", 1)}, receive, send)
    assert statuses == [200], statuses


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(arguments)
    key = "0123456789abcdef"
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(f"someone {key}\n")
        settings = RaySettings(model="m", api_key_file=str(keys))
        ingress = Ingress(replica, settings)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await (await ingress.respond(Request(scope, receive)))(scope, receive, send)

    front = BoundedBodies(application, settings.limits)

    async def measured(body: bytes) -> float:
        await ask(front, body, key)
        started = time.process_time()
        for _ in range(asked.requests):
            await ask(front, body, key)
        return (time.process_time() - started) / asked.requests

    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(asked.rounds):
        for size in SIZES:
            found[size].append(asyncio.run(measured(chat(size))))
    for size, seconds in found.items():
        print(
            f"body of {size / 1000:g} kB: {1000 * median(seconds):.3f} ms ({1000 * min(seconds):.3f} to {1000 * max(seconds):.3f})"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
