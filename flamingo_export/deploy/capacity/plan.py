"""How many replicas keep a promise, found by simulating one of them with its share of the load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from flamingo_export.deploy.capacity.costs import StepCosts
from flamingo_export.deploy.capacity.load import Load, arrivals, day_curve, peak_of
from flamingo_export.deploy.capacity.simulate import Asked, Observed, requests, simulate
from flamingo_export.errors import InputError
from flamingo_reference.arrays import Floats

_REFUSED = 0.001
"""Of the requests, how many may find the queue full."""
_MOST_REPLICAS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a replica is, and what it costs.

    rows, queue: of its engine. gpus: of a GPU; 0 for a machine without. price: of a replica and hour, in any currency.
    count: requests that are simulated on one replica. prepare: whether images arrive as files, which are decoded first.
    """

    rows: int
    queue: int = 64
    gpus: float = 0.0
    price: float | None = None
    count: int = 600
    prepare: bool = True
    seed: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas for a load, and how its requests fare at the busiest hour. Seconds, requests per second, shares of 1.

    busy: share of a replica's time in which its engine works; decode, prefill, encode, copy: of which on what.
    running: requests in its cache rows, on average. refused: share that finds the queue full.
    preparing_cores: cores of the whole fleet that decode images.
    replica_hours: of a day if replicas follow the load from hour to hour; 24 times `replicas` where it does not change.
    price_an_hour: on average over the day, if they follow. price_per_thousand: of a thousand answers.
    limit: what keeps a replica from more: the action that takes most of its time, or its rows.
    """

    rate: float
    replicas: int
    gpus: float
    rate_a_replica: float
    busy: float
    decode: float
    prefill: float
    encode: float
    copy: float
    running: float
    rows: int
    first_token_p50: float
    first_token_p95: float
    answer_p50: float
    answer_p95: float
    answer_p99: float
    refused: float
    tokens_a_second: float
    preparing_cores: float
    replica_hours: int
    price_an_hour: float | None
    price_per_thousand: float | None
    limit: str


class Planner:
    """Finds fleets for rates, in any order; what one took is where the next search begins."""

    def __init__(self, costs: StepCosts, load: Load, pattern: str, promise: float, fleet: Fleet) -> None:
        """promise: seconds within which 95 of 100 answers are to be there.

        Raises InputError for a load that the bundle cannot carry, or a promise that a single request breaks by itself.
        """
        load.check(costs.limits.max_length, costs.limits.bank_rows)
        self._costs, self._load, self._pattern, self._promise, self._fleet = costs, load, pattern, promise, fleet
        self._asked = requests(load, fleet.count, fleet.seed)
        alone = self._observed(1e6 * np.arange(24, dtype=np.float64), self._asked[:24])
        if alone.percentile(0.95) > promise:
            raise InputError(
                f"a single request takes {alone.percentile(0.95):.2f} s (95 of 100), more than the {promise:g} s that were asked for. "
                "No number of replicas helps: ask for fewer tokens or beams, or benchmark faster hardware."
            )
        self._most = self._observed(np.zeros(fleet.count), self._asked, queue=None).throughput
        """Answers a second of a replica that never waits."""
        self._usual = 0.7 * self._most

    def plan(self, rate: float) -> Plan:
        """The smallest fleet that keeps the promise at `rate` requests per second, on average."""
        peak = rate * peak_of(self._pattern)
        tried: dict[int, Observed] = {}

        def keeps(replicas: int) -> bool:
            if peak / replicas > self._most:
                return False
            tried[replicas] = found = self._observed(self._arrived(peak, replicas), self._asked)
            return found.percentile(0.95) <= self._promise and found.refused <= _REFUSED * len(found.answer)

        high = max(1, math.ceil(peak / self._usual))
        low = 0
        while not keeps(high):
            low, high = high, math.ceil(high * 1.25) if high > 3 else high + 1
            if high > _MOST_REPLICAS:
                raise InputError(f"{peak:g} requests per second need more than {_MOST_REPLICAS} replicas.")
        step = max(1, high // 8)
        while high - low > 1:
            middle = max(low + 1, high - step)
            if keeps(middle):
                high, step = middle, step * 2
            else:
                low, step = middle, max(1, (high - middle) // 2)
        self._usual = peak / high
        return self._described(rate, peak, high, tried[high])

    def _arrived(self, rate: float, replicas: int) -> Floats:
        """A replica's share of the fleet's arrivals: each request goes to any replica."""
        pattern = "poisson" if self._pattern == "day" else self._pattern
        if pattern == "poisson":  # a share of independent arrivals is the same at a lower rate
            return arrivals(pattern, rate / replicas, self._fleet.count, self._fleet.seed)
        rng = np.random.default_rng(self._fleet.seed)
        # Twice as many as are wanted, so that the share is not short.
        of_all = arrivals(pattern, rate, 2 * self._fleet.count * replicas, self._fleet.seed)
        return of_all[rng.random(len(of_all)) < 1 / replicas][: self._fleet.count]

    def _observed(self, arrived: Floats, asked: Sequence[Asked], queue: int | None = -1) -> Observed:
        fleet = self._fleet
        return simulate(
            self._costs,
            asked[: len(arrived)],
            arrived,
            beams=self._load.beams,
            rows=fleet.rows,
            queue=fleet.queue if queue == -1 else queue,
            callers=self._load.callers,
            prepare=self._preparing,
        )

    @property
    def _preparing(self) -> float:
        return self._costs.prepare_image * self._load.images if self._fleet.prepare else 0.0

    def _described(self, rate: float, peak: float, replicas: int, found: Observed) -> Plan:
        fleet = self._fleet
        spent = {kind: found.spent.get(kind, 0.0) / found.seconds for kind in ("decode", "prefill", "encode", "copy")}
        hours = 24 * replicas
        if self._pattern == "day":
            of_hours = rate * day_curve((np.arange(24) + 0.5) / 24)
            hours = int(sum(max(1, math.ceil(each * replicas / peak)) for each in of_hours))
        price = None if fleet.price is None else fleet.price * hours / 24
        limit = max(spent, key=lambda kind: spent[kind])
        if found.busy < 0.6 and found.running > 0.9 * fleet.rows:
            limit = "rows"
        return Plan(
            rate=rate,
            replicas=replicas,
            gpus=replicas * fleet.gpus,
            rate_a_replica=peak / replicas,
            busy=found.busy,
            **spent,
            running=found.running,
            rows=fleet.rows,
            first_token_p50=found.percentile(0.5, first=True),
            first_token_p95=found.percentile(0.95, first=True),
            answer_p50=found.percentile(0.5),
            answer_p95=found.percentile(0.95),
            answer_p99=found.percentile(0.99),
            refused=found.refused / len(found.answer),
            tokens_a_second=replicas * found.tokens / found.seconds,
            preparing_cores=peak * self._preparing,
            replica_hours=hours,
            price_an_hour=price,
            price_per_thousand=None if price is None else price / (rate * 3600) * 1000,
            limit=limit,
        )
