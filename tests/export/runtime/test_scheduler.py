"""The scheduler under a clock of its own: order, fairness, bounds, and that nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from flamingo_export.runtime.scheduler import MAX_OVERTAKEN, QUANTUM, Entry, Kind, Schedule, next_action, overdue


def entry(caller: str = "", cost: int = 100, media: str = "", deadline: float = float("inf")) -> Entry:
    return Entry(caller=caller, cost=cost, media={letter.encode(): 1 for letter in media}, deadline=deadline)


def admitted(schedule: Schedule[Entry], count: int) -> list[Entry]:
    """The next requests that are admitted, each leaving at once."""
    found = []
    for _ in range(count):
        kind, chosen = next_action(schedule, 0.0)
        assert kind is Kind.ADMIT
        assert chosen is not None
        schedule.admit(chosen)
        schedule.leave(chosen)
        found.append(chosen)
    return found


def test_within_a_caller_first_come_first_served() -> None:
    schedule: Schedule[Entry] = Schedule(rows=2, bank_rows=4)
    entries = [entry(cost=cost) for cost in (5000, 10, 700, 1)]
    for each in entries:
        schedule.arrive(each)
    assert admitted(schedule, 4) == entries
    assert next_action(schedule, 0.0).kind is Kind.IDLE


def test_callers_get_equal_shares_of_tokens_not_of_requests() -> None:
    schedule: Schedule[Entry] = Schedule(rows=1, bank_rows=4)
    for _ in range(200):
        schedule.arrive(entry("long", 4 * QUANTUM))
    for _ in range(800):
        schedule.arrive(entry("short", QUANTUM))
    tokens: Counter[str] = Counter()
    for each in admitted(schedule, 500):
        tokens[each.caller] += each.cost
        assert abs(tokens["long"] - tokens["short"]) <= 5 * QUANTUM


def test_a_flood_holds_nobody_up() -> None:
    schedule: Schedule[Entry] = Schedule(rows=1, bank_rows=4)
    for _ in range(1000):
        schedule.arrive(entry("flood", 400))
    admitted(schedule, 3)
    late = entry("other", 900)
    schedule.arrive(late)
    assert late in admitted(schedule, 6)


def test_what_does_not_fit_is_overtaken_so_often_and_no_more() -> None:
    schedule: Schedule[Entry] = Schedule(rows=4, bank_rows=3)
    holder, blocked = entry("a", media="xy"), entry("b", media="pq")
    for each in (holder, blocked):
        schedule.arrive(each)
    assert admitted_and_kept(schedule) is holder
    overtakers = 0
    while True:
        schedule.arrive(entry("c"))
        kind, chosen = next_action(schedule, 0.0)
        if kind is not Kind.ADMIT:
            break
        assert chosen is not None
        schedule.admit(chosen)
        schedule.leave(chosen)
        overtakers += 1
    assert overtakers == MAX_OVERTAKEN
    schedule.leave(holder)
    assert next_action(schedule, 0.0).entry is blocked


def admitted_and_kept(schedule: Schedule[Entry]) -> Entry:
    _, chosen = next_action(schedule, 0.0)
    assert chosen is not None
    schedule.admit(chosen)
    return chosen


def test_the_same_media_take_rows_once() -> None:
    schedule: Schedule[Entry] = Schedule(rows=4, bank_rows=2)
    for media in ("xy", "yx", "z"):
        schedule.arrive(entry(media=media))
    first, second = admitted_and_kept(schedule), admitted_and_kept(schedule)
    schedule.working.clear()
    assert next_action(schedule, 0.0).kind is Kind.IDLE
    schedule.working += [first, second]
    schedule.leave(first)
    assert next_action(schedule, 0.0).kind is not Kind.ADMIT
    schedule.leave(second)
    assert next_action(schedule, 0.0).kind is Kind.ADMIT


def test_one_piece_of_work_between_two_steps() -> None:
    schedule: Schedule[Entry] = Schedule(rows=3, bank_rows=4)
    schedule.arrive(entry())
    first = admitted_and_kept(schedule)
    schedule.work_done(first, decodes=True)
    for _ in range(2):
        schedule.arrive(entry())
        admitted_and_kept(schedule)
    kinds = []
    for _ in range(6):
        kind, chosen = next_action(schedule, 0.0)
        kinds.append(kind)
        if chosen is None:
            schedule.decoded()
        else:
            schedule.work_done(chosen, decodes=False)
    assert kinds == [Kind.DECODE, Kind.WORK] * 3


def test_deadlines_come_first() -> None:
    schedule: Schedule[Entry] = Schedule(rows=1, bank_rows=4)
    early, late = entry(deadline=5.0), entry(deadline=9.0)
    for each in (late, early):
        schedule.arrive(each)
    assert next_action(schedule, 4.9).kind is Kind.ADMIT
    assert next_action(schedule, 5.0).kind is Kind.EXPIRE
    assert overdue(schedule.entries(), 5.0) == [early]
    schedule.leave(early)
    schedule.expired()
    assert next_action(schedule, 8.9).kind is Kind.ADMIT
    assert next_action(schedule, 9.0).kind is Kind.EXPIRE


@dataclass
class Simulation:
    """Callers that send at random, and an engine that takes a millisecond for a piece of work or a step."""

    seed: int
    arrivals: int
    schedule: Schedule[Entry] = field(default_factory=lambda: Schedule(rows=4, bank_rows=6))
    now: float = 0.0

    def run(self) -> None:
        rng = random.Random(self.seed)
        todo: dict[Entry, list[int]] = {}
        waiting: dict[Entry, int] = {}
        order: dict[str, list[int]] = {}
        sent = finished = admissions = 0
        since_step = 0
        next_arrival = 0.0
        while sent < self.arrivals or todo or waiting:
            while sent < self.arrivals and next_arrival <= self.now:
                caller = rng.choice("aaaaaaabcd")
                media = "".join(rng.sample("uvwxyz", rng.choice([0, 0, 1, 1, 2, 5])))
                each = entry(caller, rng.choice([20, 100, 600, 3000]), media, self.now + rng.choice([1e9, 1e9, 1e9, 0.05]))
                self.schedule.arrive(each)
                waiting[each] = admissions
                sent += 1
                # Bursts, and pauses in which everything is finished.
                next_arrival += rng.choice([0.0, 0.0, 0.001, 0.004, 0.03] if sent % 500 else [1.0])
            kind, chosen = next_action(self.schedule, self.now)
            again = next_action(self.schedule, self.now)
            assert (kind, chosen) == tuple(again)  # nothing was changed by asking
            if kind is Kind.EXPIRE:
                late = overdue(self.schedule.entries(), self.now)
                for each in late:
                    self.schedule.leave(each)
                    waiting.pop(each, None)
                    todo.pop(each, None)
                self.schedule.expired()
            elif kind is Kind.ADMIT:
                assert chosen is not None
                self.schedule.admit(chosen)
                admissions += 1
                order.setdefault(chosen.caller, []).append(chosen.arrived)
                # What has no room is overtaken so often, and by those admitted while others of the same kind were due.
                del waiting[chosen]
                assert chosen.overtaken <= MAX_OVERTAKEN + len(self.schedule.ring) + 4
                todo[chosen] = [rng.randint(1, 4), rng.randint(1, 12)]
            elif kind is Kind.WORK:
                assert chosen is not None
                since_step += 1
                assert since_step <= 1 or not self.schedule.decoding
                todo[chosen][0] -= 1
                self.schedule.work_done(chosen, decodes=todo[chosen][0] == 0)
                self.now += 0.001
            elif kind is Kind.DECODE:
                since_step = 0
                for each in list(self.schedule.decoding):
                    todo[each][1] -= 1
                    if todo[each][1] <= 0 or rng.random() < 0.02:  # some are cancelled
                        self.schedule.leave(each)
                        del todo[each]
                        finished += 1
                self.schedule.decoded()
                self.now += 0.001
            else:
                assert not todo, "work lies, and nothing is done"
                assert not waiting, "a request waits, and nothing runs that could make room"
                self.now = next_arrival
            assert self.schedule.running == len(todo) <= self.schedule.rows
            assert len(self.schedule.pinned) <= self.schedule.bank_rows
            assert self.schedule.waiting == len(waiting)
        assert finished > self.arrivals / 4
        assert not self.schedule.pinned
        assert not self.schedule.ring
        assert all(arrived == sorted(arrived) for arrived in order.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals(seed: int) -> None:
    """100,000 in all: no starvation, no deadlock, bounds kept at every moment."""
    Simulation(seed, 25_000).run()


def test_prompts_of_patient_requests_come_before_their_steps() -> None:
    """All of a list are computed before any of it decodes; one that somebody waits for brings the alternation back; so does a request that
    will score, whose work may have no end."""
    schedule: Schedule[Entry] = Schedule(rows=4, bank_rows=4)
    patient = [Entry(cost=1, patient=True) for _ in range(3)]
    for entry in patient:
        schedule.arrive(entry)
    for entry in patient:
        assert next_action(schedule, 0.0) == (Kind.ADMIT, entry)
        schedule.admit(entry)
    for entry in patient:
        assert next_action(schedule, 0.0) == (Kind.WORK, entry)
        schedule.work_done(entry, decodes=True)
    assert next_action(schedule, 0.0).kind is Kind.DECODE
    schedule.decoded()
    waits = Entry(cost=1)
    schedule.arrive(waits)
    schedule.admit(waits)
    assert next_action(schedule, 0.0) == (Kind.WORK, waits)
    schedule.work_done(waits, decodes=False)  # more of it is to come, and others decode
    assert next_action(schedule, 0.0).kind is Kind.DECODE
    schedule.decoded()
    schedule.work_done(waits, decodes=True)
    schedule.leave(patient[0])
    late = Entry(cost=1, patient=True)
    schedule.arrive(late)
    schedule.admit(late)
    assert next_action(schedule, 0.0).kind is Kind.DECODE  # somebody waits for the tokens of one that decodes
