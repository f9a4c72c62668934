"""Requests as the generation core carries them: what was asked, how far it has come, and what its branches are fed with next.

Job          a prompt and its media on their way into a cache row
Generating   then a search that chooses tokens, a decoding step at a time
Scoring      then passes over candidate answers, all branches of one tree

Requests whose prompts begin alike may have places in one row: each sees the beginning and what it wrote itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_export.runtime.candidates import Scores, log_sum_exp, whole, without
from flamingo_export.runtime.media_encoder import Encoding
from flamingo_export.runtime.request import Prepared
from flamingo_export.runtime.scheduler import Entry
from flamingo_export.runtime.search import Search, Step
from flamingo_export.runtime.ticket import Ticket, Tokens
from flamingo_export.runtime.tree import BeamTree, Mask
from flamingo_reference.arrays import Array, Ints
from flamingo_reference.phi import phi_after

if TYPE_CHECKING:
    from flamingo_export.runtime.cache import Row, Seat

WHOLE_ROW = 1 << 62
"""Slots of a request that nobody knows the length of: it shares no row."""
clock = time.perf_counter


class Group:
    """Requests that are wanted together, of which at most `limit` are with the scheduler at once; the others wait here, in order."""

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
            cost=cost,
            caller=caller,
            deadline=deadline,
            media={medium.digest: medium.rows for medium in request.media},
            patient=group is not None and not events,
        )
        self.request, self.ticket, self.group, self.timings = request, ticket, group, ticket.timings
        self.seat: Seat | None = None
        """In a row of the cache, once it is admitted."""
        self.seen: Mask | None = None
        """Slots of its prompt that are in the cache, bool [C], from its first chunk on."""
        self.admitted = False
        self.events = events
        self.chosen = 0
        """Steps in which its search has chosen tokens."""
        self.encoding: Encoding | None = None
        self.media_rows: Ints | None = None
        self.done = 0
        self._looked = clock()

    @property
    def row(self) -> Row:
        """The cache's row that it is in."""
        assert self.seat is not None
        return self.seat.row

    @property
    def columns(self) -> int:
        """Branches of its decoding steps, 0 where it has none."""
        return 0

    @property
    def slots(self) -> int:
        """Slots of a row that it takes at most, its whole prompt among them."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Decoding steps at most."""
        return 0

    @property
    def num_candidates(self) -> int | None:
        """Best tokens wanted after the prompt, None for the logits of the whole vocabulary."""
        return None

    def settle(self, shared: int) -> None:
        """Its row is known, whose first `shared` slots hold the beginning of its prompt."""
        self.done = shared
        self.seen = np.zeros(len(self.row.key_positions), np.bool_)
        self.seen[:shared] = True

    def place(self, count: int) -> None:
        """The next positions of the prompt are about to be written to the row's next slots."""
        row = self.row
        row.key_positions[row.used : row.used + count] = np.arange(self.done, self.done + count)

    def commit_prompt(self, count: int) -> None:
        """After they were: they are seen from now on."""
        assert self.seat is not None
        assert self.seen is not None
        row, slot, start = self.seat.row, self.seat.row.used, self.done
        self.seen[slot : slot + count] = True
        self.seat.take(count)
        self.done += count
        if slot == start == len(row.held):  # the row's beginning continues without a gap
            row.held = self.request.keys[: self.done]

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


class Generating(Job):
    """A request whose tokens a search chooses."""

    def __init__(
        self, search: Search, steps: int | None, reset: int | None, request: Prepared, ticket: Ticket[Any], **rest: Any
    ) -> None:
        """steps: that it decodes at most, None where that is not known. reset: after this token a branch sees no medium."""
        super().__init__(request, ticket, **rest)
        self.search = search
        self.width = search.width
        self.column = 0
        """Of its first branch in its row's columns of the present step."""
        self._steps, self._reset = steps, reset
        self._logit_positions = np.arange(self.width, dtype=np.int64)[None]
        self._given: list[int] = []

    @property
    def num_candidates(self) -> int | None:
        return self.search.num_candidates

    @property
    def columns(self) -> int:
        return self.width

    @property
    def steps(self) -> int:
        return self._steps or 0

    @property
    def slots(self) -> int:
        return WHOLE_ROW if self._steps is None else len(self.request.token_ids) + self._steps * self.width

    @property
    def looked_at(self) -> Ints:
        """Bank rows that its steps look at."""
        return self.looks(self._reset)

    def start(self) -> None:
        """The prompt is in the cache: branches begin behind it."""
        assert self.seen is not None
        self.tree = BeamTree(self.seen, self.done, self.width)
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

    def foresee(self, tokens: Ints) -> None:
        """Every branch continues itself, with tokens that are not all known yet: where they are, with these."""
        self.tokens = tokens
        self._parents = np.arange(self.width)
        self.phi = self._following  # which depends on the tokens before

    def confirm(self, step: Step) -> None:
        """What was foreseen is what the search chose."""
        self.tokens = step.tokens
        self._following = self.phi if self._reset is None else np.where(step.tokens == self._reset, 0, self.phi)

    def go_back(self, step: Step, slot: int) -> None:
        """It is not: what was run from `slot` on is not seen, and the step is to be run with these tokens."""
        assert self.seat is not None
        self.confirm(step)
        self.tree.take_back(slot)
        self.seat.give_back(self.width)

    def take_slots(self, column: int) -> None:
        """The tokens chosen get slots of the row, behind those of `column` other branches that are in it."""
        self.column = column
        first = self.row.used + column
        self.tree.step(self._parents, first)
        self.row.key_positions[first : first + self.width] = self.tree.position

    def feeds(self, capacity: int) -> dict[str, Array]:
        """Inputs of a decoder call for only this request."""
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
        assert self.seat is not None
        self.seat.take(self.width)
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
        likeliest: list[list[tuple[int, float]]] | None = None,
        **rest: Any,
    ) -> None:
        """candidates: at least one token each, their last ones are predicted and never run. room: tokens of a pass at most.

        likeliest: to be filled with the likeliest token at each place of each candidate, and its log-probability.
        """
        super().__init__(request, ticket, **rest)
        self._likeliest = likeliest
        self._candidates, self._banned, self._reset = candidates, banned, reset
        self._groups = [group for group in _groups(candidates, room) if any(len(candidates[index]) > 1 for index in group)]
        self.results: list[list[float]] = [[] for _ in candidates]

    @property
    def finished(self) -> bool:
        """Whether no pass is left."""
        return not self._groups

    @property
    def slots(self) -> int:
        return len(self.request.token_ids) + max((self._tokens_of(group) for group in self._groups), default=0)

    @property
    def pass_slots(self) -> int:
        """Slots that the next pass writes, and nobody reads afterwards."""
        return self._tokens_of(self._groups[0])

    def _tokens_of(self, group: Sequence[int]) -> int:
        return sum(len(self._candidates[index]) - 1 for index in group)

    def start(self, scores: Scores) -> None:
        """Takes the logits [1, V] after the prompt: of each candidate's first token."""
        firsts = np.array([candidate[0] for candidate in self._candidates])
        logits = whole(scores)
        if self._likeliest is not None:
            best = _likeliest(logits.copy(), self._banned)
            self._likeliest += [list(best) for _ in self._candidates]
        for index, logprob in enumerate(_logprobs(logits, np.zeros_like(firsts), firsts, self._banned)):
            self.results[index].append(logprob)
        self.sees = self.looks(self._reset)

    def feeds(self, capacity: int) -> dict[str, Array]:
        """Inputs of the next pass."""
        group, prompt, slot = self._groups[0], self.done, self.row.used
        lengths = [len(self._candidates[index]) - 1 for index in group]
        token_ids = np.concatenate([np.asarray(self._candidates[index][:-1], np.int64) for index in group])
        total = len(token_ids)
        depth = np.concatenate([np.arange(length) for length in lengths])
        branch = np.repeat(np.arange(len(lengths)), lengths)
        mask = np.zeros((1, 1, total, capacity), np.bool_)
        assert self.seen is not None
        mask[..., :slot] = self.seen[:slot]
        own = mask[0, 0, :, slot : slot + total]
        own[:] = (branch[:, None] == branch) & (depth <= depth[:, None])
        # A position sees the prompt's medium unless the reset stands before it in its own branch.
        ended = (own & (token_ids == self._reset) & (depth < depth[:, None])).any(axis=1)
        key_positions = self.row.key_positions[None, :capacity].copy()
        key_positions[0, slot : slot + total] = prompt + depth
        return {
            "token_ids": token_ids[None],
            "positions": (prompt + depth)[None],
            "media_rows": _some(self.sees)[None],
            "phi": np.where(ended, 0, len(self.sees))[None].astype(np.int64),
            "first_media": np.where(ended, 0, min(1, len(self.sees)))[None].astype(np.int64),
            "write_index": np.array([slot], np.int64),
            "mask": mask,
            "key_positions": key_positions,
            "logit_positions": np.arange(total, dtype=np.int64)[None],
        }

    def take(self, scores: Scores) -> None:
        """Takes the logits [K, V] of the pass that `feeds` described."""
        group = self._groups.pop(0)
        wanted = np.concatenate([np.asarray(self._candidates[index][1:], np.int64) for index in group])
        logits = whole(scores)
        if self._likeliest is not None:
            best = iter(_likeliest(logits.copy(), self._banned))
            for index in group:
                self._likeliest[index] += [next(best) for _ in self._candidates[index][1:]]
        found = iter(_logprobs(logits, np.arange(len(wanted)), wanted, self._banned))
        for index in group:
            self.results[index] += [next(found) for _ in self._candidates[index][1:]]


def _some(rows: Ints) -> Ints:
    """Bank rows of a call, of which there is always one."""
    return rows if len(rows) else np.zeros(1, np.int64)


def _logprobs(logits: Array, rows: Array, tokens: Array, banned: Sequence[int]) -> list[float]:
    """Log-probabilities of tokens, each under its row of logits, which are overwritten."""
    top = without(logits, banned)
    values = logits[rows, tokens].astype(np.float64)
    return [float(logprob) for logprob in values - log_sum_exp(logits, top)[rows]]


def _likeliest(logits: Array, banned: Sequence[int]) -> list[tuple[int, float]]:
    """The likeliest token of each row of logits, which are overwritten, and its log-probability."""
    without(logits, banned)
    tokens = logits.argmax(axis=1)
    return list(zip(tokens.tolist(), _logprobs(logits, np.arange(len(logits)), tokens, banned), strict=True))


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
