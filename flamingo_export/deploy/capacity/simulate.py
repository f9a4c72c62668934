"""One replica under a load: the real engine, its subgraphs' time on a virtual clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flamingo_export.deploy.capacity.costs import StepCosts
from flamingo_export.deploy.capacity.load import Load
from flamingo_export.deploy.capacity.stand_in import Clock, stand_ins
from flamingo_export.errors import QueueFull
from flamingo_export.runtime.candidates import Scores
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.request import Prepared, prepared_from_ids
from flamingo_export.runtime.search import Certain, Hypothesis, Step
from flamingo_reference.arrays import Floats
from flamingo_reference.config import NANO

_WARM_UP = 0.1
"""Of the requests, those at the start: the engine is empty when they come."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request's size: token ids [P] with image tags, a number for each image, and new tokens."""

    token_ids: npt.NDArray[np.int64]
    images: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Observed:
    """How requests fared, in order of arrival; not a number for those that were refused.

    first_token, answer: seconds from arrival, float64 [R]. seconds: until the last answer. spent: seconds the engine was busy, by kind.
    running: requests in a cache row, averaged over time. tokens: generated, those of all branches of a step being one.
    refused: requests that found the queue full.
    """

    arrived: Floats
    first_token: Floats
    answer: Floats
    seconds: float
    running: float
    tokens: int
    refused: int
    spent: Mapping[str, float] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return float(np.isfinite(self.answer).sum()) / self.seconds if self.seconds else 0.0

    @property
    def busy(self) -> float:
        """Share of the time in which the engine worked."""
        return min(1.0, sum(self.spent.values()) / self.seconds) if self.seconds else 0.0

    def percentile(self, share: float, *, first: bool = False) -> float:
        """Of seconds to the whole answer, or to the first token, those that came while the engine was empty left out."""
        found = (self.first_token if first else self.answer)[int(len(self.answer) * _WARM_UP) :]
        found = found[np.isfinite(found)]
        return float(np.percentile(found, 100 * share)) if len(found) else float("inf")


class CountedSearch:
    """A search that takes what it is given and ends after so many tokens; it notes when."""

    def __init__(self, width: int, new_tokens: int, clock: Clock) -> None:
        self.width, self._new_tokens, self._clock = width, new_tokens, clock
        self.times: list[float] = []
        """First and last token."""
        self._count = 0
        self._same = np.arange(width, dtype=np.int64)
        self._none = np.zeros(width, np.int64)

    @property
    def num_candidates(self) -> int | None:
        return None

    def advance(self, scores: Scores) -> Step | None:
        self._count += 1
        if self._count in (1, self._new_tokens):
            self.times.append(self._clock())
        if self._count == self._new_tokens:
            return None
        return Step(parents=self._none if self._count == 1 else self._same, tokens=self._none)

    def foreseen(self) -> None:
        return None

    def certain(self) -> list[Certain]:
        return []

    def results(self) -> list[Hypothesis]:
        return [Hypothesis(token_ids=(), token_logprobs=(), score=0.0)]


def requests(load: Load, count: int, seed: int) -> list[Asked]:
    """Requests of a load, drawn by a seed: their ids are random, so that no two begin alike but for what they share."""
    rng = np.random.default_rng(seed)
    tokens = NANO.tokens
    least = max(tokens.never, default=0) + 1
    high = NANO.language_model.vocab_size

    def words(length: int, images: int) -> npt.NDArray[np.int64]:
        found = rng.integers(least + 4, high, length)
        found[np.linspace(0, length - 1, images, endpoint=False).astype(int)] = tokens.image
        return found

    beginning = words(load.shared_prompt, load.shared_images)
    own = load.images - load.shared_images
    made = []
    for index in range(count):
        length = int(rng.integers(load.prompt[0], load.prompt[1] + 1)) - load.shared_prompt
        made.append(
            Asked(
                token_ids=np.concatenate([beginning, words(length, own)]),
                images=(*range(load.shared_images), *(load.shared_images + index * own + image for image in range(own))),
                new_tokens=int(rng.integers(load.new_tokens[0], load.new_tokens[1] + 1)),
            )
        )
    return made


def simulate(
    costs: StepCosts,
    asked: Sequence[Asked],
    arrived: Floats,
    *,
    beams: int,
    rows: int,
    queue: int | None,
    callers: int = 1,
    prepare: float = 0.0,
) -> Observed:
    """One replica that is asked `asked` at the seconds `arrived`.

    rows, queue: of the engine. prepare: seconds from arrival until a request is with the engine, its images decoded.
    """
    clock = Clock()
    engine = Engine(stand_ins(costs, clock), NANO, costs.limits, rows=rows, queue=queue, clock=clock)
    searches: list[CountedSearch | None] = [None] * len(asked)
    running = 0.0
    waiting = iter(range(len(asked)))
    following = next(waiting, None)
    with engine.by_hand() as loop:
        while following is not None or loop.size:
            while following is not None and arrived[following] + prepare <= clock.now:
                request = asked[following]
                search = CountedSearch(beams, request.new_tokens, clock)
                try:
                    engine.submit_search(
                        _prepared(request),
                        search,
                        cost=len(request.token_ids) + beams * request.new_tokens,
                        caller=str(following % callers),
                        wake=False,
                    )
                    searches[following] = search
                except QueueFull:
                    pass
                following = next(waiting, None)
            before, inside = clock.now, loop.schedule.running
            if not loop.tick() and following is not None:
                clock.now = max(clock.now, float(arrived[following]) + prepare)
                continue
            running += (clock.now - before) * inside
    times = np.full((len(asked), 2), np.nan)
    for index, done in enumerate(searches):
        if done is not None:
            times[index] = done.times[0], done.times[-1]
    first, last = (times - arrived[:, None]).T
    return Observed(
        arrived=arrived,
        first_token=first,
        answer=last,
        seconds=clock.now - float(arrived[0]),
        running=running / (clock.now - float(arrived[0])) if clock.now else 0.0,
        tokens=loop.counts["generated_tokens"],
        refused=sum(search is None for search in searches),
        spent=dict(clock.spent),
    )


def _prepared(asked: Asked) -> Prepared:
    media = tuple(Medium(pixels=np.zeros((1, 1, 1, 1), np.float32), digest=b"%d" % number) for number in asked.images)
    return prepared_from_ids(asked.token_ids, media, NANO)
