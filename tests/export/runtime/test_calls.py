"""Which rows decode together: every job once, little padding, and no scratch where something is held."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_export.runtime.cache import Row, Seat
from flamingo_export.runtime.calls import CALL_COST, MOST_PADDING, Call, decode_feeds, plan_calls

MOST = 20
ROWS = st.lists(
    st.tuples(st.sampled_from(["free", "prefill", "decode", "decode"]), st.integers(0, MOST), st.integers(1, 5)),
    min_size=1,
    max_size=7,
).filter(lambda rows: any(kind == "decode" for kind, _, _ in rows))


def rows_and_jobs(drawn: list[tuple[str, int, int]]) -> tuple[list[Row], list[Any]]:
    rows, jobs = [], []
    for index, (kind, used, width) in enumerate(drawn):
        row = Row(index, np.arange(MOST, dtype=np.int64), held=tuple(range(used)), used=used)
        rows.append(row)
        if kind != "free":
            row.seats.append(Seat(row=row, columns=width, left=MOST))
        if kind == "decode":
            row.used = min(used, MOST - width)
            # Some rows are shared by several, which makes no difference but to whose columns they are.
            first = width // 2 if width % 2 else width
            jobs += [SimpleNamespace(row=row, width=part) for part in (first, width - first) if part]
    return rows, jobs


def widths(part: list[Any]) -> list[int]:
    """Of each row that decodes."""
    return [sum(job.width for job in group) for _, group in itertools.groupby(part, key=lambda job: job.row.index)]


def allowed(part: list[Any], rows: list[Row]) -> bool:
    width, covered = max(widths(part)), rows[part[0].row.index : part[-1].row.index + 1]
    if len(widths(part)) == 1:
        return True
    padding = len(covered) * width - sum(job.width for job in part)
    return padding * MOST_PADDING <= len(covered) * width and all(row.used + width <= MOST for row in covered if row.busy)


@settings(max_examples=200, deadline=None)
@given(drawn=ROWS)
def test_calls_are_the_cheapest_that_are_allowed(drawn: list[tuple[str, int, int]]) -> None:
    rows, jobs = rows_and_jobs(drawn)
    mixed = sorted(jobs, key=lambda job: -job.row.index)  # those of a row keep their order
    calls = plan_calls(mixed, rows, MOST)
    assert [job for call in calls for job in call.jobs] == jobs
    for call in calls:
        assert allowed(list(call.jobs), rows)
        assert (call.first, call.first + call.count - 1) == (call.jobs[0].row.index, call.jobs[-1].row.index)
        assert call.width == max(widths(list(call.jobs)))
        assert call.slots_needed(rows) <= MOST
    # Every way to cut the jobs into neighbours.
    costs = []
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.row.index)]
    for cuts in itertools.product([False, True], repeat=len(groups) - 1):
        parts = [list(groups[0])]
        for group, cut in zip(groups[1:], cuts, strict=True):
            parts.append(list(group)) if cut else parts[-1].extend(group)
        if all(allowed(part, rows) for part in parts):
            spans = [part[-1].row.index - part[0].row.index + 1 for part in parts]
            costs.append(sum(CALL_COST + span * max(widths(part)) for span, part in zip(spans, parts, strict=True)))
    assert sum(CALL_COST + call.count * call.width for call in calls) == min(costs)


@settings(max_examples=100, deadline=None)
@given(drawn=ROWS)
def test_buckets_are_one_call_from_the_first_row_on_where_padding_has_room(drawn: list[tuple[str, int, int]]) -> None:
    rows, jobs = rows_and_jobs(drawn)
    calls = plan_calls(jobs, rows, MOST, buckets=True)
    assert [job for call in calls for job in call.jobs] == jobs
    count, width = min(len(rows), 1 << (jobs[-1].row.index).bit_length()), max(widths(jobs))
    if all(row.used + width <= MOST for row in rows[:count] if row.busy):
        assert [(call.first, call.count, call.width) for call in calls] == [(0, count, width)]
    else:
        assert calls == plan_calls(jobs, rows, MOST)
    assert all(call.slots_needed(rows) <= MOST for call in calls)


def test_padding_writes_behind_what_is_used_and_gives_up_what_it_must() -> None:
    rows = [Row(index, np.arange(MOST, dtype=np.int64)) for index in range(4)]
    rows[1].held = tuple(range(MOST - 1))  # free, holding a prompt that leaves one slot
    rows[2].held, rows[2].used = (1, 2), 5  # in the middle of its prompt
    for index in (0, 2, 3):
        rows[index].seats.append(Seat(row=rows[index], columns=1, left=MOST))
    jobs: list[Any] = []
    for index in (0, 3):
        rows[index].used = 4
        tree = SimpleNamespace(mask=np.zeros((3, MOST), np.bool_), position=4)
        jobs.append(
            SimpleNamespace(
                row=rows[index], width=3, column=0, tree=tree, tokens=np.full(3, 7), phi=np.ones(3, np.int64),
                sees=np.array([2]), take_slots=lambda column: None,
            )
        )  # fmt: skip
    feeds = decode_feeds(Call(0, 4, 3, tuple(jobs)), rows, MOST, pad=0)
    assert feeds["write_index"].tolist() == [4, MOST - 3, 5, 4]
    assert len(rows[1].held) == MOST - 3
    assert len(rows[2].held) == 2
    for row, slot in ((1, MOST - 3), (2, 5)):
        assert [np.flatnonzero(mask).tolist() for mask in feeds["mask"][row, 0]] == [[slot], [slot + 1], [slot + 2]]
        assert (feeds["token_ids"][row] == 0).all()
        assert (feeds["phi"][row] == 0).all()
