"""Media: an image or video as the model takes it, known by the digest of its decoded pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flamingo_export.runtime.images import ImageSource, Pixels, load_image, preprocess
from flamingo_export.runtime.videos import Video, load_video
from flamingo_reference.config import ModelConfig

MediumSource = ImageSource | Video


@dataclass(frozen=True, kw_only=True)
class Medium:
    """frames: uint8 RGB [H, W, 3] each, one for an image. digest: of the frames' pixels and sizes, whatever file they came from."""

    frames: tuple[Pixels, ...]
    digest: bytes

    def pixels(self, config: ModelConfig) -> npt.NDArray[np.float32]:
        """Input of the vision encoder, float32 [T, 3, I, I]."""
        return np.stack([preprocess(frame, config) for frame in self.frames])


def load_medium(source: MediumSource, config: ModelConfig) -> Medium:
    """Decodes one medium. Raises ImageError."""
    if isinstance(source, Video):
        return medium_of(load_video(source, default_frames=config.resampler.num_time_embeddings))
    return medium_of([load_image(source)])


def medium_of(frames: Sequence[Pixels]) -> Medium:
    """The medium of decoded frames, uint8 RGB [H, W, 3] each."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(repr(frame.shape).encode())
        digest.update(np.ascontiguousarray(frame).data)
    return Medium(frames=tuple(frames), digest=digest.digest())
