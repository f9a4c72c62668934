"""Log-likelihoods of candidate answers: branches of one tree, all in one pass after the prompt that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from flamingo_export.backends.base import Array, Session
from flamingo_export.errors import CapacityError
from flamingo_export.runtime.cache import check_positions
from flamingo_export.runtime.candidates import Candidates, Logits, Scores, log_sum_exp, run_decoder, without
from flamingo_export.runtime.generator import Filled, Generator, Timings
from flamingo_export.runtime.request import Prepared

MAX_TOKENS_AT_ONCE = 512
"""Candidate tokens of one pass; more go in several, so that the logits [1, K, V] stay small."""


def score(generator: Generator, request: Prepared, candidates: Sequence[Sequence[int]], timings: Timings) -> list[list[float]]:
    """Log-probability of each token of each candidate (at least one token each) after the request's prompt.

    Tokens that are never generated have probability zero. Raises CapacityError before work if prompt and the longest candidate do not fit.
    """
    prompt, limits = len(request.token_ids), generator.limits
    # The last token of a candidate is predicted, never run.
    longest = max(len(candidate) - 1 for candidate in candidates)
    check_positions(prompt=prompt, new_tokens=longest + 1, position_limit=generator.config.language_model.position_limit)
    needed = prompt + max(limits.chunk, longest)
    if needed > limits.max_length:
        raise CapacityError(
            f"a prompt of {prompt} tokens with a candidate of {longest + 1} needs {needed} cache slots, the bundle allows {limits.max_length}. "
            "Use fewer shots or shorter candidates, or build with a larger --max-length."
        )
    at_once = min(MAX_TOKENS_AT_ONCE, *(generator.decoder.largest.get(size, MAX_TOKENS_AT_ONCE) for size in "SK"))
    if longest > generator.decoder.largest.get("S", longest):
        raise CapacityError(
            f"a candidate of {longest + 1} tokens was given, the engine takes {at_once + 1}. Use shorter candidates."
        )
    room = min(at_once, limits.max_length - prompt)
    groups = list(_groups(candidates, room))
    slots = prompt + max(sum(len(candidates[index]) - 1 for index in group) for group in groups)
    banned = generator.config.tokens.never
    results: list[list[float]] = [[] for _ in candidates]
    with generator.filled([request], slots, timings) as filled:
        firsts = np.array([candidate[0] for candidate in candidates])
        for index, logprob in enumerate(_logprobs(_whole(filled.scores), np.zeros_like(firsts), firsts, banned)):
            results[index].append(logprob)
        for group in groups:
            inputs = np.concatenate([np.asarray(candidates[index][:-1], np.int64) for index in group])
            if not inputs.size:
                continue
            logits = branch_logits(
                generator.decoder,
                filled,
                [len(candidates[index]) - 1 for index in group],
                inputs,
                generator.cache.capacity,
                reset=generator.config.tokens.reset,
            )
            wanted = np.concatenate([np.asarray(candidates[index][1:], np.int64) for index in group])
            found = iter(_logprobs(logits, np.arange(len(wanted)), wanted, banned))
            for index in group:
                results[index] += [next(found) for _ in candidates[index][1:]]
    return results


def branch_logits(
    decoder: Session, filled: Filled, lengths: Sequence[int], token_ids: Array, capacity: int, *, reset: int | None
) -> Logits:
    """Logits float32 [K, V] of branches side by side after row 0's prompt; lengths: tokens of each branch, token_ids: all of them [K].

    reset: after this token a branch sees no medium.
    """
    prompt, total = int(filled.lengths[0]), len(token_ids)
    depth = np.concatenate([np.arange(length) for length in lengths])
    branch = np.repeat(np.arange(len(lengths)), lengths)
    mask = np.zeros((1, 1, total, capacity), np.bool_)
    mask[..., :prompt] = True
    mask[0, 0, :, prompt : prompt + total] = (branch[:, None] == branch) & (depth <= depth[:, None])
    # A position sees the prompt's medium unless the reset stands before it in its own branch.
    ended = (mask[0, 0, :, prompt : prompt + total] & (token_ids == reset) & (depth < depth[:, None])).any(axis=1)
    key_positions = np.arange(capacity, dtype=np.int64)[None].copy()
    key_positions[0, prompt : prompt + total] = prompt + depth
    feeds = {
        "token_ids": token_ids[None],
        "positions": (prompt + depth)[None],
        "media_rows": filled.media_rows,
        "phi": np.where(ended, 0, filled.phi[0])[None].astype(np.int64),
        "write_index": filled.lengths,
        "mask": mask,
        "key_positions": key_positions,
        "logit_positions": np.arange(total, dtype=np.int64)[None],
    }
    return _whole(run_decoder(decoder, feeds, None)[0])


def _whole(scores: Scores) -> Logits:
    """Logits, which were asked for."""
    assert not isinstance(scores, Candidates)
    return scores


def _logprobs(logits: Array, rows: Array, tokens: Array, banned: Sequence[int]) -> list[float]:
    """Log-probabilities of tokens, each under its row of logits, which are overwritten."""
    top = without(logits, banned)
    values = logits[rows, tokens].astype(np.float64)
    return [float(logprob) for logprob in values - log_sum_exp(logits, top)[rows]]


def _groups(candidates: Sequence[Sequence[int]], room: int) -> Iterator[list[int]]:
    """Candidates in order, as many at once as have room."""
    group: list[int] = []
    used = 0
    for index, candidate in enumerate(candidates):
        length = len(candidate) - 1
        if group and used + length > room:
            yield group
            group, used = [], 0
        group.append(index)
        used += length
    yield group
