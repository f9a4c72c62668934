"""Animated PNG: frames found chunk by chunk, decoded by Pillow, and composed as the specification says.

PNG specification, third edition (animation: acTL, fcTL, fdAT; section 11.3.6). A default image that is not part of the animation
is what readers without animation show; here it is skipped. Frames beyond the canvas, missing ones and chunks out of order are errors.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime.animations import Box, Composed, Layer
from flamingo_export.runtime.pixels import Pixels, check_size, colour_and_alpha

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SHARED = (b"PLTE", b"tRNS")
_DISPOSE: tuple[Literal["keep", "clear", "restore"], ...] = ("keep", "clear", "restore")
_MAX_SMALL = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Frame:
    box: Box
    duration: float
    dispose: Literal["keep", "clear", "restore"]
    replaces: bool
    data: list[tuple[int, int]] = field(default_factory=list)  # offset and length of each piece of the compressed pixels


@dataclass(kw_only=True)
class Index:
    """Where the frames of an animated PNG are."""

    header: bytes
    shared: list[tuple[bytes, bytes]] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)
    exif: Image.Exif = field(default_factory=Image.Exif)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the canvas."""
        width, height = struct.unpack(">II", self.header[:8])
        return width, height


class ApngFrames:
    """See Animation."""

    cut = False  # refused as damaged: the file says how many frames there are

    def __init__(self, file: IO[bytes], index: Index, name: str) -> None:
        """index: what `read` found in the file. Raises ImageError."""
        self._file, self._index, self._name = file, index, name
        self.durations = [frame.duration for frame in index.frames]
        self.size = index.size
        self._composed = Composed(index.size, self._layers(), index.exif, name)

    def frame(self, index: int) -> Pixels:
        """See Animation.frame."""
        return self._composed.frame(index)

    def _layers(self) -> Iterator[Layer]:
        for number, frame in enumerate(self._index.frames):
            left, top, right, bottom = frame.box
            header = struct.pack(">II", right - left, bottom - top) + self._index.header[8:]
            chunks = [(b"IHDR", header), *self._index.shared, (b"IDAT", b"".join(self._pieces(frame))), (b"IEND", b"")]
            alone = SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)
            with Image.open(io.BytesIO(alone), formats=["PNG"]) as image:
                colour, alpha = colour_and_alpha(image, f"frame {number} of {self._name}")
            yield Layer(colour=colour, alpha=alpha, box=frame.box, replaces=frame.replaces, dispose=frame.dispose)

    def _pieces(self, frame: _Frame) -> Iterator[bytes]:
        for offset, length in frame.data:
            self._file.seek(offset)
            yield self._file.read(length)


def read(file: IO[bytes], name: str) -> Index | None:
    """Finds the frames of a PNG file; None if it is not animated. Nothing is decoded.

    Raises ImageError if the animation is not whole, or not as the specification has it.
    """
    file.seek(len(SIGNATURE))
    index: Index | None = None
    promised: int | None = None
    sequence = 0
    drawn = False  # whether IDAT was met
    for kind, offset, length in _chunks(file):
        if kind == b"IHDR":
            index = Index(header=_small(file, kind, length, name))
            if len(index.header) < 13:
                return None
        elif index is None or (promised is None and kind == b"IDAT"):
            return None
        elif kind == b"acTL":
            (promised,) = struct.unpack(">I4x", _small(file, kind, length, name, least=8))
            if promised == 0:
                return None  # which the specification rules out: the default image is shown
        elif kind in _SHARED:
            index.shared.append((kind, _small(file, kind, length, name)))
        elif kind == b"eXIf" and length <= _MAX_SMALL:
            index.exif.load(b"Exif\0\0" + file.read(length))
        elif kind == b"fcTL" and promised is not None:
            data = _small(file, kind, length, name, least=26)
            _in_order(data, sequence, name)
            sequence += 1
            index.frames.append(_control(data, index, name))
        elif kind == b"IDAT":
            drawn = True
            if index.frames:
                index.frames[0].data.append((offset, length))
        elif kind == b"fdAT":
            if not drawn or not index.frames or length < 4:
                raise _damaged(name, "pixels of a frame come before it begins")
            _in_order(file.read(4), sequence, name)
            sequence += 1
            index.frames[-1].data.append((offset + 4, length - 4))
        elif kind == b"IEND":
            break
    else:
        if promised is None:
            return None  # Pillow says what is wrong with it
        raise _damaged(name, "the file ends before the image does")
    if index is None or promised is None:
        return None
    if len(index.frames) != promised or not all(frame.data for frame in index.frames):
        whole = sum(bool(frame.data) for frame in index.frames)
        raise _damaged(name, f"the animation has {promised} frames, {whole} are in the file")
    return index


def _control(data: bytes, index: Index, name: str) -> _Frame:
    """A frame as its fcTL chunk describes it."""
    width, height, left, top, number, scale, dispose, blend = struct.unpack(">4xIIIIHHBB", data[:26])
    canvas = index.size
    box = (left, top, left + width, top + height)
    frame = f"frame {len(index.frames)} of {name}"
    check_size(canvas, name)
    if width < 1 or height < 1 or box[2] > canvas[0] or box[3] > canvas[1]:
        raise ImageError(
            f"{frame} has {width}x{height} pixels at {left}, {top}, which is not within the {canvas[0]}x{canvas[1]} of the image. "
            "Write the file anew with a program that makes valid animated PNGs."
        )
    if dispose >= len(_DISPOSE) or blend > 1:
        raise _damaged(name, f"frame {len(index.frames)} is disposed of by rule {dispose} and blended by rule {blend}")
    # A first frame that is to be restored is to be cleared, says the specification; before it the canvas is empty, which is the same.
    return _Frame(box=box, duration=1000 * number / (scale or 100), dispose=_DISPOSE[dispose], replaces=blend == 0)


def _chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Kind, offset and length of each chunk that is whole; the file stands at its data."""
    end = file.seek(0, io.SEEK_END)
    position = len(SIGNATURE)
    while position + 12 <= end:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if position + 12 + length > end:
            return
        yield kind, position + 8, length
        position += 12 + length


def _small(file: IO[bytes], kind: bytes, length: int, name: str, *, least: int = 0) -> bytes:
    """The data of a chunk that is read at once, its checksum compared."""
    if not least <= length <= _MAX_SMALL:
        raise _damaged(name, f"a {kind.decode()} chunk has {length} bytes")
    data = file.read(length)
    if file.read(4) != struct.pack(">I", zlib.crc32(kind + data)):
        raise _damaged(name, f"the checksum of a {kind.decode()} chunk is wrong")
    return data


def _in_order(data: bytes, expected: int, name: str) -> None:
    (number,) = struct.unpack(">I", data[:4])
    if number != expected:
        raise _damaged(name, f"chunk {expected} of the animation is missing, {number} is in its place")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _damaged(name: str, how: str) -> ImageError:
    return ImageError(f"{name} is damaged or truncated: {how}")
