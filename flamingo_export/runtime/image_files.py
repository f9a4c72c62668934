"""Where encoded images come from: files, pipes, bytes and open file objects, each as a seekable binary file."""

from __future__ import annotations

import ctypes
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Protocol, TypeGuard

from PIL import Image, UnidentifiedImageError

from flamingo_export.errors import ImageError

FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""What is decoded. Not all that Pillow knows: its EPS reader starts another program, and rare formats are where the holes are."""
MAX_STREAM_BYTES = 512 * 2**20
"""A pipe or file object may have no end. This is more than the largest image that is decoded has without compression."""
_CHUNK = 2**20
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_URL_IN_A_FOLDER = re.compile(r".*?/(https?|ftp|s3|gs|hf|file):/+(.*)", re.DOTALL)
"""What becomes of one that is joined to the folder of the file that names it."""


class Readable(Protocol):
    """A file object that is open for reading bytes."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none at the end."""
        ...


EncodedSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Readable
"""A path, the bytes of a file, or a file object."""


UNNAMED = "the image given"
"""What messages call an image that has no name: bytes, an object in memory, a request's."""


def is_encoded(source: object) -> TypeGuard[EncodedSource]:
    """Whether `source` is of a kind that open_source takes."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read")


def name_of(source: EncodedSource) -> str:
    """What messages call it."""
    if isinstance(source, str | os.PathLike):
        return as_url(source) or os.fspath(source)
    name = getattr(source, "name", None)
    if name == "<stdin>":
        return "standard input"
    return name if isinstance(name, str) and name else UNNAMED


def as_url(source: str | os.PathLike[str]) -> str | None:
    """The URL that a path which does not exist was meant as, or None. `Path` drops one of its slashes, which is put back."""
    text = os.fspath(source)
    if isinstance(text, str) and text.lower().startswith("data:") and not os.path.lexists(text):
        return text if len(text) <= 40 else text[:40] + "..."
    found = (_URL.fullmatch(text) or _URL_IN_A_FOLDER.fullmatch(text)) if isinstance(text, str) else None
    if found is None or os.path.lexists(text):
        return None
    scheme, rest = found.groups()
    return f"{scheme}:///{rest}" if scheme.lower() == "file" else f"{scheme}://{rest}"


def refuse_url(source: str | os.PathLike[str]) -> None:
    """Raises ImageError if it is a URL: nothing is fetched on a user's behalf."""
    if url := as_url(source):
        kind, way = "a URL", "Download the file first and give its path."
        if url.startswith("data:"):
            kind, way = "a data URL", "Decode it first; images=[...] and Video(source=...) take the bytes."
        elif url.lower().startswith("file:"):
            way = "Give the path itself."
        raise ImageError(f"{url} is {kind}, and URLs are not fetched. {way}")


@contextmanager
def open_source(source: EncodedSource) -> Iterator[IO[bytes]]:
    """The encoded image as a seekable binary file, for the length of a `with` block.

    What a pipe or file object holds is read whole first; a file object that can seek is put back to where it stood.
    Raises ImageError if it cannot be read, is a folder, a device or a URL, or is empty.
    """
    name = name_of(source)
    with translated(name):
        file = _opened(source, name)
    with file:
        yield file


def _opened(source: EncodedSource, name: str) -> IO[bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        return _held(bytes(source), name)
    if not isinstance(source, str | os.PathLike):
        try:
            return _held(_everything(source, name), name)
        except (OSError, ValueError) as error:  # closed, or of a broken connection
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{name} cannot be read: {error}") from error
    refuse_url(source)
    path = Path(source)
    if os.path.isdir(path):  # unlike path.is_dir() it raises nothing, whatever the name
        raise ImageError(f"{name} is a folder. To use its images as the frames of a video, pass it as a video: --video {name}")
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # it might have no end, or never begin
            raise ImageError(f"{name} is a device, expected a file or a pipe. Write the image into one first.")
        file = path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except PermissionError:
        raise ImageError(f"{name} cannot be read: permission denied") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error
    if stat.S_ISREG(mode):
        return file
    with file:
        return _held(_everything(file, name), name)


def _everything(file: Readable, name: str) -> bytes:
    """The rest of a file object, which is put back to where it stood if it can be, so that a request can be run twice."""
    start = file.tell() if isinstance(file, io.IOBase) and file.seekable() else None
    pieces: list[bytes] = []
    total = 0
    while piece := file.read(_CHUNK):
        if not isinstance(piece, bytes | bytearray):
            kind = "text" if isinstance(piece, str) else type(piece).__name__
            raise ImageError(f"{name} gives {kind} when it is read, expected bytes. Open the file with mode 'rb'.")
        pieces.append(bytes(piece))
        total += len(piece)
        if total > MAX_STREAM_BYTES:
            raise ImageError(f"{name} has more than {MAX_STREAM_BYTES >> 20} MiB, more than an image that is decoded can have.")
    if start is not None and isinstance(file, io.IOBase):
        file.seek(start)
    return b"".join(pieces)


def _held(data: bytes, name: str) -> IO[bytes]:
    if not data:
        raise ImageError(f"{name} is empty: it has no bytes")
    return io.BytesIO(data)


def opened_by_pillow(file: IO[bytes]) -> Image.Image:
    """The image of an encoded file, nothing of it decoded. Raises Pillow's errors."""
    Image.init()  # a format is known by name only once its plugin is loaded
    image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    if image.format == "TIFF":
        _quiet_libtiff()
    return image


@cache
def _quiet_libtiff() -> None:
    """libtiff, which Pillow decodes compressed TIFFs with, prints what it finds wrong on the process's stderr. Its own switch for that is
    found through Pillow's extension; where it is built in otherwise, it goes on printing."""
    with suppress(ImportError, OSError, AttributeError):
        ctypes.CDLL(str(import_module("PIL._imaging").__file__)).TIFFSetErrorHandler(None)


def is_image(file: IO[bytes]) -> bool:
    """Whether a file is of a format that is read as an image, by its content; True also for a damaged one, which decoding refuses."""
    start = file.read(12)
    file.seek(0)
    # Pillow does not recognise these where they are damaged.
    if (
        start.startswith((b"GIF8", b"\x89PNG", b"\xff\xd8\xff"))
        or start[8:] == b"WEBP"
        or start[4:] in (b"ftypavif", b"ftypavis")
    ):
        return True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")
            opened_by_pillow(file)
    except UnidentifiedImageError:
        return False
    except Exception:
        return True
    finally:
        file.seek(0)
    return True


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Pillow reports damaged files with whatever exception its decoder met; all of them become one ImageError.

    Its warnings (a damaged EXIF block, tags cut short) are dropped: an image is used as far as a viewer shows it, or refused.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")
            yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(f"{name} is not an image that can be read (known: {known})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is refused: {error}. Scale it down first.") from None
    except Exception as error:
        raise ImageError(f"{name} is damaged or truncated: {str(error) or type(error).__name__}") from error
