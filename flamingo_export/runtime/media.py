"""Media: an image or video as the model takes it, known by the digest of its decoded pixels."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime.image_files import name_of, open_source, translated
from flamingo_export.runtime.images import ImageSource, Pixels, load_image, preprocess
from flamingo_export.runtime.tiles import num_tiles, tiles_of
from flamingo_export.runtime.videos import Video, load_video
from flamingo_reference.config import ModelConfig
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


class RecentMedia:
    """Media that were prepared lately, by digest: a further question about an image need not scale and normalise it again. For any thread."""

    def __init__(self, most: int, most_bytes: int = 64 << 20) -> None:
        """At most so many media, of so many bytes of pixels together."""
        self._most, self._most_bytes = most, most_bytes
        self._held: OrderedDict[bytes, Medium] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, digest: bytes, prepare: Callable[[], Medium]) -> Medium:
        """The medium of this digest, prepared where it is not held."""
        with self._lock:
            if digest in self._held:
                self._held.move_to_end(digest)
                return self._held[digest]
        medium = prepare()
        with self._lock:
            if digest not in self._held:
                self._held[digest] = medium
                self._bytes += medium.pixels.nbytes
            while len(self._held) > self._most or self._bytes > self._most_bytes:
                _, oldest = self._held.popitem(last=False)
                self._bytes -= oldest.pixels.nbytes
        return medium


def load_medium(
    source: MediumSource, config: ModelConfig, fit: ImageFit = "pad", *, digest: bool = True, recent: RecentMedia | None = None
) -> Medium:
    """Decodes and prepares one medium, made a square as `fit` says, or cut into tiles where the model takes these. Raises ImageError.

    digest: False leaves it empty, for who looks nothing up by it.
    recent: where images that were prepared for this config and fit are looked for. The frames of videos are not held until a digest is known.
    """
    if isinstance(source, Video):
        if config.tiled is not None:
            raise ImageError(f"a video was given, and {config.name} takes images only. Give it frames of the video as images.")
        default = config.resampler.num_time_embeddings or DEFAULT_FRAMES
        return medium_of(load_video(source, default_frames=default), config, fit, digest=digest)
    image = load_image(source)
    seen = _digest([image]) if digest else b""
    return (
        recent.get(seen, lambda: _image(image, seen, config, fit)) if recent is not None else _image(image, seen, config, fit)
    )


def rows_of(source: MediumSource, config: ModelConfig) -> int:
    """Rows of the media bank that a medium takes. Of an image in tiles that follows from its size: of a file only the header is read.

    Raises ImageError if it cannot be one.
    """
    vision = config.tiled
    if vision is None or isinstance(source, Video):
        return 1
    if isinstance(source, np.ndarray):
        height, width = source.shape[:2]
    elif isinstance(source, Image.Image):
        width, height = source.size
    else:
        with open_source(source) as file, translated(name_of(source)), Image.open(file) as image:
            width, height = image.size
    return num_tiles(height, width, vision.image_size, vision.aspect_ratios)


def medium_of(frames: Iterable[Pixels], config: ModelConfig, fit: ImageFit = "pad", *, digest: bool = True) -> Medium:
    """The medium of decoded frames, uint8 RGB [H, W, 3] each; they are taken one at a time, so that large ones are not held together. Of a model
    that takes tiles it is one frame, an image."""
    if config.tiled is not None:
        (image,) = frames
        return _image(image, _digest([image]) if digest else b"", config, fit)
    seen = hashlib.sha256()
    prepared = []
    for frame in frames:
        if digest:
            _see(seen, frame)
        prepared.append(preprocess(frame, config, fit))
    pixels = prepared[0][None] if len(prepared) == 1 else np.stack(prepared)
    return Medium(pixels=pixels, digest=seen.digest() if digest else b"")


def _image(image: Pixels, digest: bytes, config: ModelConfig, fit: ImageFit) -> Medium:
    if config.tiled is None:
        return Medium(pixels=preprocess(image, config, fit)[None], digest=digest)
    tiles = tiles_of(image, config.tiled.image_size, config.tiled.aspect_ratios, config.pixel_mean, config.pixel_std)
    return Medium(pixels=tiles.pixels[None], digest=digest, rows=tiles.num_tiles, aspect=tiles.aspect_ratio_id)


def _see(seen: hashlib._Hash, frame: Pixels) -> None:
    seen.update(repr(frame.shape).encode())
    seen.update(np.ascontiguousarray(frame).data)


def _digest(frames: Iterable[Pixels]) -> bytes:
    seen = hashlib.sha256()
    for frame in frames:
        _see(seen, frame)
    return seen.digest()
