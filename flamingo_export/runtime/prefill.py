"""A prompt into the cache, in chunks of one row: bounded memory, and a bounded wait for those who decode meanwhile.

In each chunk only the media that its positions look at are selected, so that 32 images cost no more a chunk than one or two.

A position looks at one medium, number phi of its request, or at a range, first .. phi. Both only grow along a prompt, but for positions that
look at none, where phi is 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import CapacityError, InputError
from flamingo_export.runtime.tree import Mask
from flamingo_reference.arrays import Array, Ints


def check_phi(phi: Ints, num_media: int) -> None:
    """Raises InputError if a position looks at a medium that the request does not have: the graph would read another's."""
    if phi.size and (phi.min() < 0 or phi.max() > num_media):
        raise InputError(
            f"phi goes from {phi.min()} to {phi.max()}, but the request has {num_media} media, so 0 to {num_media} are possible"
        )


def check_ranges(phi: Ints, first: Ints | None, most: int) -> None:
    """Raises CapacityError if a position looks at more than `most` media: tiles of images that stand side by side."""
    if first is not None and phi.size and (widest := int(_sizes(phi, first).max())) > most:
        raise CapacityError(
            f"images that stand side by side have {widest} tiles together, which one token would see; the bundle allows {most}. Put text "
            "between them, show smaller images, or build with more (limits=ShapeLimits(max_tiles=...))."
        )


def looking_at(phi: Ints, first: Ints | None, media_rows: Ints, most: int | None) -> int:
    """How many of the first positions, phi and first [S], look at `most` media together, None being any number: an engine's memory bounds
    it. At least one position."""
    if most is None or not len(media_rows):
        return len(phi)
    if first is None:
        bank_rows, places = np.unique(np.where(phi > 0, media_rows[phi - 1], -1), return_index=True)
        new = np.sort(places[bank_rows >= 0])
        return int(new[most]) if len(new) > most else len(phi)
    sees = phi > 0
    begun = int(first[sees].min(initial=1 << 62))
    beyond = np.flatnonzero(sees & (phi - begun + 1 > most))
    return max(1, int(beyond[0])) if len(beyond) else len(phi)


def _sizes(phi: Ints, first: Ints) -> Ints:
    """How many media each position looks at."""
    return np.where(phi > 0, phi - first + 1, 0)


def chunk_feeds(
    token_ids: Ints,
    phi: Ints,
    media_rows: Ints,
    *,
    position: int,
    slot: int,
    visible: Mask,
    key_positions: Ints,
    logits: Ints,
    first: Ints | None = None,
) -> dict[str, Array]:
    """Inputs of a decoder call for a chunk of a prompt, token_ids and phi int64 [S], in a cache of one row.

    media_rows: bank rows of the request's media [M].
    position: of the first token.
    slot: where it is written.
    visible: slots of what stands before it, bool [C], which are all before `slot`.
    key_positions: of the row's slots [C].
    logits: indices of the positions in the chunk whose logits are wanted [K].
    first: where positions look at ranges of media, the first ones [S].
    """
    size, capacity = len(token_ids), len(visible)
    local, media = _numbered(phi, media_rows) if first is None else _range_numbered(phi, first, media_rows)
    local_first = local if first is None else np.where(phi > 0, local - (phi - first), 0)
    mask = np.zeros((size, capacity), np.bool_)
    mask[:, :slot] = visible[:slot]
    mask[:, slot : slot + size] = np.tri(size, dtype=np.bool_)
    return {
        "token_ids": token_ids[None],
        "positions": np.arange(position, position + size, dtype=np.int64)[None],
        "media_rows": media[None],
        "phi": local[None],
        "first_media": local_first[None],
        "write_index": np.array([slot], np.int64),
        "mask": mask[None, None],
        "key_positions": key_positions[None],
        "logit_positions": logits[None],
    }


def _numbered(phi: Ints, media_rows: Ints) -> tuple[Ints, npt.NDArray[np.int64]]:
    """phi renumbered to the media that these positions look at, and these media's bank rows, of which there is always one."""
    numbers, local = np.unique(phi, return_inverse=True)
    if numbers.size and numbers[0] == 0:
        numbers = numbers[1:]
    else:
        local = local + 1
    if not numbers.size:
        return local, np.zeros(1, np.int64)
    media = media_rows[numbers - 1]
    # One image shown several times is one row: no more rows are named than the bank has.
    different, again = np.unique(media, return_inverse=True)
    if len(different) < len(numbers):
        return np.concatenate([[0], again + 1])[local], different
    return local, media


def _range_numbered(phi: Ints, first: Ints, media_rows: Ints) -> tuple[Ints, Ints]:
    """The same where positions look at first .. phi: media from the first to the last that is looked at, in order, one row each."""
    sees = phi > 0
    if not sees.any():
        return np.zeros_like(phi), np.zeros(1, np.int64)
    begun, ended = int(first[sees].min()), int(phi.max())
    return np.where(sees, phi - begun + 1, 0), media_rows[begun - 1 : ended]
