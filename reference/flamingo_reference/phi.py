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


def media_ranges(
    token_ids: npt.NDArray[np.int64], image_id: int, media_of_image: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(first, phi), int64 [B, S] each: a position sees media first to phi of its request, counted from 1; both are 0 where it sees none.

    token_ids: int64 [B, S]. media_of_image: int64 [B, I], how many neighbouring media each image of a row is (its tiles), at least one
    for every image token of the row; entries beyond the row's images are not read.
    A position sees the last image at or before it and, of the images that stand directly before that one with no token between,
    all: the first of two adjacent image tokens sees only its own image, the second both, and so does everything up to the next image.
    Source: Meta's `llama-models` (Llama 3.2 Vision, `create_vision_mask`); transformers' `get_cross_attention_token_mask`.
    Raises ValueError if token_ids is not two-dimensional, a row is empty, or media_of_image is short or has an image of no media.
    """
    token_ids, media_of_image = np.asarray(token_ids), np.asarray(media_of_image)
    images = phi_from_tokens(token_ids, image_id)
    if media_of_image.ndim != 2 or len(media_of_image) != len(token_ids) or media_of_image.shape[1] < images[:, -1].max():
        raise ValueError(f"media_of_image has shape {media_of_image.shape}, expected {len(token_ids)} rows of all their images")
    counted = np.arange(media_of_image.shape[1]) < images[:, -1:]
    if (media_of_image[counted] < 1).any():
        raise ValueError(f"media_of_image is {media_of_image.tolist()}: every image is at least one medium")
    is_image = token_ids == image_id
    stands_alone = is_image.copy()
    stands_alone[:, 1:] &= ~is_image[:, :-1]  # the first of a group
    group_starts = np.maximum.accumulate(np.where(stands_alone, images, 0), axis=1)
    through = np.concatenate(
        [np.zeros((len(token_ids), 1), np.int64), np.cumsum(media_of_image, axis=1, dtype=np.int64)], axis=1
    )
    phi = np.take_along_axis(through, images, axis=1)
    before = np.take_along_axis(through, np.maximum(group_starts - 1, 0), axis=1)
    return np.where(images > 0, before + 1, 0), phi
