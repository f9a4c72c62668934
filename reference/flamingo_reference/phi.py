"""phi: which medium each text position sees. The definition that every subgraph and backend follows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def phi_from_tokens(token_ids: npt.NDArray[np.int64], image_id: int, reset_id: int | None = None) -> npt.NDArray[np.int64]:
    """Index of the last medium at or before each position, 0 where there is none.

    token_ids: int64 [B, S]. Returns int64 [B, S] in 0..N, where N counts the `<image>` tokens of the row.
    The `<image>` token itself already sees its own medium. reset_id: after this token, which still sees its medium, there is none
    until the next `<image>` (IDEFICS); None where the last medium is seen on (Flamingo).
    Source: Flamingo (arXiv 2204.14198), section 2.3; the inclusive count is this project's choice.
    Raises ValueError if token_ids is not two-dimensional or a row is empty.
    """
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 2 or token_ids.shape[1] == 0:
        raise ValueError(f"token_ids has shape {token_ids.shape}, expected [batch, at least one position]")
    is_image = token_ids == image_id
    phi = np.cumsum(is_image, axis=1, dtype=np.int64)
    if reset_id is None:
        return phi
    places = np.arange(token_ids.shape[1])
    last_image = np.maximum.accumulate(np.where(is_image, places, -1), axis=1)
    last_reset = np.maximum.accumulate(np.where(token_ids == reset_id, places, -1), axis=1)
    ended_before = np.concatenate([np.full((len(token_ids), 1), -1), last_reset[:, :-1]], axis=1)
    return np.where(ended_before > last_image, 0, phi)


def phi_after(token_ids: npt.NDArray[np.int64], phi: npt.NDArray[np.int64], reset_id: int | None) -> int:
    """The medium seen by the position after the last of token_ids [P], whose phi [P] is given; 0 for none."""
    return 0 if reset_id is not None and int(token_ids[-1]) == reset_id else int(phi[-1])
