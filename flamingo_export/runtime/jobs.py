"""Requests as the generation core carries them: what was asked, how far it has come, and what its branches are fed with next.

Job          a prompt and its media on their way into a cache row
Generating   then a search that chooses tokens, a decoding step at a time
Scoring      then passes over candidate answers, all branches of one tree
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_export.backends.base import Array
from flamingo_export.runtime.candidates import Scores, log_sum_exp, whole, without
from flamingo_export.runtime.media_encoder import Encoding
from flamingo_export.runtime.request import Prepared
from flamingo_export.runtime.scheduler import Entry
from flamingo_export.runtime.search import Search, Step
from flamingo_export.runtime.ticket import Ticket, Tokens
from flamingo_export.runtime.tree import BeamTree, Ints
from flamingo_reference.phi import phi_after

if TYPE_CHECKING:
    from flamingo_export.runtime.cache import Row

clock = time.perf_counter


class Group:
    """Requests of which at most `limit` are with the scheduler at once; the others wait here, in order."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self.backlog: list[Job] = []


class Job(Entry):
    """A prompt and its media, and where they stand.

    done: positions of the prompt that are in the cache.
    media_rows: bank rows of the request's media [M], once all are encoded.
    """

    def __init__(
        self,
        request: Prepared,
        ticket: Ticket[Any],
        *,
        cost: int,
        caller: str,
        deadline: float,
        group: Group | None = None,
        events: bool = False,
    ) -> None:
        """events: whether the ticket is given tokens as they become certain."""
        super().__init__(
            cost=cost, caller=caller, deadline=deadline, media={medium.digest: medium.rows for medium in request.media}
        )
        self.request, self.ticket, self.group, self.timings = request, ticket, group, ticket.timings
        self.row: Row
        """Of the cache, once it is admitted."""
        self.admitted = False
        self.events = events
        self.chosen = 0
        """Steps in which its search has chosen tokens."""
        self.encoding: Encoding | None = None
        self.media_rows: Ints | None = None
        self.done = 0
        self._looked = clock()

    @property
    def num_candidates(self) -> int | None:
        """Best tokens wanted after the prompt, None for the logits of the whole vocabulary."""
        return None

    def elapsed(self) -> float:
        """Seconds since this was asked last."""
        before, self._looked = self._looked, clock()
        return self._looked - before

    def looks(self, reset: int | None) -> Ints:
        """Bank rows that what follows the prompt looks at: none, one, or those of the last images' tiles."""
        assert self.media_rows is not None
        request = self.request
        last = phi_after(request.token_ids, request.phi, reset)
        first = last if request.first is None else int(request.first[-1])
        return self.media_rows[first - 1 : last] if last else self.media_rows[:0]


def _some(rows: Ints) -> Ints:
    """Bank rows, one at least: a call names one for each request, looked at or not."""
    return rows if len(rows) else np.zeros(1, np.int64)


class Generating(Job):
    """A request whose tokens a search chooses."""

    def __init__(self, search: Search, reset: int | None, request: Prepared, ticket: Ticket[Any], **rest: Any) -> None:
        """reset: after this token a branch sees no medium."""
        super().__init__(request, ticket, **rest)
        self.search = search
        self.width = search.width
        self._reset = reset
        self._logit_positions = np.arange(self.width, dtype=np.int64)[None]
        self._given: list[int] = []

    @property
    def num_candidates(self) -> int | None:
        return self.search.num_candidates

    def start(self) -> None:
        """The prompt is in the cache: branches begin behind it."""
        visible = np.zeros(len(self.row.key_positions), np.bool_)
        visible[: self.done] = True
        self.tree = BeamTree(visible, self.done, self.width)
        self.sees = self.looks(self._reset)
        self.tokens: Ints = np.zeros(self.width, np.int64)
        self.phi: Ints = np.full(self.width, len(self.sees), np.int64)
        self._following = self.phi

    def follow(self, step: Step) -> None:
        """What the search chose is what runs next."""
        self.tokens = step.tokens
        self._parents = step.parents
        self.phi = self._following[step.parents]
        # A branch that has come to the reset sees no medium from then on.
        self._following = self.phi if self._reset is None else np.where(step.tokens == self._reset, 0, self.phi)

    def take_slots(self) -> None:
        """The tokens chosen get the next slots of the row."""
        row, tree = self.row, self.tree
        tree.step(self._parents, row.used)
        row.key_positions[row.used : row.used + self.width] = tree.position

    def feeds(self, capacity: int) -> dict[str, Array]:
        """Inputs of a decoder call for this request alone."""
        tree, row = self.tree, self.row
        return {
            "token_ids": self.tokens[None],
            "positions": np.full((1, self.width), tree.position, np.int64),
            "media_rows": _some(self.sees)[None],
            "phi": self.phi[None],
            "first_media": np.minimum(self.phi, 1)[None],
            "write_index": np.array([row.used], np.int64),
            "mask": tree.mask[None, None, :, :capacity],
            "key_positions": row.key_positions[None, :capacity],
            "logit_positions": self._logit_positions,
        }

    def commit(self) -> None:
        """After the step was run: its slots are kept."""
        self.row.used += self.width
        self.tree.commit()

    def news(self) -> list[Tokens]:
        """Tokens that have become certain since this was asked last."""
        found = []
        for index, certain in enumerate(self.search.certain()):
            if index == len(self._given):
                self._given.append(0)
            given = self._given[index]
            if len(certain.token_ids) > given:
                ids, logprobs, top = certain.token_ids[given:], certain.token_logprobs[given:], certain.top[given:]
                found.append(Tokens(index=index, token_ids=tuple(ids), token_logprobs=tuple(logprobs), top=tuple(top)))
                self._given[index] = len(certain.token_ids)
        return found


class Scoring(Job):
    """Candidate answers whose tokens' log-probabilities are wanted.

    All candidates of a pass are branches side by side after the prompt that they share; more candidates than have room go in several
    passes over the same slots.
    """

    def __init__(
        self,
        candidates: Sequence[Sequence[int]],
        room: int,
        banned: Sequence[int],
        reset: int | None,
        request: Prepared,
        ticket: Ticket[Any],
        **rest: Any,
    ) -> None:
        """candidates: at least one token each, their last ones are predicted and never run. room: tokens of a pass at most."""
        super().__init__(request, ticket, **rest)
        self._candidates, self._banned, self._reset = candidates, banned, reset
        self._groups = [group for group in _groups(candidates, room) if any(len(candidates[index]) > 1 for index in group)]
        self.results: list[list[float]] = [[] for _ in candidates]

    @property
    def finished(self) -> bool:
        """Whether no pass is left."""
        return not self._groups

    @property
    def slots(self) -> int:
        """Slots that the next pass takes behind the prompt."""
        return sum(len(self._candidates[index]) - 1 for index in self._groups[0])

    def start(self, scores: Scores) -> None:
        """Takes the logits [1, V] after the prompt: of each candidate's first token."""
        firsts = np.array([candidate[0] for candidate in self._candidates])
        for index, logprob in enumerate(_logprobs(whole(scores), np.zeros_like(firsts), firsts, self._banned)):
            self.results[index].append(logprob)
        self.sees = self.looks(self._reset)

    def feeds(self, capacity: int) -> dict[str, Array]:
        """Inputs of the next pass."""
        group, prompt = self._groups[0], self.done
        lengths = [len(self._candidates[index]) - 1 for index in group]
        token_ids = np.concatenate([np.asarray(self._candidates[index][:-1], np.int64) for index in group])
        total = len(token_ids)
        depth = np.concatenate([np.arange(length) for length in lengths])
        branch = np.repeat(np.arange(len(lengths)), lengths)
        mask = np.zeros((1, 1, total, capacity), np.bool_)
        mask[..., :prompt] = True
        own = mask[0, 0, :, prompt : prompt + total]
        own[:] = (branch[:, None] == branch) & (depth <= depth[:, None])
        # A position sees the prompt's medium unless the reset stands before it in its own branch.
        ended = (own & (token_ids == self._reset) & (depth < depth[:, None])).any(axis=1)
        key_positions = self.row.key_positions[None, :capacity].copy()
        key_positions[0, prompt : prompt + total] = prompt + depth
        return {
            "token_ids": token_ids[None],
            "positions": (prompt + depth)[None],
            "media_rows": _some(self.sees)[None],
            "phi": np.where(ended, 0, len(self.sees))[None].astype(np.int64),
            "first_media": np.where(ended, 0, min(1, len(self.sees)))[None].astype(np.int64),
            "write_index": np.array([prompt], np.int64),
            "mask": mask,
            "key_positions": key_positions,
            "logit_positions": np.arange(total, dtype=np.int64)[None],
        }

    def take(self, scores: Scores) -> None:
        """Takes the logits [K, V] of the pass that `feeds` described."""
        group = self._groups.pop(0)
        wanted = np.concatenate([np.asarray(self._candidates[index][1:], np.int64) for index in group])
        found = iter(_logprobs(whole(scores), np.arange(len(wanted)), wanted, self._banned))
        for index in group:
            self.results[index] += [next(found) for _ in self._candidates[index][1:]]


def _logprobs(logits: Array, rows: Array, tokens: Array, banned: Sequence[int]) -> list[float]:
    """Log-probabilities of tokens, each under its row of logits, which are overwritten."""
    top = without(logits, banned)
    values = logits[rows, tokens].astype(np.float64)
    return [float(logprob) for logprob in values - log_sum_exp(logits, top)[rows]]


def _groups(candidates: Sequence[Sequence[int]], room: int) -> list[list[int]]:
    """Candidates in order, as many at once as have room."""
    groups: list[list[int]] = [[]]
    used = 0
    for index, candidate in enumerate(candidates):
        length = len(candidate) - 1
        if groups[-1] and used + length > room:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += length
    return groups
