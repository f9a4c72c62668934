"""How many requests, and bytes of their bodies, a process holds at once: beyond that clients are asked to come back.

A byte counts once it is there. Who announces a body and sends nothing takes only a place among the requests, and gives that up to the next one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from flamingo_export.serve.refusals import ApiError

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import Message, Receive

WINDOW = 1.0
"""Seconds over which a body's pace is measured; one that has begun since then is not slow."""
SLOW = 4096
"""Bytes per second. A body that comes more slowly is given up where its place is needed, and only there."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """body: bytes of one body. requests, bytes: of all requests with a body that are under way."""

    body: int
    requests: int
    bytes: int


class Held:
    """What one process holds at the moment. It belongs to one event loop."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._limits, self.clock = limits, clock
        self._bodies: set[Body] = set()
        self.bytes = 0

    @property
    def requests(self) -> int:
        """Requests with a body that are under way."""
        return len(self._bodies)

    @contextmanager
    def body(self, declared: int) -> Iterator[Body]:
        """A place for a request whose body is said to have so many bytes, until its answer is out. They count as they come.

        Raises ApiError 413 for a body that is too large, 429 where too many requests are held, 503 where too few bytes are left for it.
        """
        body = Body(self, self._limits)
        body.check_size(declared)
        if self.requests >= self._limits.requests and not self._give_up_slowest(0):
            raise ApiError(429, f"{self.requests} requests are under way.", code="queue_full", retry=True)
        body.check_room(declared)
        self._bodies.add(body)
        try:
            yield body
        finally:
            self.drop(body)

    def drop(self, body: Body) -> None:
        """Its bytes and its place are free."""
        if body in self._bodies:
            self._bodies.remove(body)
            self.bytes -= body.size

    def room(self, count: int, besides: Body) -> bool:
        """Whether so many bytes more fit. Slow bodies other than `besides` are given up where they do not."""
        while self.bytes + count > self._limits.bytes:
            if not self._give_up_slowest(1, besides):
                return False
        return True

    def _give_up_slowest(self, least: int, besides: Body | None = None) -> bool:
        """Whether there was a slow body of at least so many bytes; the slowest is given up."""
        now = self.clock()
        slow = [
            (pace, -body.size, body)
            for body in self._bodies - {besides}
            if body.size >= least and (pace := body.pace(now)) < SLOW
        ]
        if not slow:
            return False
        victim = min(slow, key=lambda each: each[:2])[2]
        self.drop(victim)
        victim.give_up()
        return True


class Body:
    """What has come of one body, and how fast."""

    def __init__(self, held: Held, limits: Limits) -> None:
        self._held, self._limits = held, limits
        self.size = 0
        """Bytes that have come."""
        self._since, self._then, self._pace = held.clock(), 0, math.inf
        self._waiting: asyncio.Timeout | None = None
        self._given_up = False

    def check_size(self, count: int) -> None:
        """Raises ApiError 413 where so many bytes more make it too large."""
        if self.size + count > self._limits.body:
            raise ApiError(413, f"The body is larger than {self._limits.body} bytes.", code="body_too_large")

    def check_room(self, count: int) -> None:
        """Raises ApiError 503 where so many bytes more do not fit beside other bodies."""
        if count > 0 and not self._held.room(count, self):
            raise ApiError(503, "Other requests fill the memory for bodies. Try again.", code="bodies_full", retry=True)

    def come(self, count: int) -> None:
        """So many bytes more are there. Raises ApiError where they do not fit, or the body was given up."""
        if self._given_up:
            raise _too_slow()
        self.check_size(count)
        self.check_room(count)
        self.size += count
        self._held.bytes += count
        self._measure(self._held.clock())

    async def wait(self, receive: Receive) -> Message:
        """The next message. Raises ApiError 503 where the body is given up meanwhile."""
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await receive()
        except TimeoutError:
            if self._given_up:
                raise _too_slow() from None
            raise
        finally:
            self._waiting = None

    def give_up(self) -> None:
        """Who waits for more of it gets a refusal."""
        assert self._waiting is not None
        self._given_up = True
        self._waiting.reschedule(asyncio.get_running_loop().time())

    def pace(self, now: float) -> float:
        """Bytes per second at which it comes; infinite where it is not waited for."""
        if self._waiting is None:
            return math.inf
        self._measure(now)
        return self._pace

    def _measure(self, now: float) -> None:
        if now - self._since >= WINDOW:
            self._pace = (self.size - self._then) / (now - self._since)
            self._since, self._then = now, self.size


def _too_slow() -> ApiError:
    text = "The body came so slowly that its place was given to another request. Try again."
    return ApiError(503, text, code="body_too_slow", retry=True)


def declared(headers: Headers) -> int | None:
    """Bytes that a request says its body has, 0 where it comes in pieces of unknown number, None where there is no body."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > 0:
        return int(length)
    return 0 if "transfer-encoding" in headers else None


def counted(receive: Receive, body: Body) -> Receive:
    """The same messages; raises ApiError in the place of one whose bytes go beyond the limits, or for which others could not wait."""
    whole = False

    async def counting() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        message = await body.wait(receive)
        body.come(len(message.get("body", b"")))
        whole = not message.get("more_body", False)
        return message

    return counting
