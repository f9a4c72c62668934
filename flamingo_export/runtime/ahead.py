"""A step that was asked for before the step before it was read, so that the host's search runs while the device computes.

    device   | step 1 ......... | step 2 ......... | step 3 .........
    host       ask 2 | wait for 1, choose, ask 3 | wait for 2, choose, ask 4 |

What step 2 is fed with is known before step 1 is done, but for its tokens: these the device takes of step 1's candidates itself, the
likeliest ones, or ones drawn with the host's random numbers (`backends.base.Handed`). The host then chooses as ever. Where its choice ends
the request, what step 2 computed for it is not read; where it is another than the device's, which a rounding can do to a draw, the step
is run again with the right token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flamingo_export.backends.base import Draws, Handed, Running, RunsAhead, Session
from flamingo_export.runtime.calls import Call
from flamingo_export.runtime.candidates import Candidates, offered
from flamingo_export.runtime.jobs import Generating
from flamingo_export.runtime.search import Foreseen
from flamingo_reference.arrays import Array, Ints


@dataclass(eq=False, kw_only=True)
class Flight:
    """A step that was asked for and is not read.

    columns, slots: of each of its jobs, the first in its row. foreseen: of those whose tokens it takes from the step before. astray: those
    that it runs with other tokens than their searches chose.
    """

    call: Call
    running: Running
    columns: dict[Generating, int]
    slots: dict[Generating, int]
    foreseen: Mapping[Generating, Foreseen] = field(default_factory=dict)
    astray: set[Generating] = field(default_factory=set)

    def of(self, job: Generating, scores: Array | Candidates) -> Array | Candidates:
        """What [B, W, ...] holds for one of its jobs, [W, ...]."""
        column = self.columns[job]
        return scores[job.row.index - self.call.first][column : column + job.width]

    def branches(self, job: Generating) -> Ints:
        """Places of a job's branches in [B, W], counted through."""
        first = (job.row.index - self.call.first) * self.call.width + self.columns[job]
        return np.arange(first, first + job.width)


def could_follow(decoder: Session, jobs: Sequence[Generating]) -> Mapping[Generating, Foreseen] | None:
    """What is foreseen of the jobs' next choices, None where a step cannot be asked for before these are made."""
    if not isinstance(decoder, RunsAhead) or not decoder.runs_ahead:
        return None
    most, found = offered(decoder), {}
    for job in jobs:
        foreseen, wanted = job.search.foreseen(), job.num_candidates
        if foreseen is None or wanted is None or wanted > most:
            return None
        found[job] = foreseen
    return found


def handed(before: Flight, call: Call, foreseen: Mapping[Generating, Foreseen], sources: Mapping[Generating, Ints]) -> Handed:
    """Tokens that a step takes of what the one before it finds. sources: `Flight.branches` of the jobs in that one; their columns in the
    call are known."""
    shape = (call.count, call.width)
    source = np.full(shape, -1, np.int64)
    draws = None
    if any(each.uniform is not None for each in foreseen.values()):
        draws = Draws(
            temperature=np.zeros(shape),
            top_k=np.ones(shape, np.int64),
            top_p=np.zeros(shape),
            min_p=np.zeros(shape),
            uniform=np.zeros(shape),
        )
    for job, each in foreseen.items():
        place = (job.row.index - call.first, slice(job.column, job.column + job.width))
        source[place] = np.where(each.open, sources[job], -1)
        if draws is not None and each.uniform is not None:
            draws.temperature[place], draws.top_k[place] = each.temperature, each.top_k
            draws.top_p[place], draws.min_p[place], draws.uniform[place] = each.top_p, each.min_p, each.uniform
    return Handed(source=source, draws=draws)


def run_with(following: Flight, job: Generating, found: Candidates) -> Ints:
    """The tokens [W] with which a step runs a job that it takes from the step before, whose candidates `found` are [W, n]."""
    foreseen, drawn = following.foreseen[job], following.running.tokens()
    if drawn is not None:
        tokens = following.of(job, drawn)
        assert not isinstance(tokens, Candidates)
        return tokens
    return np.where(foreseen.open, found.ids[:, 0], foreseen.tokens)
