"""Choosing tokens: greedy, beam search and sampling, in plain numpy, one object a request.

A search is fed the best tokens of each branch, or logits [branches, V], and answers with the tokens to run next and the branch that each
continues, until it is done. Beam search is transformers' (generation/utils.py, `_beam_search`, version 5): 2W candidates a step, those that
end among the best W are kept with score sum(log p) / length ** length_penalty, early stopping off: a request ends when no live beam can beat
its worst kept one. The 2W are the best of W + 1 a branch, which loses nothing: the best W are among the best W of their branches, and of a
branch's best W + 1 one at most ends the text. With E end tokens it is (1 + E)W candidates a step and the best of W + E a branch.
`<image>` and the model's other banned tokens are never generated: their logits are removed before the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flamingo_export.runtime.candidates import (
    Candidates,
    Floats,
    Ints,
    Logits,
    Scores,
    candidates_of,
    log_sum_exp,
    without,
)

NO_SCORE = -1.0e9  # transformers' "not there yet"


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A finished text: tokens with their log-probabilities, `<EOC>` included if it was reached; score decides the order."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float


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

    def certain(self) -> list[tuple[Sequence[int], Sequence[float]]]:
        """What each text is certain to begin with: tokens and their log-probabilities. Beams have one text, the best; samples one each."""

    def results(self) -> list[Hypothesis]:
        """Finished hypotheses, best first."""


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Where a text ends: after `eoc` or one of `ends`, or after max_new_tokens. `banned` (one or several) are never generated."""

    eoc: int
    banned: int | Sequence[int]
    max_new_tokens: int
    ends: tuple[int, ...] = ()

    @property
    def stops(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        return (self.eoc, *self.ends)


class BeamSearch:
    """Beam search with W >= 2 beams."""

    def __init__(self, rule: StopRule, *, beams: int, length_penalty: float = 0.0) -> None:
        self._rule = rule
        self._length_penalty = length_penalty
        self.width = beams
        self._scores = np.full(beams, NO_SCORE)
        self._scores[0] = 0.0
        self._tokens = np.zeros((beams, rule.max_new_tokens), np.int64)
        self._logprobs = np.zeros((beams, rule.max_new_tokens))
        self._length = 0
        self._kept: list[Hypothesis] = []
        self._finished = False

    @property
    def num_candidates(self) -> int:
        return self.width + len(self._rule.stops)

    def advance(self, scores: Scores) -> Step | None:
        rule, width = self._rule, self.width
        found = candidates_of(scores, rule.banned, self.num_candidates)
        rows, tokens = np.repeat(np.arange(len(found)), found.ids.shape[1]), found.ids.reshape(-1)
        logprobs = found.values.reshape(-1).astype(np.float64) - found.log_sum_exp[rows]
        totals = self._scores[rows] + logprobs
        best = np.lexsort((tokens, rows, -totals))[: (1 + len(rule.stops)) * width]
        rows, tokens, logprobs, totals = rows[best], tokens[best], logprobs[best], totals[best]
        self._length += 1
        ends = np.isin(tokens, rule.stops) | (self._length >= rule.max_new_tokens)
        for rank in np.flatnonzero(ends[:width]):
            self._keep(int(rows[rank]), int(tokens[rank]), float(logprobs[rank]), float(totals[rank]))
        live = np.flatnonzero(~ends)[:width]
        if len(live) == 0:
            self._finished = True
            return None
        parents = rows[live]
        self._tokens, self._logprobs = self._tokens[parents], self._logprobs[parents]
        self._tokens[:, self._length - 1] = tokens[live]
        self._logprobs[:, self._length - 1] = logprobs[live]
        self._scores = totals[live]
        if not self._can_improve():
            self._finished = True
            return None
        return Step(parents=parents, tokens=tokens[live])

    def certain(self) -> list[tuple[Sequence[int], Sequence[float]]]:
        """The common beginning of all live beams and of the kept hypotheses: the best one is, or grows from, one of these."""
        if self._finished:
            return [(self._kept[0].token_ids, self._kept[0].token_logprobs)]
        tokens = self._agreed()
        logprobs = self._kept[0].token_logprobs if self._kept else self._logprobs[0].tolist()
        return [(tokens, logprobs[: len(tokens)])]

    def _agreed(self) -> Sequence[int]:
        candidates = [tuple(row[: self._length]) for row in self._tokens.tolist()]
        candidates += [hypothesis.token_ids for hypothesis in self._kept]
        first = min(candidates, key=len)
        for index, token in enumerate(first):
            if any(other[index] != token for other in candidates):
                return first[:index]
        return first

    def results(self) -> list[Hypothesis]:
        return list(self._kept)

    def _keep(self, row: int, token: int, logprob: float, total: float) -> None:
        before = self._length - 1
        hypothesis = Hypothesis(
            token_ids=(*self._tokens[row, :before].tolist(), token),
            token_logprobs=(*self._logprobs[row, :before].tolist(), logprob),
            score=total / self._length**self._length_penalty,
        )
        self._kept = sorted([*self._kept, hypothesis], key=lambda kept: -kept.score)[: self.width]

    def _can_improve(self) -> bool:
        """Whether the best live beam, were it to end now, would replace a kept hypothesis (transformers' early_stopping=False)."""
        if len(self._kept) < self.width:
            return True
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
        seed: int | None = None,
    ) -> None:
        self._rule = rule
        # Below the least temperature a draw is the likeliest token, and dividing by it would leave the range of fp32.
        self._temperature = min(max(temperature, LEAST_TEMPERATURE), GREATEST_TEMPERATURE) if temperature else 0.0
        self._top_k, self._top_p = top_k, top_p
        self.width = branches
        # A generator a branch: what a branch draws does not depend on how long its neighbours go on.
        self._generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(branches)]
        self._tokens: list[list[int]] = [[] for _ in range(branches)]
        self._logprobs: list[list[float]] = [[] for _ in range(branches)]
        self._open = np.ones(branches, np.bool_)

    @property
    def num_candidates(self) -> int | None:
        """One for the likeliest token, top_k where it is set."""
        return 1 if self._temperature == 0.0 else self._top_k

    def advance(self, scores: Scores) -> Step | None:
        first = len(scores) != self.width
        rows = np.zeros(self.width, np.int64) if first else np.arange(self.width)
        chosen, logprobs = self._choose(scores, rows)
        for branch in np.flatnonzero(self._open):
            token = int(chosen[branch])
            self._tokens[branch].append(token)
            self._logprobs[branch].append(float(logprobs[branch]))
            if token in self._rule.stops or len(self._tokens[branch]) >= self._rule.max_new_tokens:
                self._open[branch] = False
        if not self._open.any():
            return None
        return Step(parents=rows, tokens=chosen)

    def certain(self) -> list[tuple[Sequence[int], Sequence[float]]]:
        """All tokens of each branch."""
        return list(zip(self._tokens, self._logprobs, strict=True))

    def results(self) -> list[Hypothesis]:
        found = [
            Hypothesis(token_ids=tuple(tokens), token_logprobs=tuple(logprobs), score=sum(logprobs))
            for tokens, logprobs in zip(self._tokens, self._logprobs, strict=True)
        ]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)

    def _choose(self, scores: Scores, rows: Ints) -> tuple[Ints, Floats]:
        """A token of each open branch, `<EOC>` of the others, and its log-probability under row rows[branch] of the scores."""
        chosen, values = np.full(self.width, self._rule.eoc, np.int64), np.zeros(self.width)
        if self.num_candidates is not None:
            found = candidates_of(scores, self._rule.banned, self.num_candidates)
            for branch in np.flatnonzero(self._open):
                row, generator = rows[branch], self._generators[branch]
                place = self._draw_sorted(found.values[row, : self.num_candidates], generator) if self._temperature else 0
                chosen[branch], values[branch] = found.ids[row, place], found.values[row, place]
            return chosen, values - found.log_sum_exp[rows]
        assert not isinstance(scores, Candidates), "the whole vocabulary was asked for"
        top = without(scores, self._rule.banned)
        for branch in np.flatnonzero(self._open):
            chosen[branch] = self._draw_any(scores[rows[branch]], self._generators[branch])
        values = scores[rows, chosen].astype(np.float64)
        return chosen, values - log_sum_exp(scores, top)[rows]

    def _draw_any(self, logits: Logits, generator: np.random.Generator) -> int:
        """A token of the whole vocabulary."""
        if self._top_p is None:
            return _draw(np.exp((logits - logits.max()) / np.float32(self._temperature)), generator)
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
        return _draw(weights, generator)


def _draw(weights: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
    """An index with probability in proportion to its weight; one of weight zero is never drawn."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
