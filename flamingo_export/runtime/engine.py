"""The engine: one loop that many callers share. Requests join and leave between steps, from any thread.

    engine = Engine(engines, config, limits, rows=8)
    ticket = engine.submit(prepared, GenerateOptions(beams=1), caller="key 7", deadline=now() + 30, events=True)
    for event in ticket: ...              # Tokens(index, token_ids, token_logprobs), as they become certain
    outcome = ticket.result(timeout=60)   # Outcome(hypotheses), or raises; ticket.timings says where the time went
    ticket.cancel()                       # the row is free before the next step

    async for event in ticket: ...        # the same without holding up an event loop
    outcome = await ticket                # cancelling the task cancels the request

`submit_score` gives log-probabilities of candidate answers. `stats()` is what a metrics page shows. `complete(ticket)` is `result` for
callers that have nothing else to do: where nobody else uses the engine, the steps run in the caller's own thread, which saves a change of
threads. In all other cases a thread of the engine's own runs them; it starts when it is needed and ends after a second without work.

Refused at once, before any work: a request that can never fit (CapacityError, InputError), a full queue (QueueFull), a closed engine
(EngineClosed). A request that fails, say in its backend, fails by itself or with those it shared the step with; the engine continues.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import BackendLost, CapacityError, EngineClosed, InputError, QueueFull
from flamingo_export.runtime.cache import check_positions
from flamingo_export.runtime.constraints import Forms
from flamingo_export.runtime.jobs import Generating, Group, Job, Scoring
from flamingo_export.runtime.loop import Loop, Outcome
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.prefill import check_ranges
from flamingo_export.runtime.request import Prepared
from flamingo_export.runtime.scheduler import NEVER
from flamingo_export.runtime.search import Search
from flamingo_export.runtime.steering import Decode
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.runtime.ticket import Ticket, now
from flamingo_export.runtime.timings import Timings
from flamingo_reference.config import ModelConfig

DEFAULT_ROWS = 16
MAX_TOKENS_AT_ONCE = 512
"""Candidate tokens of one scoring pass; more go in several, so that the logits [1, K, V] stay small."""
_IDLE_SECONDS = 1.0
_COUNTS = (
    "finished", "failed", "cancelled", "steps", "prompt_tokens", "reused_tokens", "generated_tokens", "media_encoded",
    "media_reused", "shared_rows",
)  # fmt: skip
_log = logging.getLogger(__name__)
_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine is doing, and has done since it was made.

    waiting, running: requests. rows, bank_rows: how many there are, `..._in_use` of them by running requests.
    failed_in_a_row: actions that failed since a step succeeded; a backend that is broken raises it with each request.
    The rest are counts since the start. steps: decoder calls that decode. generated_tokens: steps of each request, however many branches.
    shared_rows: requests that were given a place in another's row.
    """

    waiting: int
    running: int
    rows: int
    rows_in_use: int
    bank_rows: int
    bank_rows_in_use: int
    bank_rows_filled: int
    failed_in_a_row: int
    finished: int
    failed: int
    cancelled: int
    refused: int
    steps: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    media_encoded: int
    media_reused: int
    shared_rows: int


class Engine:
    """Carries requests of many callers through one loop. All methods are safe from any thread."""

    def __init__(
        self,
        engines: Engines,
        config: ModelConfig,
        limits: ShapeLimits,
        *,
        rows: int | None = None,
        queue: int | None = None,
        decode: Decode | None = None,
        forms: Forms | None = None,
        clock: Callable[[], float] = now,
    ) -> None:
        """Over opened subgraphs, which stay the caller's to close.

        rows: requests that run at once; None: 16, or as many as the engines were built for.
        queue: requests that may wait beside them; None: any number.
        decode: token ids to text, in which stop texts are looked for. forms: compiles the forms that answers must have.
        clock: of deadlines.
        Raises InputError for more rows than the engines take.
        """
        self.config, self.limits = config, limits
        most = engines.decoder.largest.get("B")
        if rows is not None and not 1 <= rows <= (most or rows):
            raise InputError(
                f"{rows} rows were asked for, the engines take 1 to {most}. Build them with a larger limit (batch)."
            )
        self.rows = rows or min(DEFAULT_ROWS, most or DEFAULT_ROWS)
        self._queue, self._decode, self._forms = queue, decode, forms
        self.loop = Loop(engines, config, limits, self.rows, clock)
        self._driving = threading.Lock()
        self._submitting = threading.Lock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._refused = 0
        _ENGINES.add(self)

    def check(self, request: Prepared, width: int) -> None:
        """Raises InputError for what the engine can never hold: branches of a request, frames of a video, media at once."""
        most = self.loop.decoder.largest.get("S")
        if most is not None and width > most:
            raise InputError(f"{width} beams or samples of a request were asked for, the engine takes {most}. Ask for fewer.")
        self.loop.encoder.check(request.media)
        self.loop.bank.check(request.media)
        check_ranges(request.phi, request.first, self.loop.limits.max_tiles)

    def new_tokens(self, request: Prepared, options: GenerateOptions) -> int:
        """Tokens that a request gets at most. Raises InputError if it can never be carried out."""
        self.check(request, options.width)
        return options.new_tokens(len(request.token_ids), self.limits, self.config.language_model.position_limit)

    def submit(
        self,
        request: Prepared,
        options: GenerateOptions,
        *,
        caller: str = "",
        deadline: float | None = None,
        events: bool = False,
        wake: bool = True,
        group: Group | None = None,
        timings: Timings | None = None,
    ) -> Ticket[Outcome]:
        """Hands in a request to generate text.

        caller: whose turn it counts against; callers are served alternately, each one's requests in their order.
        deadline: when to give it up, on the clock `ticket.now`.
        events: whether tokens are given out as they become certain.
        wake: False leaves the steps to a call of `complete` that follows at once.
        group: of requests that are wanted together and share a bound on how many of them run at once; unless `events`, their prompts come
        before the steps of any of them.
        timings: to be filled, with `prepare` in it.
        Raises InputError for what can never be carried out, QueueFull, EngineClosed.
        """
        options.check(self.config)
        limit = self.new_tokens(request, options)
        prompt = request.token_ids.tolist()
        search = options.search(self.config, limit, prompt=prompt, decode=self._decode, forms=self._forms)
        return self.submit_search(
            request,
            search,
            steps=limit,
            cost=len(request.token_ids) + search.width * limit,
            caller=caller,
            deadline=deadline,
            events=events,
            wake=wake,
            group=group,
            timings=timings,
        )

    def submit_search(
        self,
        request: Prepared,
        search: Search,
        *,
        steps: int | None = None,
        cost: int = 0,
        timings: Timings | None = None,
        **rest: Any,
    ) -> Ticket[Outcome]:
        """As `submit`, with a search that is given. It must end before the request's slots do. steps: after which it ends at the latest."""
        self.check(request, search.width)
        ticket: Ticket[Outcome] = Ticket(self._revoke, timings or Timings())

        def job(**settings: Any) -> Job:
            return Generating(search, steps, self.config.tokens.reset, request, ticket, cost=cost, **settings)

        return self._submit(ticket, job, **rest)

    def submit_score(
        self,
        request: Prepared,
        candidates: Sequence[Sequence[int]],
        *,
        timings: Timings | None = None,
        likeliest: list[list[tuple[int, float]]] | None = None,
        **rest: Any,
    ) -> Ticket[list[list[float]]]:
        """Hands in candidate answers, at least one token each, for the log-probability of each of their tokens after the request's prompt.

        Tokens that are never generated have probability zero. Settings are those of `submit`.
        likeliest: a list to be filled with the likeliest token (id, log-probability) at each place of each candidate.
        Raises CapacityError before work if prompt and the longest candidate do not fit.
        """
        prompt, limits, largest = len(request.token_ids), self.limits, self.loop.decoder.largest
        # The last token of a candidate is predicted, never run.
        longest = max(len(candidate) - 1 for candidate in candidates)
        check_positions(prompt=prompt, new_tokens=longest + 1, position_limit=self.config.language_model.position_limit)
        if prompt + longest > limits.max_length:
            raise CapacityError(
                f"a prompt of {prompt} tokens with a candidate of {longest + 1} needs {prompt + longest} cache slots, "
                f"the bundle allows {limits.max_length}. Use fewer shots or shorter candidates, or build with a larger --max-length."
            )
        at_once = min(MAX_TOKENS_AT_ONCE, *(largest.get(size, MAX_TOKENS_AT_ONCE) for size in "SK"))
        if longest > largest.get("S", longest):
            raise CapacityError(
                f"a candidate of {longest + 1} tokens was given, the engine takes {at_once + 1}. Use shorter candidates."
            )
        self.check(request, 1)
        room = min(at_once, limits.max_length - prompt)
        ticket: Ticket[list[list[float]]] = Ticket(self._revoke, timings or Timings())
        banned, reset = self.config.banned_logits, self.config.tokens.reset
        cost = prompt + sum(len(candidate) for candidate in candidates)

        def job(**settings: Any) -> Job:
            return Scoring(candidates, room, banned, reset, request, ticket, likeliest, cost=cost, **settings)

        return self._submit(ticket, job, **rest)

    def complete(self, *tickets: Ticket[R]) -> list[R]:
        """Waits for these requests and returns their results, running the steps here as long as there are no other requests.

        An interrupt (KeyboardInterrupt) gives them up. Raises what the first that failed failed with, the others given up.
        """
        try:
            if self._driving.acquire(blocking=False):
                try:
                    while self._only(tickets) and not all(ticket.done for ticket in tickets):
                        self.loop.tick()
                except BaseException:  # an interrupt, at any point of the loop's bookkeeping
                    self.loop.abandon(None)
                    raise
                finally:
                    self._driving.release()
            self._ensure_driven()
            return [ticket.result() for ticket in tickets]
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise

    @contextmanager
    def by_hand(self) -> Iterator[Loop]:
        """The loop for the length of a `with` block in which nobody else runs it: for measurements and tests that look at single actions."""
        with self._driving:
            yield self.loop
        self._ensure_driven()

    @property
    def lost(self) -> BackendLost | None:
        """Why its device cannot be used any more, in which case requests that run, wait or come fail with it."""
        return self.loop.lost

    def stats(self) -> EngineStats:
        """A snapshot; its parts may be a step apart."""
        loop, counts = self.loop, self.loop.counts
        running = loop.schedule.running
        return EngineStats(
            waiting=max(0, loop.size - running),
            running=running,
            rows=self.rows,
            rows_in_use=sum(row.busy for row in loop.cache.rows),
            bank_rows=loop.bank.capacity,
            bank_rows_in_use=loop.bank.pinned,
            bank_rows_filled=loop.bank.filled,
            failed_in_a_row=loop.failed_in_a_row,
            refused=self._refused,
            **{name: counts[name] for name in _COUNTS},
        )

    def close(self) -> None:
        """Gives up what runs and waits (EngineClosed), and ends the engine's thread."""
        with self._submitting:
            self._closed = True
        with self._wake:
            self._wake.notify_all()
        with self._driving:
            self.loop.drop(_closed)

    def _submit(
        self,
        ticket: Ticket[R],
        job: Callable[..., Job],
        *,
        caller: str = "",
        deadline: float | None = None,
        events: bool = False,
        wake: bool = True,
        group: Group | None = None,
    ) -> Ticket[R]:
        made = job(caller=caller, deadline=NEVER if deadline is None else deadline, events=events, group=group)
        with self._submitting:
            if self._closed:
                raise _closed()
            if self.lost is not None:
                raise self.lost
            if self._queue is not None and self.loop.size >= self.rows + self._queue:
                self._refused += 1
                waiting = self.loop.size - self.loop.schedule.running
                raise QueueFull(f"{waiting} requests wait already, and no more than {self._queue} are kept. Try again later.")
            self.loop.inbox.append(made)
        if wake:
            self._ensure_driven()
        return ticket

    def _revoke(self, ticket: Ticket[Any]) -> None:
        self.loop.revoked.append(ticket)
        self._ensure_driven()

    def _only(self, tickets: Sequence[Ticket[Any]]) -> bool:
        return self.loop.size <= sum(not ticket.done for ticket in tickets)

    # The engine's own thread.

    def _ensure_driven(self) -> None:
        """Wakes or starts the thread if there is work; whoever runs steps now looks again before stopping, so nothing is left lying."""
        if not self._busy():
            return
        with self._wake:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._drive, name="flamingo-export engine", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def _busy(self) -> bool:
        return bool(self.loop.size or self.loop.revoked)

    def _drive(self) -> None:
        while True:
            with self._driving:
                try:
                    while not self._closed and self.loop.tick():
                        pass
                except BaseException as error:  # a fault of the loop itself: nobody may wait for ever
                    _log.exception("the engine failed")
                    self.loop.abandon(error)
            with self._wake:
                if not (self._closed or self._busy()):
                    self._wake.wait(_IDLE_SECONDS)
                if self._closed or not self._busy():
                    self._thread = None
                    return


def _closed() -> EngineClosed:
    return EngineClosed("the model is closed. Load the bundle again.")


@atexit.register
def _close_all() -> None:
    """A process that ends must not leave a thread within a backend's call."""
    for engine in list(_ENGINES):
        engine.close()
