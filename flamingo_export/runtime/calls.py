"""Which rows decode together, and what the decoder is fed with.

A call covers rows that lie side by side in the cache. Rows between them that do not decode, and columns beyond a row's own branches, are
padding: each padded column sees only the scratch slot that it writes, behind what its row has in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flamingo_export.backends.base import Array
from flamingo_export.runtime.cache import Row
from flamingo_export.runtime.jobs import Generating

MOST_PADDING = 4
"""At most one of so many columns of a call is padding."""
CALL_COST = 4
"""What a call costs beside its columns, in columns: measured on the 110M decoder, 8 rows cost 2.3 steps of one."""


@dataclass(frozen=True)
class Call:
    """Rows first .. first + count - 1 of the cache, with `width` columns each; jobs: those that decode, in order of their rows."""

    first: int
    count: int
    width: int
    jobs: tuple[Generating, ...]

    def slots_needed(self, rows: Sequence[Row]) -> int:
        """Capacity that the call needs, its padding included."""
        return max(row.used for row in rows[self.first : self.first + self.count] if row.busy) + self.width


def plan_calls(jobs: Sequence[Generating], rows: Sequence[Row], most: int, *, buckets: bool = False) -> list[Call]:
    """The calls that decode all jobs once, as cheap as can be.

    most: slots that a row may have.
    buckets: for a decoder whose calls cost about the same whatever they cover, and more where their shape is new: one call from the first row
        on, over a power of two of them, wherever padding has slots to write to.
    """
    jobs = sorted(jobs, key=lambda job: job.row.index)
    if buckets:
        count, width = _bucket(jobs[-1].row.index + 1, len(rows)), max(job.width for job in jobs)
        if all(row.used + width <= most for row in rows[:count] if row.busy):
            return [Call(0, count, width, tuple(jobs))]
    if len(jobs) == 1:
        return [Call(jobs[0].row.index, 1, jobs[0].width, (jobs[0],))]
    best: list[tuple[float, int]] = [(0, 0)]
    """(cost, where the last call begins) of the first n jobs."""
    for stop in range(1, len(jobs) + 1):
        best.append(
            min(
                (best[start][0] + cost, start)
                for start in range(stop)
                if (cost := _cost(jobs[start:stop], rows, most)) is not None
            )
        )
    found: list[Call] = []
    stop = len(jobs)
    while stop:
        start = best[stop][1]
        part = jobs[start:stop]
        first = part[0].row.index
        found.append(Call(first, part[-1].row.index - first + 1, max(job.width for job in part), tuple(part)))
        stop = start
    return found[::-1]


def _bucket(count: int, most: int) -> int:
    return min(most, 1 << (count - 1).bit_length())


def _cost(jobs: Sequence[Generating], rows: Sequence[Row], most: int) -> float | None:
    """Of one call for these jobs; None if too much of it were padding, or padding had no slots to write to."""
    width = max(job.width for job in jobs)
    first, last = jobs[0].row.index, jobs[-1].row.index
    columns = (last - first + 1) * width
    own = sum(job.width for job in jobs)
    if len(jobs) > 1 and (columns - own) * MOST_PADDING > columns:
        return None
    if len(jobs) > 1 and any(row.busy and row.used + width > most for row in rows[first : last + 1]):
        return None
    return CALL_COST + columns


def decode_feeds(call: Call, rows: Sequence[Row], capacity: int, pad: int) -> dict[str, Array]:
    """Inputs of a decoder call for the next step of the call's jobs, whose tokens get their slots here."""
    for job in call.jobs:
        job.take_slots()
    if call.count == 1:
        (job,) = call.jobs
        return job.feeds(capacity)
    width, count = call.width, call.count
    tokens = np.full((count, width), pad, np.int64)
    positions = np.zeros((count, width), np.int64)
    phi = np.zeros((count, width), np.int64)
    media_rows = np.zeros((count, max(1, max(len(job.sees) for job in call.jobs))), np.int64)
    write_index = np.empty(count, np.int64)
    mask = np.zeros((count, 1, width, capacity), np.bool_)
    key_positions = np.empty((count, capacity), np.int64)
    columns = np.arange(width)
    for place, row in enumerate(rows[call.first : call.first + count]):
        slot = row.used if row.busy else min(len(row.held), capacity - width)
        if not row.busy:
            row.give_up(slot)
        write_index[place] = slot
        mask[place, 0, columns, slot + columns] = True
        key_positions[place] = row.key_positions[:capacity]
    for job in call.jobs:
        place, own = job.row.index - call.first, job.width
        tokens[place, :own] = job.tokens
        positions[place, :own] = job.tree.position
        phi[place, :own] = job.phi
        media_rows[place, : len(job.sees)] = job.sees
        mask[place, 0, :own] = job.tree.mask[:, :capacity]
    return {
        "token_ids": tokens,
        "positions": positions,
        "media_rows": media_rows,
        "phi": phi,
        "first_media": np.minimum(phi, 1),
        "write_index": write_index,
        "mask": mask,
        "key_positions": key_positions,
        "logit_positions": np.tile(np.arange(width, dtype=np.int64), (count, 1)),
    }
