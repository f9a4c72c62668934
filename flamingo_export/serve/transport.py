"""Reading bodies and sending streams, with an eye on clients that are slow or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from flamingo_export.serve.refusals import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


async def read_body(request: Request, *, most: int, seconds: float) -> bytes:
    """The whole body. Raises ApiError 413 before more than `most` bytes are held, 400 if the client takes longer than `seconds`."""
    from starlette.requests import ClientDisconnect

    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise ApiError(413, f"The body is larger than {most} bytes.", code="body_too_large")
    pieces, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise ApiError(413, f"The body is larger than {most} bytes.", code="body_too_large")
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(400, f"The body did not arrive within {seconds:g} seconds.", code="body_timeout") from None
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(pieces)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes. Raises ClientGone then."""
    gone, working = asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (gone, working):
            task.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events. `closing` is closed when the last one was sent, the client has gone, or anything failed.

    A client that takes nothing for `seconds` is taken to have gone: what its request holds is wanted by others.
    """

    def __init__(self, events: AsyncIterator[bytes], closing: ExitStack, headers: dict[str, str], *, seconds: float) -> None:
        self._events, self._closing, self._seconds = events, closing, seconds
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **headers}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
            await self._given(send, {"type": "http.response.start", "status": 200, "headers": headers})
            await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._closing.close()

    async def _send(self, send: Send) -> None:
        async with aclosing(_as_generator(self._events)) as events:
            async for event in events:
                await self._given(send, {"type": "http.response.body", "body": event, "more_body": True})
        await self._given(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _given(self, send: Send, message: dict[str, Any]) -> None:
        """Sends a message, which waits where the client reads more slowly than it is answered. Raises ClientGone."""
        try:
            async with asyncio.timeout(self._seconds):
                await send(message)
        except TimeoutError:
            raise ClientGone from None


async def _as_generator(events: AsyncIterator[bytes]) -> Any:
    try:
        async for event in events:
            yield event
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
