"""Files that readers and crashes see whole or not at all, locks that end with their process, and one text for a full disk."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Generic, TypeVar

import msgspec

from flamingo_export.errors import FlamingoExportError

PART = ".part"
"""What the name of a file ends with while it is being written."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def sync(file: IO[bytes]) -> None:
    """Brings what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def replacing(path: Path, *, locked: bool = False, buffering: int = -1) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and is removed when it does not.

    Readers see the old file or the new one, and so does whoever comes after a crash. locked: nobody else writes to `path`, so the file
    has one name until it is whole, and what a killed process left of it is written over. buffering: as `open` takes it.
    """
    temporary = path.with_name(f".{path.name}{'' if locked else '.' + secrets.token_hex(4)}{PART}")
    try:
        with temporary.open("wb" if locked else "xb", buffering) as file:
            yield file
            sync(file)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path)  # the name that a user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, *, locked: bool = False) -> None:
    """Writes a file as `replacing` does; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, locked=locked) as file:
        file.write(data)


@contextmanager
def exclusive(path: Path, *, busy: Callable[[str], Exception], unwritable: Callable[[OSError], Exception]) -> Iterator[None]:
    """Holds the lock file `path`, whose folder is made, and removes it at the end. The system lets go of it when the process ends.

    busy: the error where another process holds it, made of that process's number. unwritable: the error where the lock cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(path, busy)
    except OSError as error:
        raise unwritable(error) from error
    try:
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:  # a full disk takes the name, and not what is written
            raise unwritable(error) from error
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path, busy: Callable[[str], Exception]) -> int:
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise busy(holder) from None
        except OSError:
            os.close(handle)
            raise
        if inode(path) == os.fstat(handle).st_ino:
            return handle
        os.close(handle)  # whoever held it removed the file in between


def not_utf8(path: Path) -> bool:
    """Whether a path is not UTF-8. Python and the system take it, ONNX Runtime and tokenizers take no such names."""
    return any("\ud800" <= letter <= "\udfff" for letter in str(path))


def inode(path: Path) -> int | None:
    """The number that tells a file or folder from another of the same name; None where there is none."""
    try:
        return path.lstat().st_ino
    except OSError:
        return None


@contextmanager
def disk_errors(work: Path, error_class: type[FlamingoExportError]) -> Iterator[None]:
    """Turns a full disk or a failed write into an error that says what is kept in `work`, a folder or a file."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise error_class(
            f"writing {error.filename or work} failed: {error.strerror}. The parts that are finished are kept in {work}. "
            f"Free some space and run the same command to resume, or remove that {'file' if work.is_file() else 'folder'}."
        ) from error


class Identified(msgspec.Struct, kw_only=True):
    """What a journal holds; `identity` is a digest of all that finished work depends on."""

    identity: str


Content = TypeVar("Content", bound=Identified)


class Journal(Generic[Content]):
    """What is finished of a piece of work, in a JSON file. A crash leaves the old content or the new one. Whoever saves holds a lock."""

    def __init__(self, path: Path, content: type[Content]) -> None:
        self.path, self._content = path, content

    def read(self) -> Content | None:
        """What was saved last; None where there is nothing, or nothing that can be read."""
        with suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(self.path.read_bytes(), type=self._content)
        return None

    def save(self, content: Content) -> None:
        """Replaces what was saved."""
        write_atomically(self.path, msgspec.json.encode(content), locked=True)

    def remove(self) -> None:
        """Forgets everything."""
        self.path.unlink(missing_ok=True)
