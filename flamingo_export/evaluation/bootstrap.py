"""Intervals by bootstrap over items, and pairs compared as pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from flamingo_export.evaluation.metrics.base import Indices, Scored
from flamingo_reference.arrays import Floats

RESAMPLES = 1000
LEVEL = 95
_AT_ONCE = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with the interval that holds it in 95 of 100 resamples of the items; None where the items do not define it."""

    value: float | None
    low: float | None
    high: float | None


def estimate(scored: Scored, chosen: Indices, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """The metric over the items at these positions."""
    if scored.items is not None:
        return _of_means(scored.items[chosen], seed, resamples)
    return _of_values(scored.value, chosen, seed, resamples)


def difference(one: Scored, other: Scored, chosen: Indices, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """`one` minus `other` on the same items: both are resampled together, so that what both get wrong does not blur the difference."""
    if one.items is not None and other.items is not None:
        return _of_means(one.items[chosen] - other.items[chosen], seed, resamples)

    def value(drawn: Indices) -> float | None:
        first, second = one.value(drawn), other.value(drawn)
        return None if first is None or second is None else first - second

    return _of_values(value, chosen, seed, resamples)


def _of_means(values: Floats, seed: int, resamples: int) -> Estimate:
    if not len(values):
        return Estimate(value=None, low=None, high=None)
    means = np.concatenate([values[drawn].mean(axis=1) for drawn in _draws(len(values), seed, resamples)])
    return _interval(float(values.mean()), means)


def _of_values(value: Callable[[Indices], float | None], chosen: Indices, seed: int, resamples: int) -> Estimate:
    whole = value(chosen)
    if whole is None:
        return Estimate(value=None, low=None, high=None)
    found = [value(chosen[row]) for drawn in _draws(len(chosen), seed, resamples) for row in drawn]
    return _interval(whole, np.array([each for each in found if each is not None]))


def _draws(count: int, seed: int, resamples: int) -> Iterator[Indices]:
    """Positions [some, count], all of them `resamples` rows."""
    rng = np.random.default_rng([seed, 95])
    rows = max(1, _AT_ONCE // count)
    for start in range(0, resamples, rows):
        yield rng.integers(0, count, (min(rows, resamples - start), count))


def _interval(value: float, found: Floats) -> Estimate:
    half = (100 - LEVEL) / 2
    low, high = np.percentile(found, [half, 100 - half]) if len(found) else (value, value)
    return Estimate(value=value, low=float(low), high=float(high))
