"""What is carried from part to part, on the disk: hidden states of all samples, features and latents of all media, and the journal of it.

    WORK/journal.json      identity, finished parts, statistics found so far, digests of the weights read so far
    WORK/NAME.f32          the arrays of a stream one after the other, as little-endian fp32

A part reads streams and writes one; the journal names a part only once its stream is on the disk, and older streams go after that. Killed
at any moment, the folder is that of the last finished part. The vision encoder, which takes longest, resumes after the last medium, unless it
has statistics: those are kept part by part.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from flamingo_export import files
from flamingo_export.errors import CalibrationError
from flamingo_export.files import PART, Identified, Journal, sync
from flamingo_export.weights.calibration_table import Statistics
from flamingo_reference.arrays import Floats32

Shapes = Sequence[tuple[int, ...]]
JOURNAL, LOCK = "journal.json", "lock"


class Finished(Identified, kw_only=True):
    """Where a calibration stands. parts: how many are finished; items: of the part at work, where it resumes within; digests: of the
    source's tensors, by name."""

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

    def read(self, index: int) -> Floats32:
        """One of the arrays."""
        shape = self._shapes[index]
        numbers = np.fromfile(self.path, "<f4", math.prod(shape), offset=self._offsets[index])
        return numbers.astype(np.float32, copy=False).reshape(shape)

    @property
    def _unfinished(self) -> Path:
        return self.path.with_suffix(PART)

    def holds(self, items: int) -> bool:
        """Whether so many arrays of an interrupted `writing` are there."""
        return self._unfinished.is_file() and self._unfinished.stat().st_size >= self._offsets[items]

    @contextmanager
    def writing(self, kept: int = 0) -> Iterator[IO[bytes]]:
        """A file that takes the place of this stream's once all of it is on the disk; `append` appends to it.

        kept: arrays of an interrupted writing that it begins with.
        """
        with self._unfinished.open("r+b" if kept else "wb") as file:
            file.truncate(self._offsets[kept])
            file.seek(self._offsets[kept])
            yield file
            sync(file)
        self._unfinished.replace(self.path)


def append(file: IO[bytes], array: Floats32) -> None:
    """Appends the next array of a stream."""
    file.write(np.ascontiguousarray(array, "<f4").tobytes())


class Work:
    """A calibration's folder: streams and journal."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Goes on with the journal that is there if it is of the same identity, else empties the folder.

        `discarded` tells whether the work of another calibration was thrown away.
        """
        self.folder = folder
        self._file = Journal(folder / JOURNAL, Finished)
        earlier = self._file.read()
        self.discarded = earlier is not None and earlier.identity != identity
        if earlier is None or self.discarded:
            self.restart(identity)
        else:
            self.journal = earlier

    def restart(self, identity: str) -> None:
        """Begins anew."""
        self.keep(())
        self._file.remove()
        self.journal = Finished(identity=identity)

    def stream(self, name: str, shapes: Shapes) -> Stream:
        """The stream of this name."""
        return Stream(self.folder / f"{name}.f32", shapes)

    def save(self) -> None:
        """A crash leaves the old journal or the new one."""
        self._file.save(self.journal)

    def keep(self, streams: Sequence[Stream]) -> None:
        """Removes all streams but these, and what an interrupted write has left."""
        kept = {stream.path for stream in streams}
        for path in (*self.folder.glob("*.f32"), *self.folder.glob(f"*{PART}")):
            if path not in kept:
                path.unlink()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which the system lets go of when the process ends, however it ends.

    Raises CalibrationError if another calibration holds it, and in place of the error of a full disk, telling what is kept.
    """

    def busy(holder: str) -> CalibrationError:
        return CalibrationError(
            f"another calibration is at work in {folder} (process {holder}). Wait for it, or choose another output."
        )

    def unwritable(error: OSError) -> CalibrationError:
        return CalibrationError(f"{folder} cannot be written ({error.strerror}). Choose another output.")

    with files.exclusive(folder / LOCK, busy=busy, unwritable=unwritable), files.disk_errors(folder, CalibrationError):
        yield


def discard(folder: Path) -> None:
    """Removes a calibration's folder."""
    shutil.rmtree(folder, ignore_errors=True)
