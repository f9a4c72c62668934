"""The media bank: sharing, pinning, eviction, failures half way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.errors import CapacityError
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.media_bank import MediaBank
from flamingo_export.specs import SubgraphSpec, TensorSpec


class FakeBuffer:
    def __init__(self, array: np.ndarray, log: list[str] | None = None) -> None:
        self.array = array
        self.log = [] if log is None else log

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def publish(self) -> None:
        pass

    def write(self, index: int, value: np.ndarray) -> None:
        self.array[index] = value

    def rows(self, first: int, count: int) -> FakeBuffer:
        return FakeBuffer(self.array[first : first + count], self.log)

    def copy_from(self, other: FakeBuffer) -> None:
        self.log.append("copy")
        self.array[:] = other.array


class FakeSession:
    """A decoder with one gated layer, as far as the bank sees it. log: what was bound and copied."""

    def __init__(self, *, reads_bound_media: bool = False) -> None:
        self.bound: dict[str, FakeBuffer] = {}
        self.log: list[str] = []
        self.reads_bound_media = reads_bound_media
        self.spec = SubgraphSpec(
            name="decoder",
            inputs=tuple(TensorSpec(name, "float", ("N", 1, 2, 1)) for name in ("media_k.0", "media_v.0")),
            outputs=(),
        )

    def allocate(self, name: str, shape: tuple[int, ...]) -> FakeBuffer:
        return FakeBuffer(np.zeros(shape), self.log)

    def bind(self, name: str, buffer: FakeBuffer) -> None:
        self.log.append(f"bind {len(buffer.array)}")
        self.bound[name] = buffer


def media(*numbers: int) -> list[Medium]:
    return [tiled(number, 1) for number in numbers]


def tiled(number: int, rows: int) -> Medium:
    return Medium(pixels=np.full((1, 3, 2, 2), number, np.float32), digest=bytes([number]), rows=rows)


def number_of(medium: Medium) -> int:
    return int(medium.pixels[0, 0, 0, 0])


Encoded = tuple[Medium, Sequence[Mapping[str, np.ndarray]]]


class Encoder:
    """Remembers what it was asked for; the values of a medium's row n are its number and n tenths."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fail_at = fail_at

    def __call__(self, wanted: Sequence[Medium]) -> Iterator[Encoded]:
        for medium in wanted:
            number = number_of(medium)
            if number == self.fail_at:
                raise RuntimeError("the encoder failed")
            self.asked.append(number)
            yield medium, [row_values(number + n / 10) for n in range(medium.rows)]


def row_values(value: float) -> Mapping[str, np.ndarray]:
    return {name: np.full((1, 2, 1), value) for name in ("media_k.0", "media_v.0")}


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


Encode = Callable[[Sequence[Medium]], Iterator[Encoded]]


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


@contextmanager
def pinned(bank: MediaBank, shown: list[Medium], encode: Encode) -> Iterator[np.ndarray]:
    """The rows of media, for as long as a request runs."""
    missing = bank.pin(shown)
    try:
        for medium, values in encode(missing):
            bank.store(medium, values)
        yield bank.rows_of(shown)
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
    assert [number_of(medium) for medium in bank.fitting_beside(media(3, 5, 7, 8))] == [
        5,
        7,
    ]  # what is kept for a later request counts as used, too
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

    def half(wanted: Sequence[Medium]) -> Iterator[Encoded]:
        yield wanted[0], [{"media_k.0": np.ones((1, 2, 1))}]

    with pytest.raises(KeyError), lease(bank, media(1), half):
        pass
    assert not bank.resident
    with lease(bank, media(2), Encoder()) as (rows, _):
        assert rows == {media(2)[0].digest: 0}


def test_an_image_of_tiles_has_rows_side_by_side_once(session: FakeSession) -> None:
    bank, encode = bank_of(session, 6), Encoder()
    shown = [tiled(1, 3), tiled(2, 1), tiled(1, 3)]
    with pinned(bank, shown, encode) as rows:
        assert encode.asked == [1, 2]
        assert rows.tolist() == [0, 1, 2, 3, 0, 1, 2]
        assert (bank.pinned, bank.filled) == (4, 4)
        assert session.bound["media_k.0"].array[:4, 0, 0, 0].tolist() == [1.0, 1.1, 1.2, 2.0]
        with pytest.raises(
            CapacityError,
            match=r"2 different images and videos of 3 tiles are needed at once, the bank holds 6, 4 of them in use",
        ):
            bank.pin([tiled(3, 2), tiled(4, 1)])
    assert (bank.pinned, bank.filled) == (0, 4)


def test_images_make_room_for_more_tiles_than_the_oldest_had(session: FakeSession) -> None:
    bank, encode = bank_of(session, 4), Encoder()
    for number in (1, 2, 3):
        with pinned(bank, [tiled(number, 1)], encode):
            pass
    with pinned(bank, [tiled(4, 3)], encode) as rows:
        assert set(bank.resident) == {bytes([3]), bytes([4])}
        assert sorted(rows.tolist()) == [0, 1, 3]  # whatever is free, where nothing lies side by side
        assert session.bound["media_v.0"].array[rows, 0, 0, 0].tolist() == [4.0, 4.1, 4.2]


def test_tiles_that_failed_half_way_are_not_found(session: FakeSession) -> None:
    bank = bank_of(session, 2)

    def half(wanted: Sequence[Medium]) -> Iterator[Encoded]:
        yield wanted[0], [row_values(1.0), {"media_k.0": np.ones((1, 2, 1))}]

    with pytest.raises(KeyError), pinned(bank, [tiled(1, 2)], half):
        pass
    assert not bank.resident
    with pinned(bank, [tiled(2, 2)], Encoder()) as rows:
        assert rows.tolist() == [0, 1]


def feeds(media_rows: list[list[int]], phi: list[list[int]]) -> dict[str, np.ndarray]:
    return {"media_rows": np.array(media_rows), "phi": np.array(phi)}


def seen(session: FakeSession, given: Mapping[str, Any]) -> list[list[float]]:
    """What a decoder run reads for the media of each row of the call that are looked at."""
    bank = session.bound["media_k.0"].array
    return [
        [float(bank[row, 0, 0, 0]) for row in rows[: phi.max()]]
        for rows, phi in zip(given["media_rows"], given["phi"], strict=True)
    ]


def filled(session: FakeSession, capacity: int = 8) -> MediaBank:
    """Row n holds image n."""
    bank = bank_of(session, capacity)
    with pinned(bank, media(*range(capacity)), Encoder()):
        return bank


def test_a_decoder_that_multiplies_what_is_bound_is_given_what_is_looked_at_and_nothing_is_copied() -> None:
    session = FakeSession(reads_bound_media=True)
    bank = filled(session)
    session.log.clear()
    for _ in range(3):
        given = bank.narrowed(feeds([[4, 5, 6], [6, 0, 0]], [[3, 3], [1, 0]]))
        assert seen(session, given) == [[4.0, 5.0, 6.0], [6.0]]
    assert session.log == ["bind 3", "bind 3"]
    bank.narrowed(feeds([[0]], [[0]]))
    assert session.log[2:] == ["bind 1", "bind 1"]


def test_rows_far_apart_are_copied_once_until_another_image_has_one() -> None:
    session = FakeSession(reads_bound_media=True)
    bank = filled(session)
    session.log.clear()
    call = feeds([[7, 1], [3, 0]], [[2, 2], [1, 1]])
    for _ in range(3):
        assert seen(session, bank.narrowed(call)) == [[7.0, 1.0], [3.0]]
    assert session.log.count("copy") == 6  # three rows, keys and values
    bank.narrowed(feeds([[2]], [[1]]))  # another call between
    assert seen(session, bank.narrowed(call)) == [[7.0, 1.0], [3.0]]
    assert session.log.count("copy") == 6
    with pinned(bank, media(0, 1, 2, 4, 5, 6, 7, 9), Encoder()):
        assert bank.resident[bytes([9])] == (3,)
        assert seen(session, bank.narrowed(call)) == [[7.0, 1.0], [9.0]]


def test_copies_hold_no_more_rows_than_the_bank() -> None:
    session = FakeSession(reads_bound_media=True)
    bank = filled(session)
    for _ in range(2):
        for rows in ([0, 3, 6], [1, 4, 7], [0, 4, 7], [0, 7], [2, 7]):
            given = bank.narrowed(feeds([rows], [[len(rows)]]))
            assert seen(session, given) == [[float(row) for row in rows]]
            assert sum(map(len, bank._views._taken)) <= 8


def test_other_decoders_see_the_whole_bank(session: FakeSession) -> None:
    bank = filled(session)
    session.log.clear()
    call = feeds([[7, 1]], [[2]])
    assert bank.narrowed(call) == call
    assert not session.log


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
