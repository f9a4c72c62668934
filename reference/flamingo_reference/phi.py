"""phi: which medium each text position sees. The definition that every subgraph and backend follows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def phi_from_tokens(token_ids: npt.NDArray[np.int64], image_id: int) -> npt.NDArray[np.int64]:
    """Index of the last medium at or before each position, 0 where there is none.

    token_ids: int64 [B, S]. Returns int64 [B, S] in 0..N, where N counts the `<image>` tokens of the row.
    The `<image>` token itself already sees its own medium.
    Source: Flamingo (arXiv 2204.14198), section 2.3; the inclusive count is this project's choice.
    Raises ValueError if token_ids is not two-dimensional or a row is empty.
    """
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 2 or token_ids.shape[1] == 0:
        raise ValueError(f"token_ids has shape {token_ids.shape}, expected [batch, at least one position]")
    return np.cumsum(token_ids == image_id, axis=1, dtype=np.int64)
