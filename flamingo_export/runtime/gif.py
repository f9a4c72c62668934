"""GIF: frames found block by block, decoded by Pillow, and composed as the specification says.

GIF89a specification. Where it leaves a choice, or files do not keep to it: what is not painted is transparent, so white; a first
frame that is larger than the canvas enlarges it, what later ones have beyond it is cut off; transparency is that of the frame.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime.animations import Box, Composed, Layer
from flamingo_export.runtime.pixels import Pixels, check_size

SIGNATURES = (b"GIF87a", b"GIF89a")
_DISPOSE: dict[int, Literal["keep", "clear", "restore"]] = {2: "clear", 3: "restore", 4: "restore"}  # 4: what some writers mean


@dataclass(frozen=True, kw_only=True)
class _Frame:
    box: Box
    interlaced: bool
    palette: bytes
    data: tuple[int, int]  # offset and length of the LZW data, its first byte and the sub-blocks
    duration: float
    transparent: int | None
    dispose: Literal["keep", "clear", "restore"]


class GifFrames:
    """See Animation."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        """Finds the frames; none is decoded yet. Raises ImageError."""
        self._file, self._name = file, name
        reader = _Reader(file, name)
        self._frames, self.cut = reader.frames()
        if not self._frames:
            raise ImageError(f"{name} is damaged or truncated: it is a GIF without an image")
        first = self._frames[0].box
        size = max(reader.size[0], first[2]), max(reader.size[1], first[3])
        self.durations = [frame.duration for frame in self._frames]
        self.size = size
        self._composed = Composed(size, self._layers(), Image.Exif(), name)

    def frame(self, index: int) -> Pixels:
        """See Animation.frame."""
        return self._composed.frame(index)

    def _layers(self) -> Iterator[Layer]:
        for frame in self._frames:
            width, height = frame.box[2] - frame.box[0], frame.box[3] - frame.box[1]
            check_size((width, height), self._name)
            indices = self._decoded(frame, width, height)
            palette = np.zeros((256, 3), np.uint8)
            given = np.frombuffer(frame.palette, np.uint8).reshape(-1, 3)
            palette[: len(given)] = given
            alpha = None
            if frame.transparent is not None:
                alpha = Image.fromarray((indices != frame.transparent).astype(np.uint8) * np.uint8(255))
            yield Layer(
                colour=Image.fromarray(palette[indices]), alpha=alpha, box=frame.box, replaces=False, dispose=frame.dispose
            )

    def _decoded(self, frame: _Frame, width: int, height: int) -> Pixels:
        """The frame's colour numbers, uint8 [H, W]: a GIF of only this frame goes through Pillow, with gray for a palette so that the numbers
        are what comes out."""
        offset, length = frame.data
        self._file.seek(offset)
        gray = bytes(np.repeat(np.arange(256, dtype=np.uint8), 3))
        alone = SIGNATURES[1] + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + gray
        alone += b"," + struct.pack("<HHHHB", 0, 0, width, height, 0x40 if frame.interlaced else 0)
        alone += self._file.read(length) + b";"
        with Image.open(io.BytesIO(alone), formats=["GIF"]) as image:
            return np.array(image, dtype=np.uint8)


class _Reader:
    """Blocks of a GIF file, in order."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        width, height, flags, _, _ = struct.unpack("<6xHHBBB", self._read(13))
        self.size = (width, height)
        self._palette = self._colours(flags)

    def frames(self) -> tuple[list[_Frame], bool]:
        """The frames, and whether the file ends without the mark that ends a GIF."""
        found: list[_Frame] = []
        duration, transparent, dispose = 0.0, None, 0
        while kind := self._file.read(1):
            if kind == b";":
                return found, False
            if kind == b"!":
                label = self._read(1)
                data = self._sub_blocks()
                if label == b"\xf9" and len(data) >= 4:  # graphic control: of the image that follows
                    flags, hundredths, key = struct.unpack("<BHB", data[:4])
                    duration, transparent, dispose = hundredths * 10.0, key if flags & 1 else None, flags >> 2 & 7
            elif kind == b",":
                left, top, width, height, flags = struct.unpack("<HHHHB", self._read(9))
                palette = self._colours(flags) or self._palette or bytes(np.repeat(np.arange(256, dtype=np.uint8), 3))
                start = self._file.tell()
                self._read(1)
                self._sub_blocks()
                found.append(
                    _Frame(
                        box=(left, top, left + width, top + height),
                        interlaced=bool(flags & 0x40),
                        palette=palette,
                        data=(start, self._file.tell() - start),
                        duration=duration,
                        transparent=transparent,
                        dispose=_DISPOSE.get(dispose, "keep"),
                    )
                )
                duration, transparent, dispose = 0.0, None, 0
            elif kind != b"\0":  # which some writers leave between blocks
                raise ImageError(f"{self._name} is damaged or truncated: there is no block of a GIF after {len(found)} frames")
        return found, True

    def _colours(self, flags: int) -> bytes:
        return self._read(3 << (flags & 7) + 1) if flags & 0x80 else b""

    def _sub_blocks(self) -> bytes:
        """Skips the sub-blocks up to the one that ends them; the first one's data."""
        first = b""
        while length := self._read(1)[0]:
            data = self._read(length)
            first = first or data
        return first

    def _read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise ImageError(f"{self._name} is damaged or truncated: a GIF block ends before it should")
        return data
