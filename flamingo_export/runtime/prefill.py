"""Prompts into the cache, in chunks: bounded memory, prompts of different lengths side by side.

Rules (design): write_index + S never passes the capacity, padding included; a padded position sees its own slot only; in each chunk only
the media that its positions look at are selected, so that 32 images cost no more a chunk than one or two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flamingo_export.backends.base import Array, Session
from flamingo_export.errors import InputError
from flamingo_export.runtime.candidates import Scores, run_decoder, stacked

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PrefillRow:
    """One row of the batch: its prompt, bank rows of its media [M], phi [P], and the positions that the cache already holds."""

    token_ids: Ints
    phi: Ints
    media_rows: Ints
    start: int = 0


def check_phi(phi: Ints, num_media: int) -> None:
    """Raises InputError if a position looks at a medium that the request does not have: the graph would read another's."""
    if phi.size and (phi.min() < 0 or phi.max() > num_media):
        raise InputError(
            f"phi goes from {phi.min()} to {phi.max()}, but the request has {num_media} media, so 0 to {num_media} are possible"
        )


def prefill(
    decoder: Session,
    rows: Sequence[PrefillRow],
    *,
    capacity: int,
    chunk: int,
    pad: int,
    candidates: int | None,
    written: Callable[[int, int], None],
) -> Scores:
    """Runs the prompts from their `start` to their end and returns the last positions' candidates [B, n] or logits, float32 [B, V].

    candidates: best tokens wanted, None for the whole vocabulary. written(row, length) is called as the cache comes to hold the first
    `length` positions of a row.
    Raises InputError if phi does not fit a row's media.
    """
    for row in rows:
        check_phi(row.phi, len(row.media_rows))
    done = np.array([row.start for row in rows], np.int64)
    ends = np.array([len(row.token_ids) for row in rows], np.int64)
    last: list[Scores | None] = [None] * len(rows)
    most = decoder.largest.get("M")
    while (done < ends).any():
        left = np.minimum(ends - done, chunk)
        counts = np.array([_looking_at(*part, most) for part in zip(rows, done, left, strict=True)], np.int64)
        size = int(counts.max())
        ending = (counts > 0) & (done + counts == ends)
        feeds = _feeds(rows, done, counts, size, capacity, pad)
        # Logits cost a product with the whole vocabulary, so none are asked for until a prompt ends.
        feeds["logit_positions"] = np.maximum(counts - 1, 0)[:, None] if ending.any() else np.zeros((len(rows), 0), np.int64)
        scores = run_decoder(decoder, feeds, candidates)
        done += counts
        for index in np.flatnonzero(counts):
            written(int(index), int(done[index]))
        for index in np.flatnonzero(ending):
            last[index] = scores[index, 0]
    return stacked([value for value in last if value is not None])


def _looking_at(row: PrefillRow, first: int, count: int, most: int | None) -> int:
    """How many of the `count` positions from `first` on look at `most` media together, None being any number: an engine's memory bounds it."""
    if most is None or not len(row.media_rows):
        return count
    phi = row.phi[first : first + count]
    bank_rows, places = np.unique(np.where(phi > 0, row.media_rows[phi - 1], -1), return_index=True)
    new = np.sort(places[bank_rows >= 0])
    return int(new[most]) if len(new) > most else count


def _feeds(rows: Sequence[PrefillRow], done: Ints, counts: Ints, size: int, capacity: int, pad: int) -> dict[str, Array]:
    batch = len(rows)
    token_ids = np.full((batch, size), pad, np.int64)
    phi = np.zeros((batch, size), np.int64)
    seen: list[Ints] = []
    for index, (row, first, count) in enumerate(zip(rows, done, counts, strict=True)):
        token_ids[index, :count] = row.token_ids[first : first + count]
        # Media that this chunk looks at, renumbered 1 .. m in order.
        numbers, local = np.unique(row.phi[first : first + count], return_inverse=True)
        if numbers.size and numbers[0] == 0:
            numbers = numbers[1:]
        else:
            local = local + 1
        # One image shown several times is one row: no more rows are named than the bank has.
        media, again = np.unique(row.media_rows[numbers - 1], return_inverse=True)
        if len(media) < len(numbers):
            local = np.concatenate([[0], again + 1])[local]
        else:
            media = row.media_rows[numbers - 1]
        phi[index, :count] = local
        seen.append(media)
    media_rows = np.zeros((batch, max(1, *(len(media) for media in seen))), np.int64)
    for index, media in enumerate(seen):
        media_rows[index, : len(media)] = media
    places = done[:, None] + np.arange(size)
    slots = np.arange(capacity)
    real = np.arange(size) < counts[:, None]
    causal = slots <= places[:, :, None]
    own = slots == places[:, :, None]
    return {
        "token_ids": token_ids,
        "positions": places,
        "media_rows": media_rows,
        "phi": phi,
        "write_index": done.copy(),
        "mask": np.where(real[:, :, None], causal, own)[:, None],
        "key_positions": np.tile(slots, (batch, 1)),
    }
