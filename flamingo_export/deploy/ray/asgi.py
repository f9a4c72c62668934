"""Runs one request through an ASGI application, and gives out its answer piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

Head = tuple[int, list[tuple[str, str]]]
"""Status and headers."""
_WAITING = 64
"""Pieces that wait for a slow reader."""


def scope_of(method: str, path: str, query: bytes, headers: list[tuple[str, str]], caller: str) -> dict[str, Any]:
    """What an ASGI server would say of a request. caller: whose turn it counts against, in the place of an address."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": (caller, 0),
        "server": ("replica", 0),
    }


async def answered(app: Any, scope: dict[str, Any], body: bytes) -> AsyncIterator[Head | bytes]:
    """The head of the answer, then its body in pieces. Closing the iterator tells the application that the client has gone."""
    gone = asyncio.Event()
    pieces: asyncio.Queue[Head | bytes] = asyncio.Queue(_WAITING)
    asked = [body]

    async def receive() -> dict[str, Any]:
        if asked:
            return {"type": "http.request", "body": asked.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            await pieces.put((message["status"], headers))
        elif message.get("body"):
            await pieces.put(message["body"])

    running = asyncio.ensure_future(app(scope, receive, send))
    getting = None
    try:
        while True:
            getting = asyncio.ensure_future(pieces.get())
            await asyncio.wait({getting, running}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                break
            yield _joined(getting.result(), pieces)
        while not pieces.empty():
            yield _joined(pieces.get_nowait(), pieces)
        await running  # raises what it failed with
    finally:
        gone.set()
        if getting is not None:
            getting.cancel()
        if not running.done():
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def _joined(piece: Head | bytes, more: asyncio.Queue[Head | bytes]) -> Head | bytes:
    """A piece with those that wait already: each that goes out costs a message between processes."""
    while isinstance(piece, bytes) and not more.empty():
        following = more.get_nowait()
        assert isinstance(following, bytes)
        piece += following
    return piece
