"""Choosing tokens as the paper does, written as plainly as possible: greedy, beam search, scoring of candidates.

The oracle of every faster search: nothing is cached, every step asks the model anew about whole sequences, sums are float64. Beam search
is transformers' (`generation/utils.py`, `_beam_search`, version 5, early_stopping=False), with one difference: tokens that are never
generated are taken out before the softmax, so that probabilities are those of the tokens that can be generated.

Each result says how close its decisions were (`margins`): engines whose numbers differ from the reference's by less than half a margin
must choose the same tokens; below that, either choice is right (a tie).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flamingo_reference.arrays import Floats

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_reference.model import Flamingo, MediaKV

NextLogits = Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]
"""token ids int64 [B, S] -> logits [B, V] of the token that follows each row."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Where a text ends: after `eoc` or one of `ends`, or after max_new_tokens. `image` and `banned` are never generated."""

    eoc: int
    image: int
    max_new_tokens: int
    ends: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")

    @property
    def stops(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        return (self.eoc, *self.ends)

    @property
    def never(self) -> tuple[int, ...]:
        """All tokens that are never generated."""
        return (self.image, *self.banned)


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A finished text: new tokens (`eoc` included where it was reached), the log-probability of each, and what it is ranked by."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Hypotheses, best first, and how close the search came to another result."""

    hypotheses: tuple[Hypothesis, ...]
    margins: tuple[float, ...]
    """One a step: the least difference between a choice that was taken and one that was not, in summed log-probability (0: a tie)."""
    final_margin: float
    """The least difference in score between neighbours in `hypotheses`; infinite where there is one."""

    @property
    def closest(self) -> float:
        """The least of all margins."""
        return min((*self.margins, self.final_margin))

    def ties(self, within: float) -> tuple[int, ...]:
        """Steps that numbers wrong by `within` or more could have turned."""
        return tuple(step for step, margin in enumerate(self.margins) if margin <= within)


def log_probabilities(logits: npt.NDArray[Any], banned: int | Sequence[int]) -> Floats:
    """Log-softmax over the tokens that can be generated, float64 [B, V]; the banned ones have minus infinity.

    Banned tokens beyond the logits cannot be generated as it is. Raises ValueError if a logit is NaN or a row has no finite maximum.
    """
    wide = np.array(logits, np.float64)
    wide[:, [token for token in np.atleast_1d(banned) if token < wide.shape[1]]] = -np.inf
    top = wide.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        raise ValueError("the model's logits are not finite")
    shifted = wide - top
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def greedy(next_logits: NextLogits, prompt: Sequence[int], rules: Rules) -> SearchResult:
    """The likeliest token at every step, the lower id among equals. Raises ValueError if the prompt is empty."""
    tokens: list[int] = []
    logprobs: list[float] = []
    margins = []
    while len(tokens) < rules.max_new_tokens and (not tokens or tokens[-1] not in rules.stops):
        row = _ask(next_logits, [[*prompt, *tokens]], rules.never)[0]
        first, second = np.argsort(-row, kind="stable")[:2]
        margins.append(float(row[first] - row[second]))
        tokens.append(int(first))
        logprobs.append(float(row[first]))
    best = Hypothesis(token_ids=tuple(tokens), token_logprobs=tuple(logprobs), score=sum(logprobs))
    return SearchResult(hypotheses=(best,), margins=tuple(margins), final_margin=math.inf)


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0


def beam_search(
    next_logits: NextLogits, prompt: Sequence[int], rules: Rules, *, beams: int, length_penalty: float = 0.0
) -> SearchResult:
    """Up to `beams` hypotheses, best first, ranked by total / length ** length_penalty; one beam is greedy search.

    Each step ranks all continuations of the live beams and looks at the (1 + E) * beams best, E being the number of end tokens. Of these,
    the ones that end among the first `beams` are kept with the best `beams` so far; the `beams` best that go on live. It stops when
    `beams` are kept and the best live one, were it to end now, would not be among them, or when nothing goes on. Equal totals: the
    earlier beam, then the lower id first.
    Raises ValueError if the prompt is empty or beams is below 1.
    """
    if beams < 1:
        raise ValueError(f"{beams} beams, expected at least 1")
    if beams == 1:
        return greedy(next_logits, prompt, rules)
    live = [_Beam()]
    kept: list[Hypothesis] = []
    margins = []
    while live:
        logprobs = _ask(next_logits, [[*prompt, *beam.tokens] for beam in live], rules.never)
        ranked = _continuations(live, logprobs, (1 + len(rules.stops)) * beams + 1)
        length = len(ranked[0].tokens)
        ends = [beam.tokens[-1] in rules.stops or length == rules.max_new_tokens for beam in ranked]
        finished = [beam for beam, end in zip(ranked[:beams], ends, strict=False) if end]
        going_on = [beam for beam, end in zip(ranked, ends, strict=True) if not end]
        margin = _cut(ranked, ends, beams)
        found = [
            Hypothesis(token_ids=b.tokens, token_logprobs=b.logprobs, score=b.total / length**length_penalty) for b in finished
        ]
        everything = sorted([*kept, *found], key=lambda hypothesis: -hypothesis.score)
        if found and len(everything) > beams:
            margin = min(margin, everything[beams - 1].score - everything[beams].score)
        kept, live = everything[:beams], going_on[:beams]
        if live and len(kept) == beams:
            lead = live[0].total / length**length_penalty - kept[-1].score
            margin = min(margin, abs(lead))
            if lead <= 0:
                live = []
        margins.append(margin)
    scores = [hypothesis.score for hypothesis in kept]
    final = min((a - b for a, b in itertools.pairwise(scores)), default=math.inf)
    return SearchResult(hypotheses=tuple(kept), margins=tuple(margins), final_margin=final)


def score_candidates(
    next_logits: NextLogits, prompt: Sequence[int], candidates: Sequence[Sequence[int]], *, image: int
) -> list[Hypothesis]:
    """Log-likelihood of each candidate after the prompt, in the order given; its score is the sum over its tokens.

    A candidate that should be followed by the end of the text has that token as its last. Raises ValueError for an empty prompt or
    candidate, and for one that holds `image`.
    """
    scored = []
    for candidate in candidates:
        if len(candidate) == 0 or image in candidate:
            raise ValueError(f"candidate {list(candidate)}: expected at least one token, and no image token ({image})")
        logprobs = []
        for length, token in enumerate(candidate):
            row = _ask(next_logits, [[*prompt, *candidate[:length]]], image)[0]
            logprobs.append(float(row[token]))
        scored.append(Hypothesis(token_ids=tuple(candidate), token_logprobs=tuple(logprobs), score=sum(logprobs)))
    return scored


def flamingo_next_logits(
    model: Flamingo, media_kv: MediaKV, media_rows: Sequence[int], media_of_image: Sequence[int] | None = None
) -> NextLogits:
    """What a Flamingo says follows; medium n of a sequence is bank row media_rows[n - 1].

    media_of_image: how many media each image is, where tokens see ranges of media; else an `<image>` is one.
    """
    import torch

    from flamingo_reference.phi import media_ranges, phi_from_tokens

    tokens, groups = model.config.tokens, model.config.sees_groups
    known = list(media_rows) or [0]

    def next_logits(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        first = None
        if groups:
            counts = np.array([media_of_image or []] * len(token_ids), np.int64).reshape(len(token_ids), -1)
            ranges = media_ranges(token_ids, tokens.image, counts)
            first, phi = (torch.from_numpy(bound) for bound in ranges)
        else:
            phi = torch.from_numpy(phi_from_tokens(token_ids, tokens.image, tokens.reset))
        rows = torch.tensor(known, dtype=torch.int64).expand(len(token_ids), -1)
        with torch.no_grad():
            logits: Tensor = model(torch.from_numpy(token_ids), media_kv, rows, phi, first)
        return logits[:, -1].double().numpy()

    return next_logits


def _ask(next_logits: NextLogits, sequences: list[list[int]], banned: int | Sequence[int]) -> Floats:
    if not sequences[0]:
        raise ValueError("the prompt is empty; it needs at least one token (<BOS>)")
    return log_probabilities(next_logits(np.array(sequences, np.int64)), banned)


def _continuations(live: Sequence[_Beam], logprobs: Floats, count: int) -> list[_Beam]:
    """The `count` best one-token continuations of the live beams, best first; tokens that cannot be generated are none."""
    totals = logprobs + np.array([beam.total for beam in live])[:, None]
    best = np.argsort(-totals.reshape(-1), kind="stable")[:count]
    found = []
    for row, token in zip(*np.unravel_index(best, totals.shape), strict=True):
        parent, logprob = live[row], float(logprobs[row, token])
        if logprob > -math.inf:
            found.append(_Beam((*parent.tokens, int(token)), (*parent.logprobs, logprob), float(totals[row, token])))
    return found


def _cut(ranked: Sequence[_Beam], ends: Sequence[bool], beams: int) -> float:
    """How much closer two ranked continuations would have to be for another choice of which are kept and which go on."""
    margin = math.inf
    going_on = [beam.total for beam, end in zip(ranked, ends, strict=True) if not end]
    if len(going_on) > beams:
        margin = going_on[beams - 1] - going_on[beams]
    # An ending continuation is kept if it ranks among the first `beams`: it must not change places with one across that line.
    inside, outside = ranked[:beams], ranked[beams:]
    for beam, end in zip(ranked, ends, strict=True):
        if end and inside and outside:
            other = outside[0].total if beam in inside else inside[-1].total
            margin = min(margin, abs(beam.total - other))
    return margin
