"""Choosing tokens: greedy, beam search and sampling, in plain numpy, one object a request.

A search is fed logits [branches, V] and answers with the tokens to run next and the branch that each continues, until it is done.
Beam search is transformers' (generation/utils.py, `_beam_search`, version 5): 2W candidates a step, those that end among the best W are kept
with score sum(log p) / length ** length_penalty, early stopping off: a request ends when no live beam can beat its worst kept one.
`<image>` is never generated: its logit is removed before the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import BundleError

Logits = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
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

    def advance(self, logits: Logits) -> Step | None:
        """Takes float32 [1, V] at first and [W, V] later, and overwrites them. None: the request is finished."""

    def agreed(self) -> Sequence[int]:
        """Tokens that the best hypothesis is certain to begin with."""

    def results(self) -> list[Hypothesis]:
        """Finished hypotheses, best first."""


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Where a text ends: after `eoc`, or after max_new_tokens."""

    eoc: int
    banned: int
    max_new_tokens: int


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

    def advance(self, logits: Logits) -> Step | None:
        rule, width = self._rule, self.width
        top = without(logits, rule.banned)
        rows, tokens = top_tokens(logits, 2 * width)
        values = logits[rows, tokens].astype(np.float64)
        logprobs = values - log_sum_exp(logits, top)[rows]
        totals = self._scores[rows] + logprobs
        best = np.lexsort((tokens, rows, -totals))[: 2 * width]
        rows, tokens, logprobs, totals = rows[best], tokens[best], logprobs[best], totals[best]
        self._length += 1
        ends = (tokens == rule.eoc) | (self._length >= rule.max_new_tokens)
        for rank in np.flatnonzero(ends[:width]):
            self._keep(int(rows[rank]), int(tokens[rank]), float(logprobs[rank]), float(totals[rank]))
        live = np.flatnonzero(~ends)[:width]
        if len(live) == 0:
            self._scores[:] = NO_SCORE
            return None
        parents = rows[live]
        self._tokens, self._logprobs = self._tokens[parents], self._logprobs[parents]
        self._tokens[:, self._length - 1] = tokens[live]
        self._logprobs[:, self._length - 1] = logprobs[live]
        self._scores = totals[live]
        if not self._can_improve():
            return None
        return Step(parents=parents, tokens=tokens[live])

    def agreed(self) -> Sequence[int]:
        """The common beginning of all live beams and of the kept hypotheses: the best one is, or grows from, one of these."""
        candidates = [tuple(row[: self._length]) for row in self._tokens.tolist()] if self._scores[0] > NO_SCORE else []
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
        self._temperature = max(temperature, LEAST_TEMPERATURE) if temperature else 0.0
        self._top_k, self._top_p = top_k, top_p
        self.width = branches
        # A generator a branch: what a branch draws does not depend on how long its neighbours go on.
        self._generators = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(branches)]
        self._tokens: list[list[int]] = [[] for _ in range(branches)]
        self._logprobs: list[list[float]] = [[] for _ in range(branches)]
        self._open = np.ones(branches, np.bool_)

    def advance(self, logits: Logits) -> Step | None:
        top = without(logits, self._rule.banned)
        first = len(logits) != self.width
        chosen = np.full(self.width, self._rule.eoc, np.int64)
        rows = np.zeros(self.width, np.int64) if first else np.arange(self.width)
        for branch in np.flatnonzero(self._open):
            chosen[branch] = self._choose(logits[rows[branch]], self._generators[branch])
        values = logits[rows, chosen].astype(np.float64)
        logprobs = values - log_sum_exp(logits, top)[rows]
        for branch in np.flatnonzero(self._open):
            token = int(chosen[branch])
            self._tokens[branch].append(token)
            self._logprobs[branch].append(float(logprobs[branch]))
            if token == self._rule.eoc or len(self._tokens[branch]) >= self._rule.max_new_tokens:
                self._open[branch] = False
        if not self._open.any():
            return None
        return Step(parents=rows, tokens=chosen)

    def agreed(self) -> Sequence[int]:
        """All tokens of a single branch; with several, nothing until they are finished, since the best is not known."""
        return self._tokens[0] if self.width == 1 else ()

    def results(self) -> list[Hypothesis]:
        found = [
            Hypothesis(token_ids=tuple(tokens), token_logprobs=tuple(logprobs), score=sum(logprobs))
            for tokens, logprobs in zip(self._tokens, self._logprobs, strict=True)
        ]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)

    def _choose(self, logits: Logits, generator: np.random.Generator) -> int:
        if self._temperature == 0.0:
            return int(np.argmax(logits))
        if self._top_k is None and self._top_p is None:
            return _draw(np.exp((logits - logits.max()) / np.float32(self._temperature)), generator)
        size = len(logits)
        count = size if self._top_k is None else min(self._top_k, size)
        tokens = np.argsort(-logits, kind="stable")[:count] if count > 64 else top_tokens(logits[None], count)[1]
        scaled = logits[tokens].astype(np.float64) / self._temperature
        weights = np.exp(scaled - scaled[0])
        weights /= weights.sum()
        if self._top_p is not None:
            # The shortest list of likeliest tokens whose mass reaches top_p; the likeliest always stays.
            count = int(np.searchsorted(np.cumsum(weights), self._top_p)) + 1
            tokens, weights = tokens[:count], weights[:count]
        return int(tokens[_draw(weights, generator)])


def _draw(weights: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
    """An index with probability in proportion to its weight; one of weight zero is never drawn."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))


def without(logits: Logits, banned: int) -> Logits:
    """Sets the banned token's logits to minus infinity, in place, and returns each row's largest, float32 [W].

    Raises BundleError if that is not finite: the model computed NaN or infinity, and any text would be noise.
    """
    logits[:, banned] = -np.inf
    top: Logits = logits.max(axis=1)
    if not np.isfinite(top).all():
        raise BundleError("the model's logits are not finite numbers. Check its weights: flamingo-export parity")
    return top


def log_sum_exp(logits: Logits, top: Logits) -> Floats:
    """Logarithm of the softmax's denominator of each row, float64 [W]; top: the rows' largest logits. Overwrites the logits.

    In place, since fresh memory of a vocabulary's size costs more than the sums; numpy adds pairwise, so fp32 is good to 1e-6.
    """
    np.subtract(logits, top[:, None], out=logits)
    np.exp(logits, out=logits)
    return np.asarray(np.log(logits.sum(axis=1), dtype=np.float64) + top)


_BLOCK = 64


def top_tokens(logits: Logits, count: int) -> tuple[Ints, Ints]:
    """Rows and tokens of the `count` largest logits of each row, largest first, the lower id first among equals: int64 [W * count] each.

    Exact. Blocks whose maximum is below the count-th largest block maximum cannot hold any of them, so most are skipped: several times
    as fast as partitioning a whole vocabulary. Block b is every num_blocks-th token from b on, so that maxima are taken of whole vectors.
    """
    width, size = logits.shape
    count = min(count, size)
    num_blocks = size // _BLOCK
    rows = np.repeat(np.arange(width), count)
    found = np.empty((width, count), np.int64)
    if num_blocks <= 2 * count:
        for row in range(width):
            found[row] = _largest(logits[row], count)
        return rows, found.reshape(-1)
    whole = num_blocks * _BLOCK
    maxima = logits[:, :whole].reshape(width, _BLOCK, num_blocks).max(axis=1)
    stride, tail = np.arange(0, whole, num_blocks)[:, None], np.arange(whole, size)
    for row in range(width):
        threshold = np.partition(maxima[row], num_blocks - count)[num_blocks - count]
        ids = (stride + np.flatnonzero(maxima[row] >= threshold)).reshape(-1)
        ids = np.concatenate([ids, tail])  # ascending, so that the lower id comes first among equals
        found[row] = ids[_largest(logits[row, ids], count)]
    return rows, found.reshape(-1)


def _largest(values: Logits, count: int) -> Ints:
    """Indices of the `count` largest, largest first, the lower index first among equals."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]
