"""How one request chooses its tokens: what a search is asked and answers, whichever it is.

A search is fed the best tokens of each branch, or logits [branches, V], and answers with the tokens to run next and the branch that each
continues, until it is done. Beam search is in `beam_search.py`, greedy and sampling in `sampling.py`: plain numpy, one object per request.
`<image>` and the model's other banned tokens are never generated: their logits are removed before the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from flamingo_export.runtime.candidates import Scores, Top
from flamingo_export.runtime.steering import Steering
from flamingo_reference.arrays import Bools, Floats, Ints


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Foreseen:
    """What a search knows of its next choice before it has seen the scores: each branch continues itself, and the request goes on unless a
    token ends it.

    open: bool [W], branches whose token is chosen of the candidates. tokens: int64 [W], those of the others.
    temperature, top_k, top_p, min_p: as `Sampling` has them, 0 for none. uniform: the numbers that are drawn with, float64 [W]; None: the
    likeliest is taken.
    """

    open: Bools
    tokens: Ints
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    uniform: Floats | None = None


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

    def foreseen(self) -> Foreseen | None:
        """What is known of the next choice by now; None where scores must be seen before anything can be run, or nothing will be run."""

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
