"""What the cache remembers of its rows, and its limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.cache import BUCKET, LEAST_COPY, Cache, Row, Seat, Sharing, check_capacity
from flamingo_export.runtime.jobs import WHOLE_ROW

from .conftest import LoadTiny

PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def rows_of(count: int) -> Cache:
    """Bookkeeping only: no buffers."""
    cache = Cache.__new__(Cache)
    cache.sharing, cache._limits = Sharing(), ShapeLimits(max_length=16)
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
    busy: list[Seat] = []
    for prompt, leaving, computed in events:
        if len(busy) == count:
            cache.release(busy.pop(leaving % count))
        seat = cache.take(prompt, slots=len(prompt))
        reused = cache.settle(seat, prompt, slots=len(prompt))
        row = seat.row
        assert row.seats == [seat]
        assert seat.left == len(prompt) - reused
        assert reused <= len(prompt) - 1
        assert truth.get(row.index, [])[:reused] == prompt[:reused]
        assert reused == min(
            len(prompt) - 1,
            max(common(prompt, truth.get(other.index, [])) for other in cache.rows if other.seats in ([], [seat])),
        )
        held = max(reused, min(computed, len(prompt)))
        row.held, row.used = tuple(prompt[:held]), held
        truth[row.index] = prompt[:held]
        busy.append(seat)


def common(one: list[int], other: list[int]) -> int:
    return next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def test_the_longest_beginning_wins_its_row() -> None:
    cache = rows_of(3)
    for row, held in zip(cache.rows, [(1, 2, 3), (1, 2, 3, 4, 5), (7,)], strict=True):
        row.held = held
    first = cache.take([1, 2, 3, 4, 9], slots=5)
    assert (first.row.index, first.row.used) == (1, 4)
    second = cache.take([1, 2, 3, 4, 9], slots=5)
    assert (second.row.index, second.row.used) == (0, 3)  # the better one is busy
    cache.release(first)
    assert cache.take([8], slots=1).row.index == 1
    assert cache.take([8], slots=1).row.index == 2


def test_a_beginning_in_a_busy_row_is_copied(load_tiny: LoadTiny) -> None:
    cache = load_tiny(max_length=300).engine.loop.cache
    prompt = list(range(40))
    first = cache.take(prompt, slots=WHOLE_ROW).row  # which shares with nobody
    cache.reserve(1, 40)
    for buffer in cache._buffers.values():
        buffer.write(0, np.random.default_rng(1).normal(size=buffer.shape[1:]).astype(np.float32))
    first.held, first.used = tuple(prompt), 40
    seat = cache.take([*prompt[:30], 99, 98], slots=WHOLE_ROW)
    shared, second = cache.settle(seat, [*prompt[:30], 99, 98], slots=WHOLE_ROW), seat.row
    assert (second.index, shared, second.used, second.held) == (1, 30, 30, tuple(prompt[:30]))
    for buffer in cache._buffers.values():
        values = buffer.read()
        np.testing.assert_array_equal(values[1, :, :30], values[0, :, :30])
        assert not values[1, :, 30:].any()
    # Few positions are computed rather than copied, and a free row that holds as many is taken as it is.
    short = [*prompt[: LEAST_COPY - 1], 97]
    assert cache.settle(cache.take(short, slots=WHOLE_ROW), short, slots=WHOLE_ROW) == 0
    cache.release(seat)
    third = cache.take([*prompt[:35], 96], slots=WHOLE_ROW)
    assert (third.row.index, cache.settle(third, [*prompt[:35], 96], slots=WHOLE_ROW)) == (1, 30)


def shared_row(held: int = 60, *, length: int = 200, own: int = 20, **bounds: Any) -> Cache:
    """Two rows, of which the first is used by a request that has computed its prompt and may take `own` slots more."""
    cache = rows_of(2)
    cache.rows = [Row(index, np.arange(length, dtype=np.int64)) for index in range(2)]
    cache._limits, cache.sharing, cache._buffers = ShapeLimits(max_length=length), Sharing(**bounds), {}
    cache.batch, cache.capacity = 2, length
    prompt = list(range(held))
    seat = cache.take(prompt, slots=held + own, columns=2)
    cache.settle(seat, prompt, slots=held + own, looks=[3], steps=own // 2)
    seat.take(held)
    seat.row.held = tuple(prompt)
    return cache


def placed(cache: Cache, prompt: list[int], *, slots: int, columns: int = 1, looks: tuple[int, ...] = (3,), steps: int = 9):
    """The seat of a request whose prompt is about to be computed, and how much of it is there."""
    seat = cache.take(prompt, slots=slots, columns=columns)
    shared = cache.settle(seat, prompt, slots=slots, looks=looks, steps=steps)
    assert seat.left == slots - shared
    return seat, shared


def joins(cache: Cache, *, common: int = 50, slots: int = 60, columns: int = 1, looks: tuple[int, ...] = (3,)) -> bool:
    """Whether a request whose prompt begins with so many equal tokens is given a place in the first row."""
    seat, shared = placed(cache, [*range(common), 900], slots=slots, columns=columns, looks=looks)
    joined: bool = seat.row.index == 0
    assert shared == (common if joined or common >= LEAST_COPY else 0)  # else it is copied, or too short for that
    assert joined == (len(cache.rows[0].seats) == 2)
    assert joined == (not cache.rows[1].busy)
    return joined


@pytest.mark.parametrize("own", [79, 80, 81])
def test_a_shared_row_takes_nobody_whom_its_capacity_cannot_finish(own: int) -> None:
    cache = shared_row(own=40, length=180, dense=False)  # 60 + 40 are promised
    assert joins(cache, slots=50 + own) == (own <= 80)


@pytest.mark.parametrize("common", [LEAST_COPY - 1, LEAST_COPY])
def test_short_beginnings_are_not_shared(common: int) -> None:
    cache = shared_row()
    assert not joins(cache, common=common, slots=common + 1)  # too much beside it
    cache = shared_row(dense=False)
    assert joins(cache, common=common, slots=common + 1) == (common == LEAST_COPY)


def test_an_engines_bounds_of_shared_rows() -> None:
    for columns, media, wanted in ((3, 1, True), (2, 1, False), (None, None, True)):
        cache = shared_row(dense=False, columns=columns, media=media)
        assert joins(cache) == wanted, (columns, media)
    for media, looks, wanted in ((1, (3,), True), (1, (4,), False), (2, (4,), True), (1, (), True)):
        cache = shared_row(dense=False, columns=9, media=media)
        assert joins(cache, looks=looks) == wanted, (media, looks)


@pytest.mark.parametrize(("own", "wanted"), [(20, True), (21, False)])
def test_a_dense_attention_shares_only_what_is_mostly_shared(own: int, wanted: bool) -> None:
    cache = shared_row(own=20)  # 80 slots promised; twice the 50 that are shared are 100
    assert joins(cache, slots=50 + own) == wanted


def test_what_a_free_row_holds_is_not_computed_again_for_a_little_sharing() -> None:
    cache = shared_row(dense=False)
    prompt = [*range(50), 900, 901, 902]
    for steps, joined in ((10, False), (11, True)):  # two positions more in the free row: 2 x 256 slots against 50 a step
        cache.rows[1].held = (*range(50), 900, 901)
        seat, shared = placed(cache, prompt, slots=70, steps=steps)
        assert (seat.row.index, shared) == ((0, 50) if joined else (1, 52))
        cache.release(seat)


def test_a_shared_row_is_free_when_the_last_one_leaves() -> None:
    cache = shared_row(dense=False)
    (first,) = cache.rows[0].seats
    second, _ = placed(cache, [*range(50), 900], slots=60)
    row = second.row
    row.key_positions[60:63] = 50
    second.take(3)
    cache.release(first)
    assert row.busy
    assert row.promised == 60 + 3 + 7
    third, shared = placed(cache, [*range(60), 900], slots=70)
    assert (third.row, shared) == (row, 60)  # what the first had computed is still there
    cache.release(second)
    cache.release(third)
    assert not row.busy
    assert row.held == tuple(range(60))
    assert row.key_positions.tolist() == list(range(200))


def test_a_digest_is_not_a_token() -> None:
    prompts: list[tuple[list[int | bytes], int]] = [([1, b"a", 6], 2), ([1, b"b", 5], 1)]
    for prompt, shared in prompts:
        cache = rows_of(1)
        cache.rows[0].held = (1, b"a", 5)
        assert cache.settle(cache.take(prompt, slots=3), prompt, slots=3) == shared


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
    cache.rows[3].seats.append(Seat(row=cache.rows[3], columns=1, left=1))
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


def test_rows_close_up_where_some_are_shared() -> None:
    """One that moved into another's row left a hole; the next that stays by itself takes it, with what its own row held."""
    cache = shared_row(own=40, length=180, dense=False)
    cache.rows += [Row(index, np.arange(180, dtype=np.int64)) for index in (2, 3)]
    copied: list[tuple[int, int, int]] = []
    cache._buffers = {"past_k.0": SimpleNamespace(copy_slots=lambda *places: copied.append(places))}
    cache.batch = 4
    second = cache.take([*range(50), 900], slots=60, columns=1)
    cache.rows[2].held = (5, 6, 7, 8)
    third = cache.take([5, 6, 7, 9], slots=10, columns=1)
    assert (second.row.index, third.row.index) == (1, 2)
    cache.settle(second, [*range(50), 900], slots=60, looks=[3], steps=9)
    assert cache.settle(third, [5, 6, 7, 9], slots=10, looks=[3], steps=1) == 3
    assert (second.row.index, third.row.index, third.row.used, third.row.held) == (0, 1, 3, (5, 6, 7))
    assert copied == [(2, 1, 3)]
    assert not cache.rows[2].busy


def test_the_beginning_of_one_who_has_left_is_found_by_one_who_waited(load_tiny: LoadTiny) -> None:
    """Two requests come at once and get a row each; the first has its answer before the second one's prompt is begun."""
    cache = load_tiny(max_length=300).engine.loop.cache
    prompt = [*range(3, 3 + LEAST_COPY + 4)]
    first, second = (cache.take(prompt, slots=WHOLE_ROW) for _ in range(2))
    assert cache.settle(first, prompt, slots=WHOLE_ROW) == 0
    cache.reserve(1, len(prompt))
    for buffer in cache._buffers.values():
        buffer.write(0, np.random.default_rng(1).normal(size=buffer.shape[1:]).astype(np.float32))
    left = first.row
    left.held, left.used = tuple(prompt), len(prompt)
    cache.release(first)
    known = len(prompt) - 1
    assert cache.settle(second, prompt, slots=WHOLE_ROW) == known
    assert second.row is not left
    assert (second.row.held, second.row.used) == (tuple(prompt[:known]), known)
    for buffer in cache._buffers.values():
        values = buffer.read()
        np.testing.assert_array_equal(values[second.row.index, :, :known], values[left.index, :, :known])


def test_rows_that_cannot_close_up_are_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for the row that a request moves to: it leaves the row where it stands, and an interruption finds nothing left behind."""
    cache = shared_row(own=40, length=180, dense=False)
    cache.rows += [Row(index, np.arange(180, dtype=np.int64)) for index in (2, 3)]
    second = cache.take([*range(50), 900], slots=60, columns=1)
    third = cache.take([*range(40), 901], slots=WHOLE_ROW, columns=1)
    cache.settle(second, [*range(50), 900], slots=60, looks=[3], steps=9)

    def no_memory(*_: int) -> None:
        raise CapacityError("no memory")

    monkeypatch.setattr(cache, "reserve", no_memory)
    with pytest.raises(CapacityError):
        cache.settle(third, [*range(40), 901], slots=WHOLE_ROW, looks=[3])
    cache.release(third)
    assert [row.busy for row in cache.rows] == [True, False, False, False]
    cache.rows[1].seats.append(second)  # as after an interruption in the middle
    cache.clear()
    assert not any(row.busy for row in cache.rows)
