"""What the cache remembers of its rows, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.cache import BUCKET, LEAST_COPY, Cache, Row, check_capacity

from .conftest import LoadTiny

PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def rows_of(count: int) -> Cache:
    """Bookkeeping only: no buffers."""
    cache = Cache.__new__(Cache)
    cache.rows = [Row(index, np.arange(16, dtype=np.int64)) for index in range(count)]
    return cache


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 3),
    events=st.lists(st.tuples(PROMPT, st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=12),
)
def test_what_is_reused_is_what_the_row_holds(count: int, events: list[tuple[list[int], int, int]]) -> None:
    """Requests come and go, some given up before their prompt was computed."""
    cache = rows_of(count)
    truth: dict[int, list[int]] = {}
    busy: list[Row] = []
    for prompt, leaving, computed in events:
        if len(busy) == count:
            cache.release(busy.pop(leaving % count))
        row, reused = cache.take(prompt)
        assert row not in busy
        assert reused <= len(prompt) - 1
        assert truth.get(row.index, [])[:reused] == prompt[:reused]
        assert reused == min(
            len(prompt) - 1, max(common(prompt, truth.get(other.index, [])) for other in cache.rows if other not in busy)
        )
        held = max(reused, min(computed, len(prompt)))
        row.held, row.used = tuple(prompt[:held]), held
        truth[row.index] = prompt[:held]
        busy.append(row)


def common(one: list[int], other: list[int]) -> int:
    return next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def test_the_longest_beginning_wins_its_row() -> None:
    cache = rows_of(3)
    for row, held in zip(cache.rows, [(1, 2, 3), (1, 2, 3, 4, 5), (7,)], strict=True):
        row.held = held
    row, shared = cache.take([1, 2, 3, 4, 9])
    assert (row.index, shared) == (1, 4)
    row, shared = cache.take([1, 2, 3, 4, 9])
    assert (row.index, shared) == (0, 3)  # the better one is busy
    cache.release(cache.rows[1])
    assert cache.take([8])[0].index == 1
    assert cache.take([8])[0].index == 2


def test_a_beginning_in_a_busy_row_is_copied(load_tiny: LoadTiny) -> None:
    cache = load_tiny(max_length=300).engine.loop.cache
    prompt = list(range(40))
    first, _ = cache.take(prompt)
    cache.reserve(1, 40)
    for buffer in cache._buffers.values():
        buffer.write(0, np.random.default_rng(1).normal(size=buffer.shape[1:]).astype(np.float32))
    first.held, first.used = tuple(prompt), 40
    second, shared = cache.take([*prompt[:30], 99, 98])
    assert (second.index, shared, second.used, second.held) == (1, 30, 30, tuple(prompt[:30]))
    for buffer in cache._buffers.values():
        values = buffer.read()
        np.testing.assert_array_equal(values[1, :, :30], values[0, :, :30])
        assert not values[1, :, 30:].any()
    # Few positions are computed rather than copied, and a free row that holds as many is taken as it is.
    assert cache.take([*prompt[: LEAST_COPY - 1], 97])[1] == 0
    cache.release(second)
    third, shared = cache.take([*prompt[:35], 96])
    assert (third.index, shared) == (1, 30)


def test_a_digest_is_not_a_token() -> None:
    for prompt, shared in (([1, b"a", 6], 2), ([1, b"b", 5], 1)):
        cache = rows_of(1)
        cache.rows[0].held = (1, b"a", 5)
        assert cache.take(prompt)[1] == shared


def test_capacity_grows_in_buckets_up_to_the_limit(load_tiny: LoadTiny) -> None:
    cache = load_tiny(max_length=300).engine.loop.cache
    cache.reserve(1, 5)
    assert (cache.batch, cache.capacity) == (1, BUCKET)
    cache.reserve(2, 5)
    assert (cache.batch, cache.capacity) == (2, BUCKET)
    cache.reserve(1, 2 * BUCKET + 1)
    assert (cache.batch, cache.capacity) == (2, 300)
    cache.reserve(3, 5)
    assert cache.batch == 4
    with pytest.raises(CapacityError, match="301 cache slots are needed, the bundle allows 300"):
        cache.reserve(1, 301)


def test_growing_keeps_what_rows_hold_and_copies_no_other(load_tiny: LoadTiny) -> None:
    cache = load_tiny(max_length=300).engine.loop.cache
    cache.reserve(4, 5)
    buffer = cache._buffers["past_k.0"]
    for index in range(4):
        buffer.write(index, np.full(buffer.shape[1:], index + 1, np.float32))
    cache.rows[1].held = (5,)
    cache.rows[3].busy = True
    cache.reserve(5, BUCKET + 1)
    grown = cache._buffers["past_k.0"].read()
    assert grown.shape[:3] == (8, grown.shape[1], 2 * BUCKET)
    assert [float(grown[index, 0, 0, 0]) for index in range(8)] == [0, 2, 0, 4, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("prompt", "width", "new", "message"),
    [
        (36, 1, 64, None),
        (36, 4, 16, None),
        (36, 1, 65, "Generate at most 64 tokens, use fewer beams, or build with a larger --max-length"),
        (99, 1, 1, None),
        (100, 1, 1, "Use fewer shots, or build with a larger --max-length"),
        (500, 3, 5, "a prompt of 500 tokens with 3 beams of 5 new tokens needs 515 cache slots, the bundle allows 100"),
    ],
)
def test_limits(prompt: int, width: int, new: int, message: str | None) -> None:
    limits = ShapeLimits(max_length=100, chunk=64, bank_rows=1)
    if message is None:
        check_capacity(prompt=prompt, width=width, new_tokens=new, limits=limits)
    else:
        with pytest.raises(CapacityError, match=message):
            check_capacity(prompt=prompt, width=width, new_tokens=new, limits=limits)
