"""Neighbours do not show: whatever else runs, joins, leaves or fails, each request gets to the bit what whole sequences give alone."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import msgspec
import numpy as np
import pytest
from hash_model import AheadHashDecoder, Whole, hash_engines, logits_of

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import DeadlineExceeded
from flamingo_export.runtime.cache import Sharing
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import Prepared, prepared_from_ids
from flamingo_export.runtime.search import Hypothesis, Search
from flamingo_export.runtime.ticket import Ticket
from flamingo_reference.config import ModelConfig
from flamingo_reference.phi import phi_from_tokens

IMAGE, RESET = 3, 9
SCHEDULES = int(os.environ.get("FLAMINGO_SCHEDULES", "1000"))
"""Random schedules in all; 10,000 were run before the engine was released."""
PARTS = 10
MEDIA = [
    Medium(pixels=np.full((1 if number % 3 else 2, 1), number, np.float32), digest=bytes([number])) for number in range(1, 7)
]


TILED = [
    Medium(
        pixels=np.array([[[10.0 * number + tile] for tile in range(4)]], np.float32), digest=bytes([number]),
        rows=1 + number % 4, aspect=1 + number % 4,
    )
    for number in range(1, 7)
]  # fmt: skip
"""Images of 1 to 4 tiles; what lies behind the last tile is padding that nobody may see."""


@pytest.fixture(scope="module")
def config(tiny_config: ModelConfig) -> ModelConfig:
    """With a token after which no medium is seen."""
    return msgspec.structs.replace(tiny_config, tokens=msgspec.structs.replace(tiny_config.tokens, reset=RESET))


@pytest.fixture(scope="module")
def groups(tiny_config: ModelConfig) -> ModelConfig:
    """Images that stand side by side are seen together."""
    block = msgspec.structs.replace(tiny_config.cross_attention, sees="group")
    return msgspec.structs.replace(tiny_config, cross_attention=block)


def prepared(ids: Sequence[int], media: Sequence[Medium]) -> Prepared:
    tokens = np.asarray(ids, np.int64)
    digests = iter(media)
    keys = tuple(next(digests).digest if token == IMAGE else token for token in ids)
    phi = phi_from_tokens(tokens[None], IMAGE, RESET)[0]
    return Prepared(token_ids=tokens, phi=phi, media=tuple(media), keys=keys)


def numbers_of(medium: Medium) -> list[int]:
    return medium.pixels[0, : medium.rows, 0].astype(int).tolist() if medium.aspect else [int(medium.pixels.max())]


def whole_of(request: Prepared) -> Whole:
    """Which rule it follows shows in the request: only one that sees groups knows where they begin."""
    return Whole(IMAGE, RESET) if request.first is None else Whole(IMAGE, None, groups=True)


def alone(request: Prepared, search: Search) -> list[Hypothesis]:
    """The search over whole sequences."""
    whole = whole_of(request)
    states = [whole.begin(request.token_ids.tolist(), [numbers_of(medium) for medium in request.media])]
    while (step := search.advance(np.stack([logits_of(known) for _, known, _ in states]))) is not None:
        states = [whole.extend(states[parent], int(token)) for parent, token in zip(step.parents, step.tokens, strict=True)]
    return search.results()


def scores_alone(request: Prepared, candidates: Sequence[Sequence[int]]) -> list[list[float]]:
    whole = whole_of(request)
    found: list[Any] = []
    for candidate in candidates:
        state = whole.begin(request.token_ids.tolist(), [numbers_of(medium) for medium in request.media])
        found.append([])
        for token in candidate:
            logits = logits_of(state[1]).astype(np.float64)
            logits[IMAGE] = -np.inf
            found[-1].append(float(logits[token] - np.log(np.exp(logits).sum())))
            state = whole.extend(state, token)
    return found


class BrokenDecoder(Exception):
    """What a decoder may come up with."""


class Schedule:
    """A random one, from a seed."""

    def __init__(self, seed: int, config: ModelConfig) -> None:
        self.rng = rng = random.Random(seed)
        self.config = config
        self.limits = ShapeLimits(
            max_length=rng.choice([24, 40, 64]), chunk=rng.choice([1, 4, 16]), bank_rows=rng.randint(2, 6)
        )
        self.alike = rng.random() < 0.5
        """Whether most begin with the same shots, so that rows are shared."""
        if self.alike:
            self.limits = msgspec.structs.replace(
                self.limits,
                max_length=rng.choice([64, 120, 160]),
                branches=rng.choice([1, 4, 8]),
                branch_media=rng.randint(1, 2),
                bank_rows=6,
            )
        self.ahead = rng.random() < 0.5
        """Whether steps are asked for before the one before is read; some draws of the device's are then others than the host's."""
        largest = rng.choice([{}, {}, {"M": 1}, {"B": 8, "S": 16, "K": 16, "M": 2, "C": self.limits.max_length}])
        engines = hash_engines(largest)
        reads_bound_media = True
        if config.sees_groups:
            self.limits = msgspec.structs.replace(
                self.limits, bank_rows=rng.choice([8, 12, 20]), max_tiles=rng.choice([4, 8, 20])
            )
            bounded = {"B": 8, "S": 16, "K": 16, "M": 2 * self.limits.max_tiles, "C": self.limits.max_length}
            largest, reads_bound_media = rng.choice([{}, {}, bounded]), rng.random() < 0.7
        if self.ahead and rng.random() < 0.8:  # as engines are: one call for all rows, one capacity
            most = 2 * self.limits.max_tiles if config.sees_groups else 2
            largest = {"B": 8, "S": 16, "K": 16, "M": most, "C": self.limits.max_length}
        narrow = config.sees_groups and reads_bound_media
        decoder = AheadHashDecoder(largest, reads_bound_media=narrow, slips=rng.choice([0, 2])) if self.ahead else None
        engines = hash_engines(largest, reads_bound_media=narrow, decoder=decoder)
        rows = rng.randint(4 if self.alike else 1, 8)
        self.engine = Engine(engines, config, self.limits, rows=rows, clock=lambda: self.now)
        cache = self.engine.loop.cache
        if "S" not in largest:
            cache.sharing = Sharing(media=largest.get("M"), dense=rng.random() < 0.3)
        if rng.random() < 0.2:
            engines.decoder.run = self.failing(engines.decoder.run)  # type: ignore[method-assign]
            if isinstance(decoder, AheadHashDecoder):
                decoder.start = self.failing(decoder.start)  # type: ignore[method-assign]
        self.now = 0.0
        self.usual = rng.choice([None, None, {"beams": 1}, {"beams": 3}])
        """What most ask for, so that many rows of one width decode side by side."""
        if self.ahead:
            self.usual = rng.choice(
                [{"beams": 1}, {"top_k": 5, "seed": 3}, {"top_k": 3, "seed": 7, "num_return": 2}, self.usual]
            )
        self.full = rng.choice([0.05, 0.3])
        self.beginnings = [self.tokens(rng.randint(1, 12)) for _ in range(3)]
        self.shots = [IMAGE, *rng.choices(range(10, 20), k=rng.randint(2, 12)), IMAGE, *rng.choices(range(10, 20), k=3)]
        self.tickets: list[tuple[Ticket[Outcome], Prepared, GenerateOptions]] = []
        self.scores: list[tuple[Ticket[list[list[float]]], Prepared, list[list[int]]]] = []
        self.given_up: set[int] = set()

    def failing(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder that fails now and then."""

        def or_not(*args: Any, **rest: Any) -> Any:
            if self.rng.random() < 0.05:
                raise BrokenDecoder
            return run(*args, **rest)

        return or_not

    def tokens(self, count: int) -> list[int]:
        """Words, images, and now and then the token after which no medium is seen."""
        seen = [IMAGE, IMAGE] if self.config.sees_groups else [IMAGE, RESET]
        return [self.rng.choice([*seen, *range(10, 20)]) for _ in range(count)]

    def request(self) -> Prepared:
        rng = self.rng
        room = self.limits.max_length - 1
        ids = [1, *rng.choice(self.beginnings), *self.tokens(rng.choice([0, 1, 3, 8]))][:room]
        if self.alike and rng.random() < 0.8:
            if self.config.sees_groups:
                return self.grouped([1, *self.shots, *self.tokens(rng.choice([0, 1, 2, 6]))][:room], len(self.shots))
            shots, own = self.shots, self.tokens(rng.choice([0, 1, 2, 6]))
            pool = rng.sample(MEDIA[2:], 2)
            ids = [1, *shots, *own][:room]
            shown = sum(token == IMAGE for token in ids)
            media = [*MEDIA[: sum(token == IMAGE for token in shots)], *(rng.choice(pool) for _ in ids)]
            return prepared(ids, media[:shown])
        if rng.random() < self.full:
            ids = (ids + self.tokens(room))[: room - rng.choice([0, 0, 1, 4])]  # which fills the cache, or nearly
        if self.config.sees_groups:
            return self.grouped(ids)
        pool = rng.sample(MEDIA, min(len(MEDIA), self.limits.bank_rows))
        first = rng.choice([0, 0, 1])  # often the same images at the same places
        media = [(MEDIA if first else pool)[index % min(len(pool), 2)] for index, _ in enumerate(t for t in ids if t == IMAGE)]
        return prepared(ids, media)

    def grouped(self, ids: list[int], shots: int = 0) -> Prepared:
        """The prompt with one or two images of tiles, with so few image tokens side by side that their tiles are within the limit.

        shots: positions in which it is always the same image.
        """
        pool = [TILED[0], self.rng.choice(TILED[1:])] if shots else self.rng.sample(TILED, 2)
        kept, media, tiles = [], [], 0
        for place, token in enumerate(ids):
            medium = TILED[0] if place <= shots else self.rng.choice(pool)
            tiles = 0 if token != IMAGE else tiles + medium.rows
            if token == IMAGE and tiles > self.limits.max_tiles:
                token, tiles = 10, 0
            kept.append(token)
            media += [medium] if token == IMAGE else []
        return prepared_from_ids(np.asarray(kept, np.int64), tuple(media), self.config)

    def options(self, request: Prepared) -> GenerateOptions:
        rng = self.rng
        settings: Any = self.usual if self.usual and rng.random() < 0.8 else None
        settings = settings or rng.choice(
            [
                {"beams": 1},
                {"beams": 2},
                {"beams": 3, "num_return": 2},
                {"beams": 4},
                {"temperature": 1.5, "seed": rng.randint(0, 9), "num_return": rng.randint(1, 4)},
                {"top_k": 5, "seed": rng.randint(0, 9)},
                {"top_p": 0.9, "seed": 4, "num_return": 2},
            ]
        )
        width = GenerateOptions(**settings).width
        room = (self.limits.max_length - len(request.token_ids)) // width
        if room < 1:
            settings, room = {"beams": 1}, 1
        return GenerateOptions(max_new_tokens=min(room, rng.choice([1, 3, 9, 9 if self.alike else 99])), **settings)

    def submit(self) -> None:
        rng, request = self.rng, self.request()
        settings: Any = {"caller": rng.choice("abc"), "wake": False}
        if rng.random() < 0.2:
            room = self.limits.max_length - len(request.token_ids)
            candidates = [self.tokens(rng.randint(1, min(6, room + 1))) for _ in range(rng.randint(1, 5))]
            self.scores.append((self.engine.submit_score(request, candidates, **settings), request, candidates))
            return
        options = self.options(request)
        deadline = rng.choice([None] * 9 + [self.now + 5])
        ticket = self.engine.submit(request, options, deadline=deadline, events=rng.random() < 0.3, **settings)
        self.tickets.append((ticket, request, options))

    def run(self) -> None:
        rng, loop = self.rng, self.engine.loop
        for _ in range(rng.randint(8, 14) if self.alike else rng.randint(3, 14)):
            self.submit()
            for _ in range(rng.choice([0, 0, 1, 5] if self.alike else [0, 1, 5, 20])):
                self.now += 1.0
                loop.tick()
                self.check_rows()
            if rng.random() < 0.15 and self.tickets:
                index = rng.randrange(len(self.tickets))
                if not self.tickets[index][0].done:
                    self.given_up.add(index)
                    loop.revoked.append(self.tickets[index][0])
        while loop.tick():
            self.now += 1.0
            self.check_rows()

    def check_rows(self) -> None:
        """Nobody is in a row that cannot finish there, and an engine's bounds are kept."""
        cache = self.engine.loop.cache
        for row in cache.rows:
            assert row.promised <= self.limits.max_length
            assert all(seat.left >= 0 for seat in row.seats)
            if len(row.seats) > 1:
                bounds = cache.sharing
                assert sum(seat.columns for seat in row.seats) <= (bounds.columns or 99)
                assert len({medium for seat in row.seats for medium in seat.looks}) <= (bounds.media or 99)

    def check(self) -> None:
        for index, (ticket, request, options) in enumerate(self.tickets):
            assert ticket.done
            if index in self.given_up:
                with pytest.raises(CancelledError):
                    ticket.result()
                continue
            try:
                found = ticket.result().hypotheses
            except (DeadlineExceeded, BrokenDecoder):
                continue
            limit = self.engine.new_tokens(request, options)
            assert found == alone(request, options.search(self.config, limit)), (index, options)
        for scores, request, candidates in self.scores:
            try:
                given: Any = scores.result()
            except BrokenDecoder:
                continue
            for mine, theirs in zip(given, scores_alone(request, candidates), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)
        stats = self.engine.stats()
        assert (stats.waiting, stats.running, stats.rows_in_use, stats.bank_rows_in_use) == (0, 0, 0, 0)
        assert stats.finished + stats.failed + stats.cancelled == len(self.tickets) + len(self.scores)
        assert not any(row.busy for row in self.engine.loop.cache.rows)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_schedules(part: int, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_schedules(part, config, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_schedules_about_images_of_tiles(part: int, groups: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_schedules(part, groups, monkeypatch)


def run_schedules(part: int, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flamingo_export.runtime.cache.BUCKET", 4)
    monkeypatch.setattr("flamingo_export.runtime.cache.LEAST_COPY", 2)
    monkeypatch.setattr("flamingo_export.runtime.cache.COMPUTED", 1)
    shared = ahead = 0
    for seed in range(part, SCHEDULES, PARTS):
        schedule = Schedule(seed, config)
        try:
            schedule.run()
            schedule.check()
        except BaseException as error:
            error.add_note(f"schedule {seed}")
            raise
        shared += schedule.engine.stats().shared_rows
        ahead += schedule.engine.loop.counts["asked_ahead"]
    assert shared > SCHEDULES / PARTS / 4 - 10
    assert ahead > SCHEDULES / PARTS / 2 - 10
