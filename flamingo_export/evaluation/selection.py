"""Which examples come before a query: at random, the most similar ones, the same for all, or those that the data name.

Everything follows from the seed and the query's id, so it does not depend on which other items are asked, nor in what order. Examples that
show the query's own medium are never taken.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.task import ZERO_SHOT_TEXTS, Item
from flamingo_export.runtime.videos import Video

Select = Literal["random", "rices", "shared", "listed"]
"""random: drawn for each query. rices: the most similar by visual features, the most similar last (next to the query; Flamingo, arXiv
2204.14198, appendix C; Yang et al. 2021). shared: drawn once for all. listed: named by the data."""
_SAME_FEATURES = 1 - 1e-6
"""Cosine from which an example is taken for the query's own picture under another name."""


class Similarity(Protocol):
    """Examples by likeness."""

    def prepare(self, queries: Sequence[Item], among: Sequence[int]) -> None:
        """Says that these queries will be asked about, so that their work can be done together."""

    def nearest(self, query: Item, among: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Positions of examples with their cosine to the query, the most similar first; ties in the order of the examples."""


def medium_key(item: Item) -> object:
    """What two items share that show the same thing; of items without media, their question."""
    return ("text", item.question, item.answer) if item.medium is None else _key(item.medium)


def _key(medium: object) -> object:
    if isinstance(medium, Video):
        inner = medium.source
        if isinstance(inner, Sequence) and not isinstance(inner, str | bytes | bytearray | memoryview):
            return (tuple(_key(frame) for frame in inner), medium.clip)
        return (_key(inner), medium.clip)
    if isinstance(medium, np.ndarray):
        return hashlib.sha256(repr(medium.shape).encode() + np.ascontiguousarray(medium).tobytes()).hexdigest()
    if isinstance(medium, bytes):
        return hashlib.sha256(medium).hexdigest()
    return str(medium) if isinstance(medium, str | Path) else id(medium)


class Selector:
    """Chooses examples by their positions."""

    def __init__(self, examples: Sequence[Item], select: Select, seed: int, similarity: Similarity | None = None) -> None:
        """similarity: for `rices`. Raises EvaluationError where it is missing."""
        if select == "rices" and similarity is None:
            raise EvaluationError(
                "RICES compares visual features, and this model gives none. Choose --select random, or evaluate a bundle."
            )
        self.examples, self.select, self.seed = examples, select, seed
        self._similarity = similarity
        self._pools: defaultdict[str, list[int]] = defaultdict(list)
        self._by_id: dict[str, int] = {}
        for place, item in enumerate(examples):
            self._by_id[item.id] = place
            if item.answer.strip():
                self._pools[item.pool].append(place)
        self._keys: dict[int, object] = {}

    def prepare(self, queries: Sequence[Item]) -> None:
        """Looks for the examples of many queries together, where that is quicker."""
        if self._similarity is None:
            return
        pools: defaultdict[str, list[Item]] = defaultdict(list)
        for item in queries:
            pools[item.pool].append(item)
        for name, members in pools.items():
            self._similarity.prepare(members, self._pools.get(name, []))

    def check(self, queries: Sequence[Item], most: int) -> None:
        """Raises EvaluationError if some query cannot have `most` examples."""
        for item in queries:
            if self.select == "listed":
                if unknown := [name for names in item.listed.values() for name in names if name not in self._by_id]:
                    raise EvaluationError(f"item {item.id} names examples that there are not: {', '.join(unknown[:5])}")
                continue
            there = len(self._pools.get(item.pool, ()))
            if there < most:
                kind = f" of kind {item.pool!r}" if item.pool else ""
                raise EvaluationError(
                    f"{most} examples are wanted and there are {there}{kind} with an answer that can be shown. "
                    "Give fewer --shots or more examples (--support)."
                )

    def choose(self, query: Item, count: int) -> list[int]:
        """`count` examples in the order in which they are shown; for 0 those whose texts make the zero-shot prompt.

        Raises EvaluationError if there are too few once the query's own medium is left out.
        """
        if self.select == "listed":
            return self._listed(query, count)
        wanted = count or ZERO_SHOT_TEXTS
        if self.select == "rices" and count:
            found = self._similar(query, wanted)[::-1]
        else:
            each = self.select == "random" and count
            found = self._drawn(query, wanted, [self.seed, _number(query.id)] if each else [self.seed, _number(query.pool)])
        if len(found) < wanted:
            raise EvaluationError(
                f"{wanted} examples are wanted for item {query.id}, and without its own medium there are {len(found)}"
            )
        return found

    def orders(self, query: Item, count: int, ensemble: int) -> list[list[int]]:
        """`ensemble` orders of `count` examples: the one that they were chosen in, then random ones, all different while there are any."""
        rng = np.random.default_rng([self.seed, _number(query.id), count, 6])
        orders = [list(range(count))]
        for _ in range(20 * ensemble):
            if len(orders) == ensemble:
                break
            order = rng.permutation(count).tolist()
            if order not in orders:
                orders.append(order)
        return orders

    def _listed(self, query: Item, count: int) -> list[int]:
        if count not in query.listed:
            there = ", ".join(map(str, sorted(query.listed))) or "none"
            raise EvaluationError(
                f"item {query.id} names no examples for {count} shots (it does for {there}). Choose --select random."
            )
        return [self._by_id[name] for name in query.listed[count]]

    def _drawn(self, query: Item, wanted: int, seeds: Sequence[int]) -> list[int]:
        pool = self._pools.get(query.pool, [])
        rng, own = np.random.default_rng(seeds), medium_key(query)
        found: dict[int, None] = {}
        # More draws of the same generator: 8 examples begin with the 4 of 4.
        for _ in range(50 * wanted):
            if len(found) == wanted or not pool:
                return list(found)
            place = pool[int(rng.integers(len(pool)))]
            if place not in found and self._key_of(place) != own:
                found[place] = None
        # Nearly all of a small pool is wanted: the rest in a random order.
        for place in rng.permutation(pool).tolist():
            if len(found) < wanted and place not in found and self._key_of(place) != own:
                found[place] = None
        return list(found)

    def _similar(self, query: Item, wanted: int) -> list[int]:
        assert self._similarity is not None
        own = medium_key(query)
        found: list[int] = []
        for place, cosine in self._similarity.nearest(query, self._pools.get(query.pool, [])):
            if cosine < _SAME_FEATURES and self._key_of(place) != own:
                found.append(place)
            if len(found) == wanted:
                break
        return found

    def _key_of(self, place: int) -> object:
        if place not in self._keys:
            self._keys[place] = medium_key(self.examples[place])
        return self._keys[place]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
