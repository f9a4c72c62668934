"""Greedy and sampling: independent branches, in plain numpy, one object per request."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import InputError
from flamingo_export.runtime.candidates import (
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
from flamingo_export.runtime.search import Certain, Foreseen, Hypothesis, Step, StopRule
from flamingo_export.runtime.steering import NOTHING_LEFT
from flamingo_reference.arrays import Floats, Ints

GREATEST_TEMPERATURE = 1e30
"""Above it nothing changes any more, all tokens being as likely, until a number of 32 bits overflows."""
LEAST_TEMPERATURE = 1e-6


class Numbers:
    """A branch's random numbers in [0, 1), in order; the next one can be looked at before it is drawn."""

    def __init__(self, seed: np.random.SeedSequence) -> None:
        self._generator = np.random.default_rng(seed)
        self._next: float | None = None

    def peek(self) -> float:
        """The number that `random` gives next."""
        if self._next is None:
            self._next = float(self._generator.random())
        return self._next

    def random(self) -> float:
        """The next number."""
        found, self._next = self.peek(), None
        return found


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
        # One generator per branch: what a branch draws does not depend on how long its neighbours go on.
        self._generators = [Numbers(child) for child in np.random.SeedSequence(seed).spawn(branches)]
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

    def foreseen(self) -> Foreseen | None:
        """Open branches go on by themselves, unless this is the last token that they may have."""
        rule = self._rule
        if self.num_candidates is None or not self._open.any():
            return None
        if max(map(len, self._tokens)) + 1 >= rule.max_new_tokens:
            return None
        tokens = np.full(self.width, rule.eoc, np.int64)
        if not self._temperature:
            return Foreseen(open=self._open.copy(), tokens=tokens)
        return Foreseen(
            open=self._open.copy(),
            tokens=tokens,
            temperature=self._temperature,
            top_k=self._top_k or 0,
            top_p=self._top_p or 0.0,
            min_p=self._min_p or 0.0,
            uniform=np.array(
                [numbers.peek() if goes_on else 0.0 for numbers, goes_on in zip(self._generators, self._open, strict=True)]
            ),
        )

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
                if not np.isfinite(own).any():
                    raise InputError(NOTHING_LEFT)
            chosen[branch] = self._pick(own, self._generators[branch])
        values = logits[rows, chosen].astype(np.float64)
        return chosen, values - log_sum_exp(logits, top)[rows], tops

    def _pick(self, logits: Logits, generator: Numbers) -> int:
        """The likeliest token of the whole vocabulary, or one that is drawn."""
        if not self._temperature:
            return int(logits.argmax())
        if self._top_k is not None:
            _, tokens = top_tokens(logits[None], self._top_k)
            return int(tokens[self._draw_sorted(logits[tokens], generator)])
        return self._draw_any(logits, generator)

    def _draw_any(self, logits: Logits, generator: Numbers) -> int:
        """A token of the whole vocabulary."""
        if self._top_p is None:
            weights = np.exp((logits - logits.max()) / np.float32(self._temperature))
            if self._min_p is not None:
                weights[weights < self._min_p] = 0  # the largest is 1
            return _draw(weights, generator)
        tokens = np.argsort(-logits, kind="stable")
        return int(tokens[self._draw_sorted(logits[tokens], generator)])

    def _draw_sorted(self, values: Logits, generator: Numbers) -> int:
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


def _draw(weights: npt.NDArray[np.floating], generator: Numbers) -> int:
    """An index with probability in proportion to its weight; one of weight zero is never drawn."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
