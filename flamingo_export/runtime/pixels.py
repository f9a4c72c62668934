"""One decoded image as uint8 RGB, as a viewer shows it.

EXIF orientation is applied, transparency is over white, 16 bits are scaled to 8. Where Pillow leaves something of the file's
format out, it is done here: the transparent value of a PNG in another depth than 8 bits, TIFF's WhiteIsZero and 12 bits.
Colour profiles (ICC, gAMA) are not applied, as the pipelines do not that the models were trained with.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from flamingo_export.errors import ImageError

Pixels = npt.NDArray[np.uint8]
MAX_PIXELS = 64_000_000
"""Larger images are refused by their header, before memory is taken: a few kilobytes of file can decode to gigabytes."""
WHITE = (255, 255, 255)
ORIENTATION = 0x0112
"""The EXIF tag."""
_GRAY_BITS = {"L;2": 2, "L;4": 4, "L": 8}
_SIGNED = 2
"""TIFF's SampleFormat."""


def check_size(size: tuple[int, int], name: str) -> None:
    """Raises ImageError if an image of that width and height is empty or larger than what is decoded."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty ({width}x{height} pixels)")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width}x{height} pixels, more than the {MAX_PIXELS // 1_000_000} million that are decoded. "
            "Scale it down first; the model sees far fewer."
        )


def to_rgb(image: Image.Image, name: str) -> Pixels:
    """The current frame of an opened image, upright and over white, uint8 RGB [H, W, 3]. Raises ImageError."""
    rgb, alpha = colour_and_alpha(image, name)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, WHITE), alpha)
    # A copy: numpy's view of a Pillow image is not writable and keeps the image alive.
    return np.array(upright(rgb, image.getexif()), dtype=np.uint8)


def upright(image: Image.Image, exif: Image.Exif) -> Image.Image:
    """The image turned and mirrored as the orientation in `exif` says."""
    orientation = exif.get(ORIENTATION, 1)
    if orientation not in range(2, 9):
        return image
    image.getexif()[ORIENTATION] = orientation
    return ImageOps.exif_transpose(image)


def colour_and_alpha(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """The current frame as RGB and, where it has transparency, its alpha as L; as stored, so not turned. Raises ImageError."""
    check_size(image.size, name)
    if _SIGNED in getattr(image, "tag_v2", {}).get(SAMPLEFORMAT, ()):
        raise ImageError(
            f"{name} holds integers with a sign, whose range is not known. Save it with 8 or 16 bits a channel, none negative."
        )
    alpha = _alpha_of_key(image, name)
    image.load()
    if image.mode.startswith("I"):
        return _eight_bit(image, name).convert("RGB"), alpha
    if image.mode == "F":
        raise ImageError(f"{name} holds floating point values, whose range is not known. Save it with 8 or 16 bits a channel.")
    if image.mode == "La":  # which Pillow does not turn into RGBA
        image = image.convert("LA")
    if alpha is None and image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    return image.convert("RGB"), alpha


def _alpha_of_key(image: Image.Image, name: str) -> Image.Image | None:
    """The alpha that a PNG's one transparent value gives, where Pillow's own gives another. Asked before the image is decoded.

    PNG 1.2, section 4.2.1.1 (tRNS): the value is one of the file's depth, compared before anything is scaled. Pillow compares it
    with the values scaled to 8 bits, and not at all in 16. Raises ImageError for a Pillow image that is decoded to less than the value's bits.
    """
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "I;16":  # values as they are in the file, decoded or not
        return _opaque(np.asarray(image) != key)
    if not (isinstance(image, ImageFile.ImageFile) and image.format == "PNG" and image.tile and isinstance(key, int | tuple)):
        if isinstance(key, tuple) and max(key, default=0) > 255:
            raise ImageError(
                f"{name} is decoded to 8 bits a colour, and its one transparent colour has 16. Give the file, or make it transparent by alpha."
            )
        return None
    raw = image.tile[0].args
    if raw in _GRAY_BITS and isinstance(key, int):
        top = 2 ** _GRAY_BITS[raw] - 1
        return _opaque(np.asarray(image) != (key & top) * (255 // top))
    if isinstance(key, int):
        return None
    if raw == "RGB":
        return _opaque((np.asarray(image) != np.array(key) % 256).any(axis=2))
    if raw == "RGB;16B":
        low = _low_bytes(image)
        return _opaque((np.asarray(image) != np.array(key) >> 8).any(axis=2) | (low != np.array(key) & 255).any(axis=2))
    return None


def _low_bytes(image: ImageFile.ImageFile) -> Pixels:
    """The lower byte of each value of a PNG with 16 bits a colour, of which Pillow keeps the higher: decoded as if the bytes were
    swapped. uint8 [H, W, 3]."""
    file: Any = image.fp
    start = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(start)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as swapped:
        swapped.tile = [tile._replace(args="RGB;16L") for tile in swapped.tile]
        return np.array(swapped, dtype=np.uint8)


def _opaque(shown: npt.NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(shown.astype(np.uint8) * np.uint8(255))


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Gray values of 12 or 16 bits in 8."""
    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    top = 0xFFF if tags.get(BITSPERSAMPLE) == (12,) else 0xFFFF
    if values.min() < 0 or values.max() > top:
        raise ImageError(f"{name} holds integers from {values.min()} to {values.max()}. Save it with 8 or 16 bits a channel.")
    table = ((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # WhiteIsZero, which Pillow turns round in 8 bits and fewer
        table = table[::-1]
    return Image.fromarray(table[values])
