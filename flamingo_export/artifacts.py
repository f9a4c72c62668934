"""A bundle on disk: digests, the lock and journal of a build, publishing, verification."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import msgspec

from flamingo_export.errors import BuildError, BundleError
from flamingo_export.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest

_CHUNK = 1 << 20


def file_record(root: Path, path: Path) -> FileRecord:
    """Size and SHA-256 of a file below `root`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileRecord(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=digest.hexdigest())


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A finished group of weights: its file, and the digests of the source's tensors it was made of."""

    file: FileRecord
    sources: dict[str, str]


class _JournalFile(msgspec.Struct, kw_only=True):
    identity: str
    groups: dict[str, Finished] = msgspec.field(default_factory=dict)


class Journal:
    """What a build has finished, kept beside its work folder so that a killed build goes on where it was."""

    def __init__(self, path: Path, identity: str) -> None:
        """Begins anew unless the file at `path` is of the same identity; `resumed` tells."""
        self._path = path
        self._content = _JournalFile(identity=identity)
        self.resumed = False
        with suppress(OSError, msgspec.MsgspecError):
            earlier = msgspec.json.decode(path.read_bytes(), type=_JournalFile)
            if earlier.identity == identity:
                self._content, self.resumed = earlier, True

    def finished(self, group: str, work: Path) -> Finished | None:
        """The record of a group whose file is still there in full."""
        record = self._content.groups.get(group)
        if record is None:
            return None
        with suppress(OSError):
            if (work / record.file.path).stat().st_size == record.file.size:
                return record
        return None

    def add(self, group: str, record: Finished) -> None:
        """Records a finished group durably."""
        self._content.groups[group] = record
        self.save()

    def save(self) -> None:
        """Writes the journal so that a crash leaves the old or the new one."""
        temporary = self._path.with_name(self._path.name + ".part")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(self._content))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def remove(self) -> None:
        """Forgets everything."""
        self._path.unlink(missing_ok=True)


class WorkPlace(msgspec.Struct, frozen=True):
    """The paths of a build: where it is published, and its temporary siblings."""

    out: Path

    @property
    def work(self) -> Path:
        """Folder the bundle is put together in."""
        return self.out.with_name(f".{self.out.name}.building")

    @property
    def journal(self) -> Path:
        """What is finished of it."""
        return self.out.with_name(f".{self.out.name}.building.json")

    @property
    def lock(self) -> Path:
        """Held while a build runs."""
        return self.out.with_name(f".{self.out.name}.lock")

    @property
    def replaced(self) -> Path:
        """The bundle that was at `out`, for the moment of replacing it."""
        return self.out.with_name(f".{self.out.name}.replaced")


@contextmanager
def exclusive(place: WorkPlace) -> Iterator[None]:
    """Holds the lock of an output path. Raises BuildError if another build holds it, or the folder cannot be written."""
    try:
        place.out.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise BuildError(f"{place.out.parent} cannot be written ({error.strerror}). Choose another --out.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise BuildError(
                f"another build to {place.out} is running (process {holder}). Wait for it, or choose another --out."
            ) from None
        if not place.lock.exists() or os.fstat(handle).st_ino != place.lock.stat().st_ino:
            raise BuildError(f"another build to {place.out} has just ended. Run the command again.")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
        place.lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def check_output(place: WorkPlace, *, overwrite: bool) -> None:
    """Raises BuildError if something is at the output path and may not be replaced. Mends a replacement that was cut off."""
    if not place.out.exists() and place.replaced.exists():
        place.replaced.rename(place.out)
    if not os.path.lexists(place.out):
        return
    if not overwrite:
        raise BuildError(f"{place.out} exists. Choose another --out, or replace it with --force.")
    if not (place.out.is_dir() and (place.out / MANIFEST_NAME).is_file()):
        raise BuildError(f"{place.out} exists and is no bundle, so --force does not replace it. Choose another --out.")


def check_disk(folder: Path, needed: int) -> None:
    """Raises BuildError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"the build needs {needed / 1e9:.2f} GB more on the disk of {folder}, which has {free / 1e9:.2f} GB free. "
            "Free some, or choose an --out on another disk."
        )


def publish(place: WorkPlace) -> None:
    """Makes the finished work folder the bundle at `out`; what was there stays until the new one is in its place."""
    if place.out.exists():
        shutil.rmtree(place.replaced, ignore_errors=True)
        place.out.rename(place.replaced)
    place.work.rename(place.out)
    _sync_folder(place.out.parent)
    shutil.rmtree(place.replaced, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(place: WorkPlace) -> Iterator[None]:
    """Turns a full disk or a failed write into a BuildError that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise BuildError(
                f"writing {error.filename or place.work} failed: {error.strerror}. What is finished is kept in {place.work}; "
                "free some space and run the same command to go on, or remove that folder."
            ) from error
        raise


# Opening.


class _Verified(msgspec.Struct, kw_only=True):
    """Size, time and digest of files whose digests were right."""

    files: dict[str, tuple[int, int, str]] = msgspec.field(default_factory=dict)


def open_bundle(bundle: Path) -> Manifest:
    """The manifest of a bundle whose files are those it lists.

    A file's digest is computed at the first opening and whenever its size or time has changed; what was found right is noted in the
    user's cache folder. Raises BundleError naming every file that is missing, cut short, altered or outside of the bundle.
    """
    manifest = read_manifest(bundle)
    cache = _cache_path(bundle)
    known = _Verified()
    with suppress(OSError, msgspec.MsgspecError):
        known = msgspec.json.decode(cache.read_bytes(), type=_Verified)
    faults, seen = [], _Verified()
    for record in manifest.files:
        fault, mark = _verify(bundle, record, known.files.get(record.path))
        if fault:
            faults.append(fault)
        elif mark:
            seen.files[record.path] = mark
    if faults:
        raise BundleError(f"{bundle} is damaged: {'; '.join(faults)}. Build it again, or copy it again from where it came.")
    if seen.files != known.files:
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(msgspec.json.encode(seen))
            temporary.replace(cache)
    return manifest


def _verify(
    bundle: Path, record: FileRecord, known: tuple[int, int, str] | None
) -> tuple[str | None, tuple[int, int, str] | None]:
    pure = PurePosixPath(record.path)
    if pure.is_absolute() or ".." in pure.parts:
        return f"{record.path} points outside of the bundle", None
    path = bundle / record.path
    inside = [bundle.joinpath(*pure.parts[: count + 1]) for count in range(len(pure.parts))]
    if any(part.is_symlink() for part in inside):
        return f"{record.path} is a link, which a bundle must not hold", None
    try:
        stat = path.stat()
    except OSError:
        return f"{record.path} is missing", None
    if stat.st_size != record.size:
        return f"{record.path} has {stat.st_size} bytes, expected {record.size}", None
    mark = (stat.st_size, stat.st_mtime_ns, record.sha256)
    if known != mark and file_record(bundle, path).sha256 != record.sha256:
        return f"{record.path} was altered (its digest differs)", None
    return None, mark


def _cache_path(bundle: Path) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "flamingo-export" / "verified" / hashlib.sha256(str(bundle.resolve()).encode()).hexdigest()
