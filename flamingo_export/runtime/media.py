"""Media: an image or video as the model takes it, known by the digest of its decoded pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flamingo_export.errors import ImageError
from flamingo_export.runtime.images import ImageSource, Pixels, load_image, preprocess
from flamingo_export.runtime.tiles import tiles_of
from flamingo_export.runtime.videos import Video, load_video
from flamingo_reference.config import ModelConfig, TiledViTConfig
from flamingo_reference.input_format import ImageFit

MediumSource = ImageSource | Video
DEFAULT_FRAMES = 8
"""Frames taken of a video by a model that has no time embeddings, which would say how many it was trained on."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """pixels: input of the vision encoder, float32 [T, 3, I, I], T = 1 for an image; of an image of tiles [1, Tmax, 3, I, I]. digest: of the
    decoded pixels and sizes of all frames, whatever file they came from. rows: of the media bank: tiles of an image, else 1. aspect: of an
    image of tiles, the number of its arrangement, from 1; else 0."""

    pixels: npt.NDArray[np.float32]
    digest: bytes
    rows: int = 1
    aspect: int = 0


def load_medium(source: MediumSource, config: ModelConfig, fit: ImageFit = "pad", *, digest: bool = True) -> Medium:
    """Decodes and prepares one medium, made a square as `fit` says, or cut into tiles where the model takes these. Raises ImageError.

    digest: False leaves it empty, for who looks nothing up by it.
    """
    if config.tiled is not None:
        if isinstance(source, Video):
            raise ImageError(f"a video was given, and {config.name} takes images only. Give it frames of the video as images.")
        return _tiled(load_image(source), config, config.tiled)
    if isinstance(source, Video):
        default = config.resampler.num_time_embeddings or DEFAULT_FRAMES
        return medium_of(load_video(source, default_frames=default), config, fit, digest=digest)
    return medium_of([load_image(source)], config, fit, digest=digest)


def medium_of(frames: Iterable[Pixels], config: ModelConfig, fit: ImageFit = "pad", *, digest: bool = True) -> Medium:
    """The medium of decoded frames, uint8 RGB [H, W, 3] each; they are taken one at a time, so that large ones are not held together. Of a model
    that takes tiles it is one frame, an image."""
    if config.tiled is not None:
        (image,) = frames
        return _tiled(image, config, config.tiled)
    seen = hashlib.sha256()
    prepared = []
    for frame in frames:
        if digest:
            seen.update(repr(frame.shape).encode())
            seen.update(np.ascontiguousarray(frame).data)
        prepared.append(preprocess(frame, config, fit))
    pixels = prepared[0][None] if len(prepared) == 1 else np.stack(prepared)
    return Medium(pixels=pixels, digest=seen.digest() if digest else b"")


def _tiled(image: Pixels, config: ModelConfig, vision: TiledViTConfig) -> Medium:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    tiles = tiles_of(image, vision.image_size, vision.aspect_ratios, config.pixel_mean, config.pixel_std)
    return Medium(pixels=tiles.pixels[None], digest=digest.digest(), rows=tiles.num_tiles, aspect=tiles.aspect_ratio_id)
