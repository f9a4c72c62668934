"""Choosing tokens: greedy, beam search and sampling, in plain numpy, one object a request.

A search is fed the best tokens of each branch, or logits [branches, V], and answers with the tokens to run next and the branch that each
continues, until it is done. Beam search is transformers' (generation/utils.py, `_beam_search`, version 5): 2W candidates a step, those that
end among the best W are kept with score sum(log p) / length ** length_penalty, early stopping off: a request ends when no live beam can beat
its worst kept one. The 2W are the best of W + 1 a branch, which loses nothing: the best W are among the best W of their branches, and of a
branch's best W + 1 one at most ends the text. With E end tokens it is (1 + E)W candidates a step and the best of W + E a branch.
`<image>` and the model's other banned tokens are never generated: their logits are removed before the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from flamingo_export.runtime.candidates import (
    Floats,
    Ints,
    Logits,
    Scores,
    Top,
    candidates_of,
    log_probabilities,
    log_sum_exp,
    top_tokens,
    tops_among,
    tops_of,
    whole,
    without,
)
from flamingo_export.runtime.steering import Steering

NO_SCORE = -1.0e9  # transformers' "not there yet"


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A finished text.

    token_ids, token_logprobs: `<EOC>` included if it was reached.
    score: decides the order.
    reason: whether it ended by itself or at max_new_tokens.
    branch: which of the samples it is.
    top: the likeliest tokens at each place, where they were asked for.
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float
    reason: Literal["stop", "length"] = "length"
    branch: int = 0
    top: tuple[Top, ...] = ()


class Certain(NamedTuple):
    """What a text is certain to begin with."""

    token_ids: Sequence[int]
    token_logprobs: Sequence[float]
    top: Sequence[Top] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """Branch w continues branch parents[w] with tokens[w]; int64 [W] each."""

    parents: Ints
    tokens: Ints


class Search(Protocol):
    """How one request chooses its tokens."""

    @property
    def width(self) -> int:
        """Branches, W."""

    @property
    def num_candidates(self) -> int | None:
        """Best tokens of a branch that it needs, None: the logits of the whole vocabulary."""

    def advance(self, scores: Scores) -> Step | None:
        """Takes candidates, or float32 logits, which it overwrites, of one branch at first and of W later. None: the request is finished."""

    def certain(self) -> list[Certain]:
        """What each text is certain to begin with. Beams have one text, the best; samples one each."""

    def results(self) -> list[Hypothesis]:
        """Finished hypotheses, best first."""


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Where a text ends, and what is chosen from.

    eoc, ends: tokens that end it.
    banned: one or several tokens that are never generated.
    stop: whether these new tokens end it, None for never.
    steering: changes of the scores that tokens are chosen by.
    top: likeliest tokens to be reported at each place.
    """

    eoc: int
    banned: int | Sequence[int]
    max_new_tokens: int
    ends: tuple[int, ...] = ()
    stop: Callable[[Sequence[int]], bool] | None = None
    steering: Steering | None = None
    top: int = 0

    @property
    def stops(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        return (self.eoc, *self.ends)


class BeamSearch:
    """Beam search with W >= 2 beams."""

    def __init__(self, rule: StopRule, *, beams: int, length_penalty: float = 0.0, early_stopping: bool = False) -> None:
        """early_stopping: end as soon as there are W finished texts, whatever the live beams may become."""
        self._rule = rule
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self.width = beams
        self._scores = np.full(beams, NO_SCORE)
        self._scores[0] = 0.0
        self._tokens = np.zeros((beams, rule.max_new_tokens), np.int64)
        self._logprobs = np.zeros((beams, rule.max_new_tokens))
        self._tops: list[tuple[Top, ...]] = [()] * beams
        self._length = 0
        self._kept: list[Hypothesis] = []
        self._finished = False

    @property
    def num_candidates(self) -> int | None:
        if self._rule.steering is not None or self._rule.stop is not None:
            return None
        return max(self.width + len(self._rule.stops), self._rule.top)

    def advance(self, scores: Scores) -> Step | None:
        rule, width = self._rule, self.width
        rows, tokens, logprobs, totals, tops = self._best(scores)
        self._length += 1
        ends = tokens == rule.eoc
        for stop in rule.ends:
            ends |= tokens == stop
        if rule.stop is not None:
            for rank in np.flatnonzero(~ends):
                ends[rank] = rule.stop([*self._tokens[rows[rank], : self._length - 1].tolist(), int(tokens[rank])])
        by_itself = ends
        if self._length >= rule.max_new_tokens:
            ends = np.ones_like(ends)
        for rank in np.flatnonzero(ends[:width]):
            if totals[rank] > NO_SCORE / 2:  # else it grew from a text that had ended, kept in place of a beam
                self._keep(
                    int(rows[rank]), int(tokens[rank]), float(logprobs[rank]), float(totals[rank]), tops, bool(by_itself[rank])
                )
        live = np.flatnonzero(~ends)[:width]
        if len(live) == 0:
            self._finished = True
            return None
        if len(live) < width:  # as in transformers, what has ended fills the places of beams, without a chance to be chosen
            dead = np.flatnonzero(ends)[: width - len(live)]
            totals[dead] = NO_SCORE
            live = np.concatenate([live, dead])
        parents = rows[live]
        self._tokens, self._logprobs = self._tokens[parents], self._logprobs[parents]
        self._tokens[:, self._length - 1] = tokens[live]
        self._logprobs[:, self._length - 1] = logprobs[live]
        if rule.top:
            self._tops = [(*self._tops[parent], tops[parent]) for parent in parents.tolist()]
        self._scores = totals[live]
        if not self._can_improve():
            self._finished = True
            return None
        return Step(parents=parents, tokens=tokens[live])

    def certain(self) -> list[Certain]:
        """The common beginning of all live beams and of the kept hypotheses: the best one is, or grows from, one of these."""
        if self._finished:
            best = self._kept[0]
            return [Certain(best.token_ids, best.token_logprobs, best.top)]
        tokens = self._agreed()
        of = (self._kept[0].token_logprobs, self._kept[0].top) if self._kept else (self._logprobs[0].tolist(), self._tops[0])
        return [Certain(tokens, of[0][: len(tokens)], of[1][: len(tokens)])]

    def results(self) -> list[Hypothesis]:
        return list(self._kept)

    def _best(self, scores: Scores) -> tuple[Ints, Ints, Floats, Floats, list[Top]]:
        """The best (1 + E)W continuations: row, token, the model's log-probability, and the score of the beam; and the rows' likeliest."""
        rule = self._rule
        count = (1 + len(rule.stops)) * self.width
        if self.num_candidates is not None:
            found = candidates_of(scores, rule.banned, self.num_candidates)
            rows, tokens = np.repeat(np.arange(len(found)), found.ids.shape[1]), found.ids.reshape(-1)
            logprobs = found.values.reshape(-1).astype(np.float64) - found.log_sum_exp[rows]
            totals = self._scores[rows] + logprobs
            tops = tops_of(found, rule.top)
        else:
            exact = log_probabilities(whole(scores), rule.banned)
            steered = exact.copy()
            if rule.steering is not None:
                for row, own in enumerate(steered):
                    rule.steering.apply(own, self._tokens[row, : self._length].tolist())
            rows, tokens = top_tokens(steered, count)
            logprobs, totals = exact[rows, tokens], self._scores[rows] + steered[rows, tokens]
            tops = tops_among(exact, rule.top)
        best = np.lexsort((tokens, rows, -totals))[:count]
        return rows[best], tokens[best], logprobs[best], totals[best], tops

    def _agreed(self) -> Sequence[int]:
        live = self._tokens[self._scores > NO_SCORE / 2, : self._length]
        candidates = [tuple(row) for row in live.tolist()]
        candidates += [hypothesis.token_ids for hypothesis in self._kept]
        first = min(candidates, key=len)
        for index, token in enumerate(first):
            if any(other[index] != token for other in candidates):
                return first[:index]
        return first

    def _keep(self, row: int, token: int, logprob: float, total: float, tops: list[Top], by_itself: bool) -> None:
        before = self._length - 1
        hypothesis = Hypothesis(
            token_ids=(*self._tokens[row, :before].tolist(), token),
            token_logprobs=(*self._logprobs[row, :before].tolist(), logprob),
            score=total / self._length**self._length_penalty,
            reason="stop" if by_itself else "length",
            top=(*self._tops[row], tops[row]) if self._rule.top else (),
        )
        self._kept = sorted([*self._kept, hypothesis], key=lambda kept: -kept.score)[: self.width]

    def _can_improve(self) -> bool:
        """Whether the best live beam, were it to end now, would replace a kept hypothesis (transformers' early_stopping=False)."""
        if len(self._kept) < self.width:
            return True
        if self._early_stopping:
            return False
        return bool(self._scores[0] / self._length**self._length_penalty > self._kept[-1].score)


GREATEST_TEMPERATURE = 1e30
"""Above it nothing changes any more, all tokens being as likely, until a number of 32 bits overflows."""
LEAST_TEMPERATURE = 1e-6


class Sampling:
    """Independent branches, each drawing from its distribution; temperature 0 takes the likeliest token (greedy, one branch)."""

    def __init__(
        self,
        rule: StopRule,
        *,
        branches: int = 1,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        self._rule = rule
        # Below the least temperature a draw is the likeliest token, and dividing by it would leave the range of fp32.
        self._temperature = min(max(temperature, LEAST_TEMPERATURE), GREATEST_TEMPERATURE) if temperature else 0.0
        self._top_k, self._top_p, self._min_p = top_k, top_p, min_p
        self.width = branches
        # A generator a branch: what a branch draws does not depend on how long its neighbours go on.
        self._generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(branches)]
        self._tokens: list[list[int]] = [[] for _ in range(branches)]
        self._logprobs: list[list[float]] = [[] for _ in range(branches)]
        self._tops: list[list[Top]] = [[] for _ in range(branches)]
        self._reasons: list[Literal["stop", "length"]] = ["length"] * branches
        self._open = np.ones(branches, np.bool_)

    @property
    def num_candidates(self) -> int | None:
        """One for the likeliest token, top_k where it is set, or as many as are to be reported."""
        if self._rule.steering is not None:
            return None
        needed = 1 if self._temperature == 0.0 else self._top_k
        return None if needed is None else max(needed, self._rule.top)

    def advance(self, scores: Scores) -> Step | None:
        first = len(scores) != self.width
        rows = np.zeros(self.width, np.int64) if first else np.arange(self.width)
        chosen, logprobs, tops = self._choose(scores, rows)
        for branch in np.flatnonzero(self._open).tolist():
            token, own = int(chosen[branch]), self._tokens[branch]
            own.append(token)
            self._logprobs[branch].append(float(logprobs[branch]))
            if self._rule.top:
                self._tops[branch].append(tops[rows[branch]])
            if token in self._rule.stops or (self._rule.stop is not None and self._rule.stop(own)):
                self._reasons[branch] = "stop"
                self._open[branch] = False
            elif len(own) >= self._rule.max_new_tokens:
                self._open[branch] = False
        if not self._open.any():
            return None
        return Step(parents=rows, tokens=chosen)

    def certain(self) -> list[Certain]:
        """All tokens of each branch."""
        return [Certain(*each) for each in zip(self._tokens, self._logprobs, self._tops, strict=True)]

    def results(self) -> list[Hypothesis]:
        found = [
            Hypothesis(
                token_ids=tuple(tokens),
                token_logprobs=tuple(logprobs),
                score=sum(logprobs),
                reason=self._reasons[branch],
                branch=branch,
                top=tuple(self._tops[branch]),
            )
            for branch, (tokens, logprobs) in enumerate(zip(self._tokens, self._logprobs, strict=True))
        ]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)

    def _choose(self, scores: Scores, rows: Ints) -> tuple[Ints, Floats, list[Top]]:
        """A token of each open branch, `<EOC>` of the others, its log-probability under row rows[branch] of the scores, and the likeliest
        tokens of each row."""
        rule = self._rule
        chosen, values = np.full(self.width, rule.eoc, np.int64), np.zeros(self.width)
        open_branches = np.flatnonzero(self._open)
        if self.num_candidates is not None:
            found = candidates_of(scores, rule.banned, self.num_candidates)
            for branch in open_branches:
                row, generator = rows[branch], self._generators[branch]
                place = self._draw_sorted(found.values[row, : self._top_k], generator) if self._temperature else 0
                chosen[branch], values[branch] = found.ids[row, place], found.values[row, place]
            return chosen, values - found.log_sum_exp[rows], tops_of(found, rule.top)
        logits = whole(scores)
        top = without(logits, rule.banned)
        tops: list[Top] = []
        if rule.top:
            tops = tops_among(log_probabilities(logits.copy(), rule.banned), rule.top)
        for branch in open_branches:
            own = logits[rows[branch]]
            if rule.steering is not None:
                steered = own.astype(np.float64)
                rule.steering.apply(steered, self._tokens[branch])
                own = steered.astype(np.float32)
            chosen[branch] = self._pick(own, self._generators[branch])
        values = logits[rows, chosen].astype(np.float64)
        return chosen, values - log_sum_exp(logits, top)[rows], tops

    def _pick(self, logits: Logits, generator: np.random.Generator) -> int:
        """The likeliest token of the whole vocabulary, or one that is drawn."""
        if not self._temperature:
            return int(logits.argmax())
        if self._top_k is not None:
            _, tokens = top_tokens(logits[None], self._top_k)
            return int(tokens[self._draw_sorted(logits[tokens], generator)])
        return self._draw_any(logits, generator)

    def _draw_any(self, logits: Logits, generator: np.random.Generator) -> int:
        """A token of the whole vocabulary."""
        if self._top_p is None:
            weights = np.exp((logits - logits.max()) / np.float32(self._temperature))
            if self._min_p is not None:
                weights[weights < self._min_p] = 0  # the largest is 1
            return _draw(weights, generator)
        tokens = np.argsort(-logits, kind="stable")
        return int(tokens[self._draw_sorted(logits[tokens], generator)])

    def _draw_sorted(self, values: Logits, generator: np.random.Generator) -> int:
        """A place among logits that are sorted, largest first."""
        scaled = values.astype(np.float64) / self._temperature
        weights = np.exp(scaled - scaled[0])
        weights /= weights.sum()
        if self._top_p is not None:
            # The shortest list of likeliest tokens whose mass reaches top_p; the likeliest always stays.
            weights = weights[: int(np.searchsorted(np.cumsum(weights), self._top_p)) + 1]
        if self._min_p is not None:
            weights = weights[weights >= self._min_p * weights[0]]
        return _draw(weights, generator)


def _draw(weights: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
    """An index with probability in proportion to its weight; one of weight zero is never drawn."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
