"""Which rows decode together, and what the decoder is fed with.

A call covers rows that lie side by side in the cache. Requests that share a row are side by side in its columns. Rows between them that do not
decode, and columns beyond a row's own branches, are padding: each padded column sees only the scratch slot that it writes, behind what its row
has in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flamingo_export.runtime.cache import Row
from flamingo_export.runtime.candidates import Scores
from flamingo_export.runtime.jobs import Generating
from flamingo_reference.arrays import Array

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

    def of(self, job: Generating, scores: Scores) -> Scores:
        """What the call found for one of its jobs, [W, n], of scores [B, width, n]."""
        own = scores[job.row.index - self.first]
        return own if job.width == self.width else own[job.column : job.column + job.width]


@dataclass(frozen=True)
class _Decoding:
    """A row with those who decode in it, and their columns."""

    row: Row
    jobs: tuple[Generating, ...]
    width: int


def plan_calls(jobs: Sequence[Generating], rows: Sequence[Row], most: int, *, buckets: bool = False) -> list[Call]:
    """The calls that decode all jobs once, as cheap as can be. Those that share a row are side by side in its columns.

    most: slots that a row may have.
    buckets: for a decoder whose calls cost about the same whatever they cover, and more where their shape is new: one call from the first row
        on, over a power of two of them, wherever padding has slots to write to.
    """
    decoding = _by_row(jobs)
    if buckets:
        count, width = _bucket(decoding[-1].row.index + 1, len(rows)), max(each.width for each in decoding)
        if all(row.used + width <= most for row in rows[:count] if row.busy):
            return [Call(0, count, width, _jobs(decoding))]
    if len(decoding) == 1:
        return [_call(decoding)]
    best: list[tuple[float, int]] = [(0, 0)]
    """(cost, where the last call begins) of the first n rows."""
    for stop in range(1, len(decoding) + 1):
        best.append(
            min(
                (best[start][0] + cost, start)
                for start in range(stop)
                if (cost := _cost(decoding[start:stop], rows, most)) is not None
            )
        )
    found: list[Call] = []
    stop = len(decoding)
    while stop:
        start = best[stop][1]
        found.append(_call(decoding[start:stop]))
        stop = start
    return found[::-1]


def _by_row(jobs: Sequence[Generating]) -> list[_Decoding]:
    by_row: dict[int, list[Generating]] = {}
    for job in jobs:
        by_row.setdefault(job.row.index, []).append(job)
    return [
        _Decoding(row=own[0].row, jobs=tuple(own), width=sum(job.width for job in own)) for _, own in sorted(by_row.items())
    ]


def _jobs(decoding: Sequence[_Decoding]) -> tuple[Generating, ...]:
    return tuple(job for each in decoding for job in each.jobs)


def _call(decoding: Sequence[_Decoding]) -> Call:
    first = decoding[0].row.index
    return Call(first, decoding[-1].row.index - first + 1, max(each.width for each in decoding), _jobs(decoding))


def _bucket(count: int, most: int) -> int:
    return min(most, 1 << (count - 1).bit_length())


def _cost(decoding: Sequence[_Decoding], rows: Sequence[Row], most: int) -> float | None:
    """Of one call for these rows; None if too much of it were padding, or padding had no slots to write to."""
    width = max(each.width for each in decoding)
    first, last = decoding[0].row.index, decoding[-1].row.index
    columns = (last - first + 1) * width
    own = sum(each.width for each in decoding)
    if len(decoding) > 1 and (columns - own) * MOST_PADDING > columns:
        return None
    if len(decoding) > 1 and any(row.busy and row.used + width > most for row in rows[first : last + 1]):
        return None
    return CALL_COST + columns


def decode_feeds(call: Call, rows: Sequence[Row], capacity: int, pad: int) -> dict[str, Array]:
    """Inputs of a decoder call for the next step of the call's jobs, whose tokens get their slots here."""
    columns = [0] * call.count
    for job in call.jobs:
        place = job.row.index - call.first
        job.take_slots(columns[place])
        columns[place] += job.width
    if len(call.jobs) == 1 and call.count == 1:
        return call.jobs[0].feeds(capacity)
    width, count = call.width, call.count
    tokens = np.full((count, width), pad, np.int64)
    positions = np.zeros((count, width), np.int64)
    phi = np.zeros((count, width), np.int64)
    first_media = np.zeros((count, width), np.int64)
    write_index = np.empty(count, np.int64)
    mask = np.zeros((count, 1, width, capacity), np.bool_)
    key_positions = np.empty((count, capacity), np.int64)
    each_column = np.arange(width)
    for place, row in enumerate(rows[call.first : call.first + count]):
        slot = row.used if row.busy else min(len(row.held), capacity - width)
        if not row.busy:
            row.give_up(slot)
        write_index[place] = slot
        mask[place, 0, each_column, slot + each_column] = True
        key_positions[place] = row.key_positions[:capacity]
    media: list[list[int]] = [[] for _ in range(count)]
    for job in call.jobs:
        place, own = job.row.index - call.first, slice(job.column, job.column + job.width)
        tokens[place, own] = job.tokens
        positions[place, own] = job.tree.position
        last = _place(media[place], job.sees.tolist())
        phi[place, own] = np.where(job.phi > 0, last, 0)
        first_media[place, own] = np.where(job.phi > 0, last - len(job.sees) + 1, 0)
        mask[place, 0, own] = job.tree.mask[:, :capacity]
    media_rows = np.zeros((count, max(1, max(map(len, media)))), np.int64)
    for place, own_media in enumerate(media):
        media_rows[place, : len(own_media)] = own_media
    return {
        "token_ids": tokens,
        "positions": positions,
        "media_rows": media_rows,
        "phi": phi,
        "first_media": first_media,
        "write_index": write_index,
        "mask": mask,
        "key_positions": key_positions,
        "logit_positions": np.tile(np.arange(width, dtype=np.int64), (count, 1)),
    }


def _place(media: list[int], looks: list[int]) -> int:
    """phi of what looks at these bank rows among a row's media, which they join unless they are there. 0: it looks at none."""
    if not looks:
        return 0
    for start in range(len(media) - len(looks) + 1):
        if media[start : start + len(looks)] == looks:
            return start + len(looks)
    media += looks
    return len(media)
