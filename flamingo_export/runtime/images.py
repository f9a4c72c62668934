"""Images, and what the vision encoder takes of them.

An image is decoded to uint8 RGB [H, W, 3] as a viewer would show it (pixels.py), then made a square of the encoder's image size as
its model was trained (`ImageFit`), with Pillow's antialiased bicubic filter. Padding has the mean colour, which is exactly zero after
normalisation (Flamingo, arXiv 2204.14198, section 3.1: mean padding; filter and centring are this project's choice).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from flamingo_export.errors import ImageError
from flamingo_export.runtime.animations import open_animation
from flamingo_export.runtime.image_files import FORMATS, UNNAMED, EncodedSource, is_encoded, name_of, open_source, translated
from flamingo_export.runtime.pixels import MAX_PIXELS, Pixels, check_size, to_rgb
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import ImageFit

__all__ = ["FORMATS", "MAX_PIXELS", "ImageSource", "Pixels", "load_image", "preprocess"]

ImageSource = EncodedSource | Image.Image | npt.NDArray[Any]
"""A path, the bytes of an image file, a file object that is open for reading them, a Pillow image, or uint8 [H, W], [H, W, 3] or [H, W, 4]."""

RESAMPLING = Image.Resampling.BICUBIC


def load_image(source: ImageSource) -> Pixels:
    """The decoded image, uint8 RGB [H, W, 3].

    Raises ImageError if it is missing, unreadable, truncated, animated, larger than MAX_PIXELS, empty or of an unknown kind.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        name = UNNAMED
        if isinstance(source, ImageFile.ImageFile) and source.tile and (source.fp is None or source.fp.closed):
            raise ImageError(
                "the Pillow image given was closed before it was decoded. Call its load() while it is open, or give the file."
            )
        with translated(name):
            frames = getattr(source, "n_frames", 1) - bool(getattr(source, "default_image", False))
            if source.format != "MPO":
                _refuse_animation(frames, name)
            return to_rgb(source, name)
    if not is_encoded(source):
        raise ImageError(
            f"an image is given as {type(source).__name__}; give a path, the bytes of a file, a file object, a PIL image or a uint8 "
            "array [H, W, 3]"
        )
    name = name_of(source)
    with open_source(source) as file, translated(name):
        animation = open_animation(file, name)
        _refuse_animation(len(animation.durations), name)
        return animation.frame(0)


def _refuse_animation(frames: int, name: str) -> None:
    if frames > 1:
        way = "Pass it as a video" if name == UNNAMED else f"Pass it as a video: --video {name}"
        raise ImageError(f"{name} has {frames} frames. {way} (or save the one frame you mean).")


def preprocess(pixels: Pixels, config: ModelConfig, fit: ImageFit = "pad") -> npt.NDArray[np.float32]:
    """What the vision encoder takes: float32 [3, I, I], made a square as `fit` says, normalised.

    pixels: uint8 RGB [H, W, 3], as load_image returns them.
    """
    side = config.vision.image_size
    shown = pixels if pixels.shape[:2] == (side, side) else np.asarray(_fitted(Image.fromarray(pixels), side, fit))
    height, width = shown.shape[:2]
    square = np.zeros((3, side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    for channel, levels in enumerate(_levels(config.pixel_mean, config.pixel_std)):
        square[channel, top : top + height, left : left + width] = levels[shown[:, :, channel]]
    return square


@lru_cache(maxsize=8)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """What becomes of each level of each channel, float32 [3, 256]."""
    shift, scale = (np.asarray(values, np.float32)[:, None] for values in (mean, std))
    levels: npt.NDArray[np.float32] = (np.arange(256, dtype=np.float32) / np.float32(255) - shift) / scale
    return levels


def _fitted(image: Image.Image, side: int, fit: ImageFit) -> Image.Image:
    """The image in the size that it has within the square: smaller than it on one side where it is to be padded."""
    if fit == "crop":
        return _cropped(image, side)
    width, height = side, side
    if fit == "pad":
        scale = side / max(image.size)
        width, height = (min(side, max(1, round(size * scale))) for size in image.size)
    return image if image.size == (width, height) else image.resize((width, height), RESAMPLING)


def _cropped(image: Image.Image, side: int) -> Image.Image:
    """The middle of the image, its shorter side made `side`.

    Rounding is that of the transforms CLIP and OpenFlamingo were trained with (torchvision's Resize and CenterCrop): the longer side is cut to
    a whole number, the margin rounded to nearest even.
    """
    shorter = min(image.size)
    width, height = (side if size == shorter else int(side * size / shorter) for size in image.size)
    left, top = (round((size - side) / 2.0) for size in (width, height))
    if (width, height) == image.size:
        return image.crop((left, top, left + side, top + side))
    if width * height > MAX_PIXELS:  # a line of pixels: its whole would not fit in memory, so only what is kept is made
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        return image.resize((side, side), RESAMPLING, box=box)
    return image.resize((width, height), RESAMPLING).crop((left, top, left + side, top + side))


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    if array.dtype != np.uint8:
        raise ImageError(f"an image array is {array.dtype}, expected uint8 (0 to 255)")
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        raise ImageError(f"an image array has shape {array.shape}, expected [H, W], [H, W, 3] or [H, W, 4]")
    name = "an image array"
    check_size((array.shape[1], array.shape[0]), name)
    if array.shape[2] == 4:
        return to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)
    return np.array(array)
