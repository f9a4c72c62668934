"""What is carried from part to part, on the disk: hidden states of all samples, features and latents of all media, and the journal of it.

    WORK/journal.json      identity, finished parts, statistics found so far, digests of the weights read so far
    WORK/NAME.f32          the arrays of a stream one after the other, as little-endian fp32

A part reads streams and writes one; the journal names a part only once its stream is on the disk, and older streams go after that. Killed
at any moment, the folder is that of the last finished part. The vision encoder, which takes longest, goes on after the last medium, unless it
has statistics: those are kept part by part.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.errors import CalibrationError
from flamingo_export.weights.calibration_table import Statistics

Array = npt.NDArray[np.float32]
Shapes = Sequence[tuple[int, ...]]
JOURNAL, LOCK = "journal.json", "lock"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class Journal(msgspec.Struct, kw_only=True):
    """Where a calibration stands. parts: how many are finished; items: of the part at work, where it goes on within; digests: of the
    source's tensors, by name."""

    identity: str
    parts: int = 0
    items: int = 0
    statistics: dict[str, Statistics] = msgspec.field(default_factory=dict)
    digests: dict[str, str] = msgspec.field(default_factory=dict)


class Stream:
    """Arrays of known shapes, one after the other in a file."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        self.path, self._shapes = path, shapes
        self._offsets = np.cumsum([0, *(4 * math.prod(shape) for shape in shapes)]).tolist()

    @property
    def complete(self) -> bool:
        """Whether the file is there in full."""
        return self.path.is_file() and self.path.stat().st_size == self._offsets[-1]

    def read(self, index: int) -> Array:
        """One of the arrays."""
        shape = self._shapes[index]
        numbers = np.fromfile(self.path, "<f4", math.prod(shape), offset=self._offsets[index])
        return numbers.astype(np.float32, copy=False).reshape(shape)

    @property
    def _unfinished(self) -> Path:
        return self.path.with_suffix(".part")

    def holds(self, items: int) -> bool:
        """Whether so many arrays of an interrupted `writing` are there."""
        return self._unfinished.is_file() and self._unfinished.stat().st_size >= self._offsets[items]

    @contextmanager
    def writing(self, kept: int = 0) -> Iterator[IO[bytes]]:
        """A file that takes the place of this stream's once all of it is on the disk; `put` appends to it.

        kept: arrays of an interrupted writing that it begins with.
        """
        with self._unfinished.open("r+b" if kept else "wb") as file:
            file.truncate(self._offsets[kept])
            file.seek(self._offsets[kept])
            yield file
            settle(file)
        self._unfinished.replace(self.path)


def put(file: IO[bytes], array: Array) -> None:
    """Appends the next array of a stream."""
    file.write(np.ascontiguousarray(array, "<f4").tobytes())


def settle(file: IO[bytes]) -> None:
    """Brings what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


class Work:
    """A calibration's folder: streams and journal."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Goes on with the journal that is there if it is of the same identity, else empties the folder.

        `discarded` tells whether the work of another calibration was thrown away.
        """
        self.folder = folder
        earlier = None
        with suppress(OSError, msgspec.MsgspecError):
            earlier = msgspec.json.decode((folder / JOURNAL).read_bytes(), type=Journal)
        self.discarded = earlier is not None and earlier.identity != identity
        if earlier is None or self.discarded:
            self.restart(identity)
        else:
            self.journal = earlier

    def restart(self, identity: str) -> None:
        """Begins anew."""
        self.keep(())
        (self.folder / JOURNAL).unlink(missing_ok=True)
        self.journal = Journal(identity=identity)

    def stream(self, name: str, shapes: Shapes) -> Stream:
        """The stream of this name."""
        return Stream(self.folder / f"{name}.f32", shapes)

    def save(self) -> None:
        """A crash leaves the old journal or the new one."""
        temporary = self.folder / f"{JOURNAL}.part"
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(self.journal))
            settle(file)
        temporary.replace(self.folder / JOURNAL)

    def keep(self, streams: Sequence[Stream]) -> None:
        """Removes all streams but these, and what an interrupted write has left."""
        kept = {stream.path for stream in streams}
        for path in (*self.folder.glob("*.f32"), *self.folder.glob("*.part")):
            if path not in kept:
                path.unlink()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which the system lets go of when the process ends, however it ends.

    Raises CalibrationError if another calibration holds it, and in place of the error of a full disk, telling what is kept.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CalibrationError(f"{folder} cannot be written ({error.strerror}). Choose another output.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CalibrationError(f"another calibration is at work in {folder}. Wait for it, or choose another output.") from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise CalibrationError(
            f"writing {error.filename or folder} failed: {error.strerror}. The parts that are finished are kept in {folder}. "
            "Free some space and run the same command to go on, or remove that folder."
        ) from error
    finally:
        os.close(handle)


def discard(folder: Path) -> None:
    """Removes a calibration's folder."""
    shutil.rmtree(folder, ignore_errors=True)
