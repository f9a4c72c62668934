"""How many requests, and bytes of their bodies, a process holds at once: beyond that clients are asked to come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from flamingo_export.serve.refusals import ApiError

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import Message, Receive


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """body: bytes of one body. requests, bytes: of all requests with a body that are under way."""

    body: int
    requests: int
    bytes: int


class Held:
    """What one process holds at the moment."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.requests = 0
        self.bytes = 0

    @contextmanager
    def body(self, declared: int) -> Iterator[Body]:
        """A place for a request whose body is said to have so many bytes, until its answer is out.

        Raises ApiError 413 for a body that is too large, 429 where too many requests are held, 503 where too many bytes are.
        """
        if self.requests >= self._limits.requests:
            raise ApiError(429, f"{self.requests} requests are under way.", code="queue_full", retry=True)
        self.requests += 1
        body = Body(self, self._limits)
        try:
            body.grow(declared)
            yield body
        finally:
            self.requests -= 1
            self.bytes -= body.size


class Body:
    """What is kept free for one body, and what has come of it."""

    def __init__(self, held: Held, limits: Limits) -> None:
        self._held, self._limits = held, limits
        self.size = 0
        """Bytes that are kept free for it."""
        self._come = 0

    def come(self, count: int) -> None:
        """So many bytes more are there. Raises ApiError as `Held.body` does."""
        self._come += count
        self.grow(self._come - self.size)

    def grow(self, count: int) -> None:
        """Keeps more bytes free, none where the count is not above 0."""
        if count <= 0:
            return
        if self.size + count > self._limits.body:
            raise ApiError(413, f"The body is larger than {self._limits.body} bytes.", code="body_too_large")
        if self._held.bytes + count > self._limits.bytes:
            raise ApiError(503, "Other requests fill the memory for bodies. Try again.", code="bodies_full", retry=True)
        self._held.bytes += count
        self.size += count


def declared(headers: Headers) -> int | None:
    """Bytes that a request says its body has, 0 where it comes in pieces of unknown number, None where there is no body."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > 0:
        return int(length)
    return 0 if "transfer-encoding" in headers else None


def counted(receive: Receive, body: Body) -> Receive:
    """The same messages; raises ApiError in the place of one whose bytes go beyond the limits."""

    async def counting() -> Message:
        message = await receive()
        body.come(len(message.get("body", b"")))
        return message

    return counting
