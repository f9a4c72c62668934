"""Animated images: how many frames there are, how long each is shown, and what is seen then.

GIF and APNG are composed here (gif.py, apng.py), frame over frame on a white canvas, as their formats say. What is seen is always
over white, and "over" is associative, so an opaque canvas gives the same as one with alpha. WebP, AVIF and pages of a TIFF come
whole from Pillow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal, Protocol

import numpy as np
from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime.image_files import opened_by_pillow
from flamingo_export.runtime.pixels import WHITE, Pixels, check_size, to_rgb, upright

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
MAX_ANIMATION_PIXELS = 400_000_000
"""Of all frames up to the last one that is looked at: a few hundred bytes of file can ask for gigabytes of canvas. 192 frames of 1920x1080."""


class Animation(Protocol):
    """An image file as frames; a still one has one."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the canvas, as stored: before it is turned upright."""
        ...

    @property
    def durations(self) -> Sequence[float]:
        """How long each frame is shown, in milliseconds; 0 where the file does not say."""
        ...

    @property
    def cut(self) -> bool:
        """Whether the file ends before the animation does, though no frame is damaged."""
        ...

    def frame(self, index: int) -> Pixels:
        """What is seen of frame `index`, uint8 RGB [H, W, 3]. Frames are asked for in order; one may be asked for again."""
        ...


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one frame changes: colours RGB and alpha (L, None where opaque) at a place on the canvas, and what becomes of it after."""

    colour: Image.Image
    alpha: Image.Image | None
    box: Box
    replaces: bool
    """Whether it takes the place of what was there, its transparency too, rather than lying over it."""
    dispose: Literal["keep", "clear", "restore"]


class Canvas:
    """What is seen while layers follow one another, over white."""

    def __init__(self, size: tuple[int, int], name: str) -> None:
        """size: width, height. Raises ImageError if it is empty or too large."""
        check_size(size, name)
        self.image = Image.new("RGB", size, WHITE)
        self._undo: tuple[Image.Image | tuple[int, int, int], Box] | None = None

    def draw(self, layer: Layer) -> None:
        """Disposes of the last layer and puts this one down; what lies beyond the canvas is not seen."""
        if self._undo is not None:
            self.image.paste(*self._undo)
        box = layer.box
        self._undo = None
        if layer.dispose == "restore":
            width, height = self.image.size
            inside = (min(box[0], width), min(box[1], height), min(box[2], width), min(box[3], height))
            self._undo = (self.image.crop(inside), inside)
        elif layer.dispose == "clear":
            self._undo = (WHITE, box)
        if layer.replaces and layer.alpha is not None:
            self.image.paste(WHITE, box)
        self.image.paste(layer.colour, box, layer.alpha)


class Composed:
    """Frames of layers that are drawn one over the other."""

    def __init__(self, size: tuple[int, int], layers: Iterator[Layer], exif: Image.Exif, name: str) -> None:
        """size: of the canvas. layers: decoded one at a time. exif: its orientation is applied to every frame."""
        self._canvas = Canvas(size, name)
        self._layers, self._exif = layers, exif
        self._drawn = -1

    def frame(self, index: int) -> Pixels:
        """See Animation.frame."""
        while self._drawn < index:
            self._canvas.draw(next(self._layers))
            self._drawn += 1
        return np.array(upright(self._canvas.image.copy(), self._exif), dtype=np.uint8)


class PillowFrames:
    """Frames as Pillow gives them, each whole."""

    cut = False

    def __init__(self, file: IO[bytes], name: str) -> None:
        """Raises Pillow's errors, and ImageError."""
        self._image = opened_by_pillow(file)
        self._name = name
        self.size = self._image.size
        check_size(self.size, name)
        count = 1 if self._image.format == "MPO" else getattr(self._image, "n_frames", 1)  # a photograph with previews is one
        if self._image.format == "AVIF":  # whose frames are decoded for their durations
            check_frames(self.size, count, name)
        self.durations = _durations(self._image, file, count, name)

    def frame(self, index: int) -> Pixels:
        """See Animation.frame."""
        if len(self.durations) > 1:
            self._image.seek(index)
        return to_rgb(self._image, self._name if len(self.durations) == 1 else f"frame {index} of {self._name}")


def check_frames(size: tuple[int, int], count: int, name: str) -> None:
    """Raises ImageError if an animation of that size (width, height) takes too long to decode up to frame `count`."""
    if count > 1 and count * size[0] * size[1] > MAX_ANIMATION_PIXELS:
        raise ImageError(
            f"{name} has {size[0]}x{size[1]} pixels in each frame, and {count} frames up to the last one that is wanted: more than the "
            f"{MAX_ANIMATION_PIXELS // 1_000_000} million pixels that are decoded of an animation. "
            "Scale it down, cut out the part you mean, or save it as a video file (mp4)."
        )


def open_animation(file: IO[bytes], name: str) -> Animation:
    """The frames of an encoded image. name: what messages call it. Raises ImageError, and Pillow's errors."""
    from flamingo_export.runtime import apng, gif

    start = file.read(6)
    file.seek(0)
    if start in gif.SIGNATURES:
        return gif.GifFrames(file, name)
    if start == apng.SIGNATURE[:6] and (found := apng.read(file, name)) is not None:
        return apng.ApngFrames(file, found, name)
    file.seek(0)
    return PillowFrames(file, name)


def _durations(image: Image.Image, file: IO[bytes], count: int, name: str) -> list[float]:
    if count == 1 or image.format not in ("WEBP", "AVIF"):
        return [0.0] * count
    if image.format == "WEBP":
        found = _webp_durations(file)
    else:  # Pillow says it of a frame that it has decoded
        found = []
        for index in range(count):
            image.seek(index)
            image.load()
            found.append(float(image.info.get("duration", 0)))
    if len(found) != count:
        raise ImageError(f"{name} is damaged or truncated: {len(found)} of {count} frames say how long they are shown")
    return found


def _webp_durations(file: IO[bytes]) -> list[float]:
    """Of each ANMF chunk (WebP container specification). It is 24 bits, after the frame's place and size."""
    found: list[float] = []
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        following = file.tell() + size + size % 2
        if head[:4] == b"ANMF":
            found.append(float(int.from_bytes(file.read(16)[12:15], "little")))
        file.seek(following)
    return found
