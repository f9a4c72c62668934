"""A prompt into the cache, in chunks of one row: bounded memory, and a bounded wait for those who decode meanwhile.

In each chunk only the media that its positions look at are selected, so that 32 images cost no more a chunk than one or two.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flamingo_export.backends.base import Array
from flamingo_export.errors import InputError
from flamingo_export.runtime.tree import Ints, Mask


def check_phi(phi: Ints, num_media: int) -> None:
    """Raises InputError if a position looks at a medium that the request does not have: the graph would read another's."""
    if phi.size and (phi.min() < 0 or phi.max() > num_media):
        raise InputError(
            f"phi goes from {phi.min()} to {phi.max()}, but the request has {num_media} media, so 0 to {num_media} are possible"
        )


def looking_at(phi: Ints, media_rows: Ints, most: int | None) -> int:
    """How many of the first positions, phi [S], look at `most` media together, None being any number: an engine's memory bounds it."""
    if most is None or not len(media_rows):
        return len(phi)
    bank_rows, places = np.unique(np.where(phi > 0, media_rows[phi - 1], -1), return_index=True)
    new = np.sort(places[bank_rows >= 0])
    return int(new[most]) if len(new) > most else len(phi)


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
) -> dict[str, Array]:
    """Inputs of a decoder call for a chunk of a prompt, token_ids and phi int64 [S], in a cache of one row.

    media_rows: bank rows of the request's media [M].
    position: of the first token.
    slot: where it is written.
    visible: slots of what stands before it, bool [C], which are all before `slot`.
    key_positions: of the row's slots [C].
    logits: indices of the positions in the chunk whose logits are wanted [K].
    """
    size, capacity = len(token_ids), len(visible)
    local, media = _numbered(phi, media_rows)
    mask = np.zeros((size, capacity), np.bool_)
    mask[:, :slot] = visible[:slot]
    mask[:, slot : slot + size] = np.tri(size, dtype=np.bool_)
    return {
        "token_ids": token_ids[None],
        "positions": np.arange(position, position + size, dtype=np.int64)[None],
        "media_rows": media[None],
        "phi": local[None],
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
