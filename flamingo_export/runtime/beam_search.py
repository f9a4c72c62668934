"""Beam search, in plain numpy, one object per request.

It is transformers' (generation/utils.py, `_beam_search`, version 5): 2W candidates a step, those that end among the best W are kept with
score sum(log p) / length ** length_penalty, early stopping off: a request ends when no live beam can beat its worst kept one. The 2W are the
best of W + 1 per branch, which loses nothing: the best W are among the best W of their branches, and of a branch's best W + 1 one at most
ends the text. With E end tokens it is (1 + E)W candidates a step and the best of W + E per branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flamingo_export.errors import InputError
from flamingo_export.runtime.candidates import (
    Scores,
    Top,
    candidates_of,
    log_probabilities,
    top_tokens,
    tops_among,
    tops_of,
    whole,
)
from flamingo_export.runtime.search import Certain, Hypothesis, Step, StopRule
from flamingo_export.runtime.steering import NOTHING_LEFT
from flamingo_reference.arrays import Floats, Ints

NO_SCORE = -1.0e9  # transformers' "not there yet"


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
            self._end()
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
        if not (self._scores > NO_SCORE / 2).any() or not self._can_improve():
            self._end()
            return None
        return Step(parents=parents, tokens=tokens[live])

    def _end(self) -> None:
        """Raises InputError where all beams have died and none has ended."""
        if not self._kept:
            raise InputError(NOTHING_LEFT)
        self._finished = True

    def foreseen(self) -> None:
        """Nothing: beams change places."""
        return

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
                    if self._scores[row] > NO_SCORE / 2:  # the others grew from texts that had ended
                        rule.steering.apply(own, self._tokens[row, : self._length].tolist())
            rows, tokens = top_tokens(steered, count)
            logprobs, totals = exact[rows, tokens], self._scores[rows] + steered[rows, tokens]
            tops = tops_among(exact, rule.top)
        totals = np.maximum(
            totals, NO_SCORE
        )  # what may not be chosen is as what has ended: it fills places where there is nothing else
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
