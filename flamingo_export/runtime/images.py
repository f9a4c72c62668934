"""Reading images and turning them into what the vision encoder takes.

An image is decoded to uint8 RGB [H, W, 3] as a viewer would show it (EXIF orientation applied, transparency over white, 16-bit
scaled to 8), then made a square of the encoder's image size as its model was trained (`ImageFit`), with Pillow's antialiased bicubic filter.
Padding has the mean colour, which is exactly zero after normalisation (Flamingo, arXiv 2204.14198, section 3.1: mean padding; filter and
centring are this project's choice).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from flamingo_export.errors import ImageError
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import ImageFit

Pixels = npt.NDArray[np.uint8]
ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
"""A file, a Pillow image, or uint8 [H, W], [H, W, 3] or [H, W, 4]."""

FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""What is decoded. Not all that Pillow knows: its EPS reader starts another program, and rare formats are where the holes are."""
MAX_PIXELS = 64_000_000
"""Larger images are refused by their header, before memory is taken: a few kilobytes of file can decode to gigabytes."""
RESAMPLING = Image.Resampling.BICUBIC


def load_image(source: ImageSource) -> Pixels:
    """The decoded image, uint8 RGB [H, W, 3].

    Raises ImageError if it is missing, unreadable, truncated, animated, larger than MAX_PIXELS, empty or of an unknown kind.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with _translated("the image given"):
            refuse_animation(source, "the image given")
            return to_rgb(source, "the image given")
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"an image is given as {type(source).__name__}; give a path, a PIL image or a uint8 array [H, W, 3]")
    with open_image(source) as image:
        refuse_animation(image, source)
        return to_rgb(image, str(source))


@contextmanager
def open_image(source: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens a file for the length of a `with` block, its size checked, Pillow's errors translated. Raises ImageError."""
    path = Path(source)
    if os.path.isdir(path):  # unlike path.is_dir() it raises nothing, whatever the name
        raise ImageError(f"{path} is a folder. To use its images as the frames of a video, pass it as a video: --video {path}")
    if os.path.exists(path) and not os.path.isfile(path):  # which might have no end, or never begin
        raise ImageError(f"{path} is a pipe or a device, expected a file. Write the image into one first.")
    with _translated(str(path)), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, and with a better message
        Image.init()  # a format is known by name only once its plugin is loaded
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            _check_size(image.size, str(path))
            yield image


def is_image_file(path: Path) -> bool:
    """Whether a file is of a format that is read as an image, by its content; True also for what `open_image` will refuse with a reason."""
    if not os.path.isfile(path):
        return True
    try:
        Image.init()
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:
        return True


def refuse_animation(image: Image.Image, name: str | os.PathLike[str]) -> None:
    """Raises ImageError if the image has several frames (MPO, a photograph with previews, counts as one)."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ImageError(f"{name} has {frames} frames. Pass it as a video: --video {name} (or save the one frame you mean).")


def to_rgb(image: Image.Image, name: str) -> Pixels:
    """The current frame of an opened image, upright, uint8 RGB [H, W, 3]."""
    _check_size(image.size, name)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _sixteen_bit(image, name)
    elif image.mode == "F":
        raise ImageError(f"{name} holds floating point values, whose range is not known. Save it with 8 or 16 bits a channel.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    # A copy: numpy's view of a Pillow image is not writable and keeps the image alive.
    return np.array(image.convert("RGB"), dtype=np.uint8)


def preprocess(pixels: Pixels, config: ModelConfig, fit: ImageFit = "pad") -> npt.NDArray[np.float32]:
    """What the vision encoder takes: float32 [3, I, I], made a square as `fit` says, normalised.

    pixels: uint8 RGB [H, W, 3], as load_image returns them.
    """
    side = config.vision.image_size
    image = _fitted(Image.fromarray(pixels), side, fit)
    mean, std = (np.asarray(values, np.float32) for values in (config.pixel_mean, config.pixel_std))
    normalised = (np.asarray(image, np.float32) / np.float32(255) - mean) / std
    square = np.zeros((3, side, side), np.float32)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[:, top : top + image.height, left : left + image.width] = normalised.transpose(2, 0, 1)
    return square


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
    _check_size((array.shape[1], array.shape[0]), name)
    if array.shape[2] == 4:
        return to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)
    return np.array(array)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty ({width}x{height} pixels)")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width}x{height} pixels, more than the {MAX_PIXELS // 1_000_000} million that are decoded. "
            "Scale it down first; the model sees far fewer."
        )


def _sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(f"{name} holds integers from {values.min()} to {values.max()}. Save it with 8 or 16 bits a channel.")
    return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Pillow reports damaged files with whatever exception its decoder met; all of them become one ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(f"{name} is not an image that can be read (known: {known})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is refused: {error}. Scale it down first.") from None
    except PermissionError:
        raise ImageError(f"{name} cannot be read: permission denied") from None
    except Exception as error:
        raise ImageError(f"{name} is damaged or truncated: {error}") from error
