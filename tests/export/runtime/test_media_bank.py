"""The media bank: sharing, pinning, eviction, failures half way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.errors import CapacityError
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.media_bank import MediaBank
from flamingo_export.specs import SubgraphSpec, TensorSpec


class FakeBuffer:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.array = np.zeros(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def publish(self) -> None:
        pass

    def write(self, index: int, value: np.ndarray) -> None:
        self.array[index] = value


class FakeSession:
    """A decoder with one gated layer, as far as the bank sees it."""

    def __init__(self) -> None:
        self.bound: dict[str, FakeBuffer] = {}
        self.spec = SubgraphSpec(
            name="decoder",
            inputs=tuple(TensorSpec(name, "float", ("N", 1, 2, 1)) for name in ("media_k.0", "media_v.0")),
            outputs=(),
        )

    def allocate(self, name: str, shape: tuple[int, ...]) -> FakeBuffer:
        return FakeBuffer(shape)

    def bind(self, name: str, buffer: FakeBuffer) -> None:
        self.bound[name] = buffer


def media(*numbers: int) -> list[Medium]:
    return [Medium(pixels=np.full((1, 3, 2, 2), number, np.float32), digest=bytes([number])) for number in numbers]


def number_of(medium: Medium) -> int:
    return int(medium.pixels[0, 0, 0, 0])


class Encoder:
    """Remembers what it was asked for; a medium's values are its number."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fail_at = fail_at

    def __call__(self, wanted: Sequence[Medium]) -> Iterator[tuple[Medium, Mapping[str, np.ndarray]]]:
        for medium in wanted:
            number = number_of(medium)
            if number == self.fail_at:
                raise RuntimeError("the encoder failed")
            self.asked.append(number)
            yield medium, {name: np.full((1, 2, 1), float(number)) for name in ("media_k.0", "media_v.0")}


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


Encode = Callable[[Sequence[Medium]], Iterator[tuple[Medium, Mapping[str, np.ndarray]]]]


@contextmanager
def lease(bank: MediaBank, shown: list[Medium], encode: Encode) -> Iterator[tuple[dict[bytes, int], int]]:
    """As the loop does it: (digest -> row, how many had to be encoded), for as long as a request runs."""
    missing = bank.pin(shown)
    try:
        for medium, values in encode(missing):
            bank.store(medium, values)
        rows = bank.rows_of(shown)
        yield {medium.digest: int(row) for medium, row in zip(shown, rows, strict=True)}, len(missing)
    finally:
        bank.unpin(shown)


def bank_of(session: FakeSession, capacity: int) -> MediaBank:
    return MediaBank(session, capacity)  # type: ignore[arg-type]


def test_one_row_for_each_distinct_medium(session: FakeSession) -> None:
    bank, encode = bank_of(session, 4), Encoder()
    with lease(bank, media(5, 6, 5), encode) as (rows, encoded):
        assert (encoded, encode.asked) == (2, [5, 6])
        assert len(set(rows.values())) == 2
        for medium in media(5, 6):
            for name in ("media_k.0", "media_v.0"):
                assert (session.bound[name].array[rows[medium.digest]] == number_of(medium)).all()
    with lease(bank, media(6, 7), encode) as (_, encoded):
        assert (encoded, encode.asked) == (1, [5, 6, 7])


def test_the_least_recently_used_goes_first_and_pinned_ones_stay(session: FakeSession) -> None:
    bank, encode = bank_of(session, 3), Encoder()
    with lease(bank, media(1), encode), lease(bank, media(2, 3), encode):
        pass
    with lease(bank, media(1), encode), lease(bank, media(4), encode):  # 2 is the oldest that is not pinned
        assert {medium.digest for medium in media(1, 3, 4)} == set(bank.resident)
        with (
            pytest.raises(
                CapacityError, match=r"3 different images and videos are needed at once, the bank holds 3, 2 of them in use"
            ),
            lease(bank, media(6, 7, 8), encode),
        ):
            pass
        assert encode.asked == [1, 2, 3, 4]


def test_what_was_used_last_stays_longest(session: FakeSession) -> None:
    """An old medium that is shown again is not the next to go."""
    bank, encode = bank_of(session, 3), Encoder()
    for number in (1, 2, 3, 1, 4):
        with lease(bank, media(number), encode):
            pass
    assert set(bank.resident) == {medium.digest for medium in media(3, 1, 4)}
    assert bank.room_beside(media(3, 5)) == 2  # what is kept for a later request counts as used, too
    with lease(bank, media(6), encode):
        assert set(bank.resident) == {medium.digest for medium in media(4, 3, 6)}


def test_a_failure_half_way_leaves_what_was_finished(session: FakeSession) -> None:
    bank = bank_of(session, 3)
    with pytest.raises(RuntimeError, match="the encoder failed"), lease(bank, media(1, 2, 3), Encoder(fail_at=2)):
        pass
    assert set(bank.resident) == {media(1)[0].digest}
    encode = Encoder()
    with lease(bank, media(4, 5, 6), encode) as (rows, _):  # nothing is pinned any more, no row is lost
        assert sorted(rows.values()) == [0, 1, 2]


def test_a_row_that_failed_while_written_is_not_found(session: FakeSession) -> None:
    bank = bank_of(session, 1)

    def half(wanted: Sequence[Medium]) -> Iterator[tuple[Medium, Mapping[str, np.ndarray]]]:
        yield wanted[0], {"media_k.0": np.ones((1, 2, 1))}

    with pytest.raises(KeyError), lease(bank, media(1), half):
        pass
    assert not bank.resident
    with lease(bank, media(2), Encoder()) as (rows, _):
        assert rows == {media(2)[0].digest: 0}


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 5),
    wishes=st.lists(st.lists(st.integers(0, 8), max_size=5), max_size=25),
)
def test_rows_always_hold_what_they_are_said_to_hold(capacity: int, wishes: list[list[int]]) -> None:
    session = FakeSession()
    bank = bank_of(session, capacity)
    order: list[int] = []
    for wish in wishes:
        encode = Encoder()
        if len(set(wish)) > capacity:
            with pytest.raises(CapacityError), lease(bank, media(*wish), encode):
                pass
            assert encode.asked == []
            continue
        with lease(bank, media(*wish), encode) as (rows, encoded):
            assert set(encode.asked).isdisjoint(set(order) & set(wish))
            assert encoded == len(encode.asked)
            assert len(set(wish)) == len(set(rows.values()))
            for medium in media(*wish):
                assert (session.bound["media_k.0"].array[rows[medium.digest]] == number_of(medium)).all()
        order = [number_of(medium) for medium in media(*range(9)) if medium.digest in bank.resident]
        assert len(order) <= capacity
        assert set(wish) <= set(order)
