"""Which learned time embeddings each frame of a medium mixes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def time_weights(num_frames: int, num_embeddings: int) -> npt.NDArray[np.float32]:
    """Mixing weights float32 [T, num_embeddings], each row summing to one.

    Up to num_embeddings frames, frame t takes embedding t; beyond, positions are spread linearly from the first embedding to the
    last (Flamingo, arXiv 2204.14198, section 3.1: 30 frames at inference, 8 in training; the end points are this project's choice).
    Raises ValueError if there is no frame.
    """
    if num_frames < 1 or num_embeddings < 1:
        raise ValueError(f"{num_frames} frames and {num_embeddings} time embeddings, expected at least one of each")
    if num_frames <= num_embeddings:
        return np.eye(num_frames, num_embeddings, dtype=np.float32)
    place = np.linspace(0.0, num_embeddings - 1, num_frames)
    distance = np.abs(place[:, None] - np.arange(num_embeddings))
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)
