"""What a search gets of a decoder's results: the best tokens of each branch, or the logits of the whole vocabulary.

A decoder whose contract has `top_ids` finds the best tokens itself, and then nothing else leaves its device; of another one's logits they are
found here. Either way a search sees the same numbers: values as the decoder gives them, and the logarithm of the softmax's denominator.

Equal logits: here the lower id comes first, also at the cut. An engine's order among equals is its own; in 16 bits equals are not rare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flamingo_export.backends.base import Session, Tensor
from flamingo_export.errors import BundleError
from flamingo_export.specs import LOG_SUM_EXP, TOP_IDS, TOP_VALUES
from flamingo_reference.arrays import Array, Floats, Ints

Logits = npt.NDArray[np.float32]
Top = tuple[tuple[int, float], ...]
"""The likeliest tokens at a place, best first, with their log-probabilities."""
_NOT_FINITE = "the model's logits are not finite numbers. Check its weights: flamingo-export parity"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The n best tokens of each branch, best first, the banned ones not among them: ids int64 [..., n], their logits float32 [..., n], and the
    logarithm of the sum over the vocabulary of exp(logit), float64 [...]."""

    ids: Ints
    values: Logits
    log_sum_exp: Floats

    def __getitem__(self, index: Any) -> Candidates:
        """Those of some branches."""
        return Candidates(ids=self.ids[index], values=self.values[index], log_sum_exp=self.log_sum_exp[index])

    def __len__(self) -> int:
        return len(self.ids)


Scores = Candidates | Logits
CANDIDATES = (TOP_VALUES, TOP_IDS, LOG_SUM_EXP)
"""Outputs of a decoder that finds them."""


def run_decoder(decoder: Session, feeds: Mapping[str, Tensor], wanted: int | None) -> Scores:
    """Runs the decoder and returns candidates [B, K, n >= wanted] where it finds so many itself, else float32 logits [B, K, V].

    feeds: inputs that the model does not read are left out: key_positions, where distances do not matter. wanted: candidates that the
    searches need, None for the whole vocabulary.
    """
    feeds = inputs_of(decoder, feeds)
    most = offered(decoder)
    if not most:
        return decoder.run(feeds)["logits"]
    if wanted is None or wanted > most:
        return decoder.run(feeds, outputs=("logits",))["logits"]
    return from_outputs(decoder.run(feeds, outputs=CANDIDATES))


def inputs_of(decoder: Session, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Feeds without inputs that the model does not read."""
    read = {tensor.name for tensor in decoder.spec.inputs}
    return {name: value for name, value in feeds.items() if name in read}


def offered(decoder: Session) -> int:
    """How many candidates it finds itself, 0: none."""
    return int({tensor.name: tensor.shape[-1] for tensor in decoder.spec.outputs}.get(TOP_IDS, 0))


def from_outputs(found: Mapping[str, Array]) -> Candidates:
    """Candidates of a decoder's outputs CANDIDATES."""
    return Candidates(ids=found[TOP_IDS], values=found[TOP_VALUES], log_sum_exp=found[LOG_SUM_EXP].astype(np.float64))


def candidates_of(scores: Scores, banned: int | Sequence[int], count: int) -> Candidates:
    """The best tokens of each branch [W, n]: those given, or `count` of logits [W, V], which are overwritten; `banned` are left out.

    Raises BundleError if the largest logits are not finite: the model computed NaN or infinity, and any text would be noise.
    """
    if isinstance(scores, Candidates):
        if not (np.isfinite(scores.values[:, 0]).all() and np.isfinite(scores.log_sum_exp).all()):
            raise BundleError(_NOT_FINITE)
        return scores
    width = len(scores)
    top = without(scores, banned)
    rows, tokens = top_tokens(scores, count)
    values = scores[rows, tokens]
    return Candidates(ids=tokens.reshape(width, -1), values=values.reshape(width, -1), log_sum_exp=log_sum_exp(scores, top))


def without(logits: Logits, banned: int | Sequence[int]) -> Logits:
    """Sets the banned tokens' logits to minus infinity, in place, and returns each row's largest, float32 [W].

    Raises BundleError if that is not finite: the model computed NaN or infinity, and any text would be noise.
    """
    logits[:, banned] = -np.inf
    top: Logits = logits.max(axis=1)
    if not np.isfinite(top).all():
        raise BundleError(_NOT_FINITE)
    return top


def log_sum_exp(logits: Logits, top: Logits) -> Floats:
    """Logarithm of the softmax's denominator of each row, float64 [W]; top: the rows' largest logits. Overwrites the logits.

    In place, since fresh memory of a vocabulary's size costs more than the sums; numpy adds pairwise, so fp32 is good to 1e-6.
    """
    np.subtract(logits, top[:, None], out=logits)
    np.exp(logits, out=logits)
    return np.asarray(np.log(logits.sum(axis=1), dtype=np.float64) + top)


def log_probabilities(logits: Logits, banned: int | Sequence[int]) -> Floats:
    """Log-probabilities float64 [W, V] of the whole vocabulary without the banned tokens. Overwrites the logits. Raises BundleError."""
    top = without(logits, banned)
    exact = logits.astype(np.float64)
    return np.asarray(exact - log_sum_exp(logits, top)[:, None])


def whole(scores: Scores) -> Logits:
    """Logits, which were asked for."""
    assert not isinstance(scores, Candidates), "the whole vocabulary was asked for"
    return scores


_BLOCK = 64


def top_tokens(logits: Logits | Floats, count: int) -> tuple[Ints, Ints]:
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


def _largest(values: Logits | Floats, count: int) -> Ints:
    """Indices of the `count` largest, largest first, the lower index first among equals."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def tops_of(found: Candidates, count: int) -> list[Top]:
    """The `count` likeliest tokens of each row, of candidates that are at least as many."""
    if not count:
        return []
    logprobs = found.values[:, :count].astype(np.float64) - found.log_sum_exp[:, None]
    return [tuple(zip(*each, strict=True)) for each in zip(found.ids[:, :count].tolist(), logprobs.tolist(), strict=True)]


def tops_among(logprobs: Floats, count: int) -> list[Top]:
    """The `count` likeliest tokens of each row of log-probabilities [W, V]."""
    if not count:
        return []
    rows, tokens = top_tokens(logprobs, count)
    pairs = list(zip(tokens.tolist(), logprobs[rows, tokens].tolist(), strict=True))
    each = len(pairs) // len(logprobs)
    return [tuple(pairs[at : at + each]) for at in range(0, len(pairs), each)]
