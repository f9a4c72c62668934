"""What a caller holds of a request that it gave the engine: events as they come, the result, and the way to give it up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from flamingo_export.runtime.timings import Timings

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens that have become certain.

    index: of the text they belong to; beams have one, which is the best, samples one each.
    token_ids, token_logprobs: what follows on that text's earlier events.
    top: (token, log-probability) of the likeliest at each place, where they were asked for.
    """

    index: int
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


class Ticket(Generic[R]):
    """A request under way. Safe from any thread, and from coroutines of any event loop.

    Iterate over it (`for` or `async for`) for its events; `result()` or `await` gives the whole at the end. Nobody waits for a reader: events
    are kept until they are read, and there are at most as many as tokens.
    """

    def __init__(self, cancel: Callable[[Ticket[R]], None], timings: Timings) -> None:
        self.timings = timings
        self._cancel = cancel
        self._changed = threading.Condition()
        self._events: deque[Tokens] = deque()
        self._watchers: list[Callable[[], None]] = []
        self._done = False
        self._result: R | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._done

    def cancel(self) -> None:
        """Gives the request up, whose row is free before the next step. Nothing, if it has ended; `result` raises CancelledError else."""
        if not self._done:
            self._cancel(self)

    def result(self, timeout: float | None = None) -> R:
        """Waits for the end.

        timeout: seconds; None waits as long as it takes.
        Raises TimeoutError, CancelledError (concurrent.futures), or what the request failed with.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"the request is not finished after {timeout} s")
        return self._outcome()

    def next_event(self, timeout: float | None = None) -> Tokens | None:
        """Waits for the next event; None once it has ended and all were read. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._done or self._events, timeout):
                raise TimeoutError(f"the request had nothing to say for {timeout} s")
            return self._events.popleft() if self._events else None

    def __iter__(self) -> Iterator[Tokens]:
        """Its events until the end. Raises what the request failed with."""
        while (event := self.next_event()) is not None:
            yield event
        self._outcome()

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        """As `for`, without holding up the event loop."""
        while True:
            await self._when(lambda: self._done or bool(self._events))
            if not self._events:
                break
            yield self._events.popleft()
        self._outcome()

    def __await__(self) -> Generator[Any, None, R]:
        """The result; cancelling the task that awaits it gives the request up."""
        return self._awaited().__await__()

    async def _awaited(self) -> R:
        await self._when(lambda: self._done)
        return self._outcome()

    async def _when(self, ready: Callable[[], bool]) -> None:
        loop, awake = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(awake.set)
            except RuntimeError:  # the loop was closed, and nobody waits any more
                self.cancel()

        with self._changed:
            self._watchers.append(wake)
        try:
            while True:
                awake.clear()
                with self._changed:
                    if ready():
                        return
                await awake.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            with self._changed:
                self._watchers.remove(wake)

    def _outcome(self) -> R:
        if self._error is not None:
            raise self._error
        return cast(R, self._result)

    # The engine's side.

    def push(self, *events: Tokens) -> None:
        """Adds events."""
        with self._changed:
            self._events.extend(events)
            self._notify()

    def finish(self, result: R) -> None:
        """Ends it well."""
        self._end(result, None)

    def fail(self, error: BaseException) -> None:
        """Ends it with what `result` raises."""
        self._end(None, error)

    def give_up(self) -> None:
        """Ends it as cancelled."""
        self._end(None, CancelledError("the request was cancelled"))

    def _end(self, result: R | None, error: BaseException | None) -> None:
        with self._changed:
            if self._done:
                return
            self._result, self._error, self._done = result, error, True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._watchers:
            wake()


def now() -> float:
    """The clock of deadlines: seconds since some fixed time."""
    return time.monotonic()
