"""What the engine does next: a pure function of what waits and runs, and of the time.

    waiting ── ADMIT ──> encoding ──> prefill ──> decoding ──> finished
                         └─────── WORK ───────┘  └─ DECODE ─┘

Within a caller requests are admitted first come, first served; among callers by deficit round robin (Shreedhar and Varghese, 1995), a
request's cost being the tokens it asks the decoder for. A request that does not fit yet (its media have no room in the bank) may be
overtaken MAX_OVERTAKEN times; then nothing newer is admitted before it. Between two decoding steps runs at most one piece of work: a
chunk of one prompt, or one call of the vision encoder. Where nobody waits for single tokens (`patient`), prompts come first: more requests
share each step. They end in finite time: each of them keeps its row until it has decoded, and there are only so many rows.

Nothing here knows a backend or reads a clock, so tests and simulations run it under a clock of their own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, NamedTuple, TypeVar

QUANTUM = 512
"""Tokens that a caller's turn is worth: about those of a usual request."""
MAX_OVERTAKEN = 16
NEVER = math.inf


class Kind(Enum):
    """Kinds of actions."""

    IDLE = auto()
    EXPIRE = auto()
    ADMIT = auto()
    WORK = auto()
    DECODE = auto()


@dataclass(eq=False, kw_only=True)
class Entry:
    """A request, as far as scheduling knows it.

    cost: prompt tokens and branches times new tokens.
    media: digests of its media and the rows of the bank that each of them takes while it runs.
    deadline: when it is given up, on the clock that `next_action` is given.
    patient: only its end counts, as of one of a list whose texts are wanted together. After its prompt it decodes, and does not score.
    """

    cost: int
    caller: str = ""
    media: Mapping[bytes, int] = field(default_factory=dict)
    deadline: float = NEVER
    arrived: int = -1
    overtaken: int = 0
    patient: bool = False


E = TypeVar("E", bound=Entry)


class Action(NamedTuple, Generic[E]):
    """What to do, and for whom."""

    kind: Kind
    entry: E | None = None


@dataclass(eq=False, kw_only=True)
class Schedule(Generic[E]):
    """What waits and what runs. The methods are the transitions; `next_action` changes nothing.

    rows: requests that may run at once. bank_rows: that the different media which they show may take together.
    """

    rows: int
    bank_rows: int
    working: list[E] = field(default_factory=list)
    """Admitted, in that order: media are to be encoded, or parts of the prompt to be computed."""
    decoding: list[E] = field(default_factory=list)
    worked: bool = False
    """Whether a piece of work was done since the last decoding step."""
    pinned: dict[bytes, int] = field(default_factory=dict)
    """Media of what runs, and how many requests show each."""
    pinned_rows: int = 0
    """Rows of the bank that they take together."""
    queues: dict[str, deque[E]] = field(default_factory=dict)
    ring: list[str] = field(default_factory=list)
    """Callers that wait. It is the first one's turn, for which it has been given its quantum."""
    deficits: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    soonest: float = NEVER
    """No deadline is before this."""
    _arrivals: int = 0

    @property
    def running(self) -> int:
        return len(self.working) + len(self.decoding)

    def entries(self) -> Iterator[E]:
        """All that waits and runs."""
        for queue in self.queues.values():
            yield from queue
        yield from self.working
        yield from self.decoding

    def arrive(self, entry: E) -> None:
        """A request joins its caller's queue."""
        entry.arrived = self._arrivals
        self._arrivals += 1
        if entry.caller not in self.queues:
            self.queues[entry.caller] = deque()
            self.deficits[entry.caller] = QUANTUM if not self.ring else 0
            self.ring.append(entry.caller)
        self.queues[entry.caller].append(entry)
        self.waiting += 1
        self.soonest = min(self.soonest, entry.deadline)

    def admit(self, entry: E) -> None:
        """What `next_action` chose is admitted: turns pass, and those that were due before it were overtaken."""
        for other in _due(self):
            if other is entry:
                break
            other.overtaken += 1
        self._pass_turns(entry)
        self.deficits[entry.caller] -= entry.cost
        self._dequeue(entry)
        for digest, rows in entry.media.items():
            self.pinned_rows += rows if digest not in self.pinned else 0
            self.pinned[digest] = self.pinned.get(digest, 0) + 1
        self.working.append(entry)

    def work_done(self, entry: E, *, decodes: bool) -> None:
        """A piece of work was done; decodes: it was the last one, steps follow."""
        self.worked = True
        if decodes:
            self.working.remove(entry)
            self.decoding.append(entry)

    def decoded(self) -> None:
        """A decoding step was done."""
        self.worked = False

    def leave(self, entry: E) -> None:
        """A request ends, wherever it stands: finished, failed or given up."""
        queue = self.queues.get(entry.caller)
        if queue is not None and entry in queue:
            self._dequeue(entry)
            return
        for running in (self.working, self.decoding):
            if entry in running:
                running.remove(entry)
                break
        else:
            return
        for digest, rows in entry.media.items():
            self.pinned[digest] -= 1
            if not self.pinned[digest]:
                del self.pinned[digest]
                self.pinned_rows -= rows

    def expired(self) -> None:
        """All whose deadline had passed have left."""
        self.soonest = min((entry.deadline for entry in self.entries()), default=NEVER)

    def _dequeue(self, entry: E) -> None:
        queue = self.queues[entry.caller]
        queue.remove(entry)
        self.waiting -= 1
        if not queue:  # who has nothing waiting keeps no credit
            del self.queues[entry.caller], self.deficits[entry.caller]
            had_turn = self.ring[0] == entry.caller
            self.ring.remove(entry.caller)
            if had_turn and self.ring:
                self.deficits[self.ring[0]] += QUANTUM

    def _pass_turns(self, entry: E) -> None:
        """Deficit round robin up to the turn in which this request is affordable; the ring then begins with its caller."""
        turns, size = _turns(self, entry), len(self.ring)
        for distance, caller in enumerate(self.ring):
            first = distance or size
            visits = 0 if turns < first else (turns - first) // size + 1
            # One that waits for room collects no more than it needs.
            most = max(self.deficits[caller], self.queues[caller][0].cost + QUANTUM)
            self.deficits[caller] = min(self.deficits[caller] + visits * QUANTUM, most)
        place = self.ring.index(entry.caller)
        self.ring = self.ring[place:] + self.ring[:place]


def next_action(schedule: Schedule[E], now: float) -> Action[E]:
    """What to do at time `now`.

    EXPIRE: requests whose deadline has passed leave. ADMIT: a request gets a cache row and bank rows for its media. WORK: the next piece of
    encoding or prefill of a request. DECODE: a step of all that decode. IDLE: nothing until something arrives.
    """
    if schedule.soonest <= now:
        return Action(Kind.EXPIRE)
    if schedule.waiting and schedule.running < schedule.rows:
        chosen = _choice(schedule)
        if chosen is not None:
            return Action(Kind.ADMIT, chosen)
    if schedule.working and not (schedule.worked and _waited_for(schedule)):
        return Action(Kind.WORK, schedule.working[0])
    return Action(Kind.DECODE if schedule.decoding else Kind.IDLE)


def overdue(entries: Iterable[E], now: float) -> list[E]:
    """Those whose deadline has passed."""
    return [entry for entry in entries if entry.deadline <= now]


def _waited_for(schedule: Schedule[E]) -> bool:
    """Whether a step is due before the next piece of work. Work of a request that will score might go on for ever; one that decodes after its
    prompt fills a row."""
    return bool(schedule.decoding) and not (schedule.working[0].patient and all(entry.patient for entry in schedule.decoding))


def _choice(schedule: Schedule[E]) -> E | None:
    """The first of those due that fits, unless one that was overtaken too often is older."""
    due = _due(schedule)
    patience = min((entry.arrived for entry in due if entry.overtaken >= MAX_OVERTAKEN), default=None)
    for entry in due:
        if (patience is None or entry.arrived <= patience) and _fits(schedule, entry):
            return entry
    return None


def _due(schedule: Schedule[E]) -> list[E]:
    """The first request of each caller, in the order of deficit round robin."""
    heads = [schedule.queues[caller][0] for caller in schedule.ring]
    return heads if len(heads) == 1 else sorted(heads, key=lambda entry: _turns(schedule, entry))


def _turns(schedule: Schedule[E], entry: E) -> int:
    """Turns that pass until the request is affordable; 0: it is the turn of its caller, who can afford it. No two are equal."""
    size, distance = len(schedule.ring), schedule.ring.index(entry.caller)
    missing = entry.cost - schedule.deficits[entry.caller]
    rounds = max(0, -(-missing // QUANTUM))
    if distance == 0:
        return rounds * size
    return distance + (max(rounds, 1) - 1) * size


def _fits(schedule: Schedule[E], entry: E) -> bool:
    new = sum(rows for digest, rows in entry.media.items() if digest not in schedule.pinned)
    return schedule.pinned_rows + new <= schedule.bank_rows
