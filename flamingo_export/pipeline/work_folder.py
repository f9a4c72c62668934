"""Where a build works: its temporary sibling of the output, the lock and the journal, and the step that publishes it."""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from flamingo_export import files
from flamingo_export.bundle.manifest import MANIFEST_NAME, FileRecord
from flamingo_export.errors import BuildError
from flamingo_export.estimates import rounded_apart
from flamingo_export.files import Identified


class BuildPaths(msgspec.Struct, frozen=True):
    """The paths of a build: where it is published, and its temporary siblings."""

    out: Path

    def __post_init__(self) -> None:
        if not self.out.name or "\0" in str(self.out):
            raise BuildError(f"{str(self.out)!r} cannot be the name of a bundle. Choose another output path: --out NAME.bundle")
        if files.not_utf8(self.out):
            raise BuildError(f"the name {self.out} is not UTF-8, which ONNX Runtime cannot open. Choose another --out.")

    @property
    def work(self) -> Path:
        """Folder the bundle is put together in."""
        return self.out.with_name(f".{self.out.name}.building")

    @property
    def journal(self) -> Path:
        """What is finished of it."""
        return self.out.with_name(f".{self.out.name}.building.json")

    @property
    def calibration(self) -> Path:
        """Folder of a calibration that is part of the build, while it runs."""
        return self.out.with_name(f".{self.out.name}.calibrating")

    @property
    def lock(self) -> Path:
        """Held while a build runs."""
        return self.out.with_name(f".{self.out.name}.lock")

    @property
    def replaced(self) -> Path:
        """The bundle that was at `out`, where two folders cannot be exchanged in one step."""
        return self.out.with_name(f".{self.out.name}.replaced")

    def discard(self) -> None:
        """Removes all that an unfinished build has left."""
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.calibration, ignore_errors=True)


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A finished group of weights: its file, and the digests of the source's tensors it was made of."""

    file: FileRecord
    sources: dict[str, str]


class _Content(Identified, kw_only=True):
    inode: int
    """Of the work folder: after publishing, another folder may lie under its name."""
    groups: dict[str, Finished] = msgspec.field(default_factory=dict)


class Journal:
    """What a build has finished, kept beside its work folder so that a killed build resumes where it was."""

    def __init__(self, paths: BuildPaths, identity: str, *, resume: bool = True) -> None:
        """Goes on with the work folder if the journal there is of the same identity, else empties it.

        `discarded` tells whether the work of another build was thrown away.
        """
        self._paths, self._file = paths, _journal_file(paths)
        self.discarded = False
        earlier = self._file.read()
        fits = earlier is not None and resume and earlier.identity == identity and files.inode(paths.work) == earlier.inode
        if earlier is not None and fits:
            self._content = earlier
        else:
            self.discarded = earlier is not None and bool(earlier.groups) and paths.work.exists()
            paths.discard()
            paths.work.mkdir()
            self._content = _Content(identity=identity, inode=paths.work.stat().st_ino)
        self._tidy()
        self._file.save(self._content)

    @property
    def groups(self) -> dict[str, Finished]:
        """The finished groups."""
        return self._content.groups

    def add(self, group: str, record: Finished) -> None:
        """Records a finished group durably."""
        self._content.groups[group] = record
        self._file.save(self._content)

    def _tidy(self) -> None:
        """Leaves nothing in the work folder but the files of finished groups, and no group whose file is not there in full."""
        work = self._paths.work
        for group, record in list(self._content.groups.items()):
            path = work / record.file.path
            if not (path.is_file() and path.stat().st_size == record.file.size):
                del self._content.groups[group]
        kept = {work / record.file.path for record in self._content.groups.values()}
        for path in sorted(work.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # not empty: it holds files that are kept
                    path.rmdir()
            elif path not in kept:
                path.unlink()


def _journal_file(paths: BuildPaths) -> files.Journal[_Content]:
    return files.Journal(paths.journal, _Content)


@contextmanager
def exclusive(paths: BuildPaths) -> Iterator[None]:
    """Holds the lock of an output path. Raises BuildError if another build holds it, or the folder cannot be written."""

    def busy(holder: str) -> BuildError:
        return BuildError(f"another build to {paths.out} is running (process {holder}). Wait for it, or choose another --out.")

    def unwritable(error: OSError) -> BuildError:
        return BuildError(f"{paths.out.parent} cannot be written ({error.strerror}). Choose another --out.")

    with files.exclusive(paths.lock, busy=busy, unwritable=unwritable):
        yield


def recover(paths: BuildPaths) -> None:
    """Finishes what a build that was killed while publishing has left to do."""
    if paths.replaced.exists():
        if os.path.lexists(paths.out):
            shutil.rmtree(paths.replaced, ignore_errors=True)
        else:
            paths.replaced.rename(paths.out)
    journal = _journal_file(paths).read()
    if journal is not None and journal.inode != files.inode(paths.work):
        paths.discard()


def in_the_way(paths: BuildPaths, *, overwrite: bool) -> str | None:
    """What is at the output path and may not be replaced, as a message; None where nothing is. An empty folder is nothing."""
    if not os.path.lexists(paths.out):
        return None
    if paths.out.is_mount():
        return (
            f"{paths.out} is where a disk is mounted, which cannot be replaced. Choose a folder in it: "
            f"--out {shlex.quote(str(paths.out / 'NAME.bundle'))}"
        )
    if paths.out.is_dir() and not paths.out.is_symlink() and not any(paths.out.iterdir()):
        return None
    if paths.out.is_symlink() or not (paths.out / MANIFEST_NAME).is_file():
        return f"{paths.out} exists and is not a bundle; it will not be overwritten. Choose another --out, or remove it."
    return None if overwrite else f"{paths.out} exists. Choose another --out, or replace it with --overwrite."


def check_output(paths: BuildPaths, *, overwrite: bool) -> None:
    """Raises BuildError if something is at the output path and may not be replaced."""
    if message := in_the_way(paths, overwrite=overwrite):
        raise BuildError(message)


def check_disk(paths: BuildPaths, needed: int) -> None:
    """Raises BuildError if the output's disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(paths.out.parent).free
    if free < needed:
        wanted, there = rounded_apart(needed, free)
        raise BuildError(
            f"the build needs {wanted} on the disk of {paths.out.parent.resolve()}, which has {there} free. "
            "Free some, or choose an --out on another disk."
        )


def publish(paths: BuildPaths) -> None:
    """Makes the finished work folder the bundle at `out`. Readers see the old bundle or the new one, wherever the system can exchange
    two folders in one step; elsewhere the old one is set aside for a moment, and put back if the new one does not get there."""
    sync_tree(paths.work)
    if not os.path.lexists(paths.out):
        paths.work.rename(paths.out)
    elif not _exchange(paths.work, paths.out):
        paths.out.rename(paths.replaced)
        try:
            paths.work.rename(paths.out)
        except BaseException:
            paths.replaced.rename(paths.out)
            raise
        shutil.rmtree(paths.replaced, ignore_errors=True)
    _sync(paths.out.parent)
    paths.discard()


def sync_tree(folder: Path) -> None:
    """Brings names and contents of all files below `folder` to the disk."""
    for path in (folder, *folder.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system or the file system cannot (Linux 3.15 and the usual file systems can)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(exchange)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))
