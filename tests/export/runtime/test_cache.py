"""What the cache remembers of its rows, and its limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.cache import BUCKET, check_capacity

from .conftest import LoadTiny

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(PROMPTS, min_size=1, max_size=6))
def test_what_is_reused_is_what_the_row_holds(batches: list[list[list[int]]]) -> None:
    from flamingo_export.runtime.cache import Cache

    cache = Cache.__new__(Cache)  # bookkeeping only: no buffers
    cache._held = []
    truth: dict[int, list[int]] = {}
    for batch in batches:
        cache._held += [()] * (len(batch) - len(cache._held))
        placed = cache.assign(batch)
        assert sorted(row for row, _ in placed) == list(range(len(batch)))
        for prompt, (row, reused) in zip(batch, placed, strict=True):
            assert reused <= len(prompt) - 1
            assert truth.get(row, [])[:reused] == prompt[:reused]
            cache.hold(row, prompt)
            truth[row] = prompt


def test_the_longest_beginning_wins_its_row() -> None:
    from flamingo_export.runtime.cache import Cache

    cache = Cache.__new__(Cache)
    cache._held = [(1, 2, 3), (1, 2, 3, 4, 5), (7,)]
    assert cache.assign([[1, 2, 3, 9], [1, 2, 3, 4, 9]]) == [(0, 3), (1, 4)]
    assert cache.assign([[1, 2, 3, 4, 9], [1, 2, 3, 9]]) == [(1, 4), (0, 3)]
    assert cache.assign([[1, 2, 3]]) == [(0, 2)]  # one row in use: only row 0 can serve


def test_a_digest_is_not_a_token() -> None:
    from flamingo_export.runtime.cache import Cache

    cache = Cache.__new__(Cache)
    cache._held = [(1, b"a", 5)]
    assert cache.assign([[1, b"a", 6]]) == [(0, 2)]
    assert cache.assign([[1, b"b", 5]]) == [(0, 1)]


def test_capacity_grows_in_buckets_up_to_the_limit(load_tiny: LoadTiny) -> None:
    cache = load_tiny(max_length=300).generator.cache
    cache.prepare(1, 5)
    assert (cache.batch, cache.capacity) == (1, BUCKET)
    cache.prepare(2, 5)
    assert (cache.batch, cache.capacity) == (2, BUCKET)
    cache.prepare(1, 2 * BUCKET + 1)
    assert (cache.batch, cache.capacity) == (1, 300)
    with pytest.raises(CapacityError, match="301 cache slots are needed, the bundle allows 300"):
        cache.prepare(1, 301)


@pytest.mark.parametrize(
    ("prompt", "width", "new", "message"),
    [
        (36, 1, 64, None),
        (36, 4, 16, None),
        (36, 1, 65, "Generate at most 64 tokens, use fewer beams, or build with a larger --max-length"),
        (37, 1, 1, "Use fewer shots, or build with a larger --max-length"),
        (500, 3, 5, "a prompt of 500 tokens with 3 beams of 5 new tokens needs 564 cache slots, the bundle allows 100"),
    ],
)
def test_limits(prompt: int, width: int, new: int, message: str | None) -> None:
    limits = ShapeLimits(max_length=100, chunk=64, bank_rows=1)
    if message is None:
        check_capacity(prompt=prompt, width=width, new_tokens=new, limits=limits)
    else:
        with pytest.raises(CapacityError, match=message):
            check_capacity(prompt=prompt, width=width, new_tokens=new, limits=limits)
