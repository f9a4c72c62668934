"""Files of a finished bundle: their digests, and opening a bundle only if they are what its manifest lists."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

import msgspec

from flamingo_export.errors import BundleError
from flamingo_export.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from flamingo_export.progress import SILENT, Progress

_CHUNK = 1 << 22
_CACHE_SCHEMA = 1


def file_record(root: Path, path: Path, progress: Progress = SILENT) -> FileRecord:
    """Size and SHA-256 of a file below `root`."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            progress.advance(len(chunk))
    return FileRecord(path=path.relative_to(root).as_posix(), size=size, sha256=digest.hexdigest())


class _Mark(msgspec.Struct, frozen=True, array_like=True):
    """A file as it was when its digest was found right. The inode's change time cannot be set back, so a copy never passes for it."""

    size: int
    modified: int
    changed: int
    inode: int
    sha256: str


class _Verified(msgspec.Struct, kw_only=True):
    schema: int = _CACHE_SCHEMA
    files: dict[str, _Mark] = msgspec.field(default_factory=dict)


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """Files whose digests were computed now, and files known from an earlier opening and unchanged since."""

    computed: tuple[str, ...]
    known: tuple[str, ...]


def open_bundle(bundle: Path, *, progress: Progress = SILENT) -> Manifest:
    """The manifest of a bundle whose files are those it lists.

    A file's digest is computed at the first opening and whenever its size or time has changed; what was found right is noted in the
    user's cache folder, so read-only bundles open as well. Raises BundleError naming every file that is missing, cut short, altered,
    a link or outside of the bundle.
    """
    manifest = read_manifest(bundle)
    verify(bundle, manifest, progress=progress)
    return manifest


def verify(bundle: Path, manifest: Manifest, *, cache: Path | None = None, progress: Progress = SILENT) -> Verification:
    """Checks the files of a bundle against its manifest. cache: folder of notes, None takes the user's. Raises BundleError as above."""
    notes = (cache or cache_folder()) / f"{hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()}.json"
    earlier = _read_notes(notes)
    faults: list[str] = []
    verified: dict[str, _Mark] = {}
    unknown: list[FileRecord] = []
    for record in manifest.files:
        found = _mark(bundle, record)
        if isinstance(found, str):
            faults.append(found)
        elif earlier.get(record.path) == found:
            verified[record.path] = found
        else:
            unknown.append(record)
    known = tuple(verified)
    if not faults and unknown:
        progress.stage("verifying the bundle", sum(record.size for record in unknown), "bytes")
    for record in unknown:
        found = _mark(bundle, record)
        try:
            digest = file_record(bundle, bundle / record.path, progress).sha256
        except OSError as error:
            faults.append(f"{record.path} cannot be read ({error.strerror})")
            continue
        if digest != record.sha256:
            faults.append(f"{record.path} was altered (its digest differs)")
        elif not isinstance(found, str):
            verified[record.path] = found
    if unknown or verified != earlier:
        _write_notes(notes, verified)
    if faults:
        raise BundleError(f"{bundle} is damaged: {'; '.join(faults)}. Build it again, or copy it again from where it came.")
    return Verification(computed=tuple(record.path for record in unknown), known=known)


def cache_folder() -> Path:
    """Where openings of bundles are noted."""
    return Path.home() / ".cache" / "flamingo-export" / "verified"


def _mark(bundle: Path, record: FileRecord) -> _Mark | str:
    """The file as it is now, or what is wrong with it."""
    pure = PurePosixPath(record.path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in record.path or not pure.parts or record.path == MANIFEST_NAME:
        return f"{record.path!r} does not name a file of the bundle"
    path = bundle.joinpath(*pure.parts)
    inside = [bundle.joinpath(*pure.parts[: count + 1]) for count in range(len(pure.parts))]
    try:
        if any(part.is_symlink() for part in inside):
            return f"{record.path} is a link, which a bundle must not hold"
        stat = path.stat()
        if not path.is_file():
            return f"{record.path} is no file"
    except OSError:
        return f"{record.path} is missing"
    if stat.st_size != record.size:
        return f"{record.path} has {stat.st_size} bytes, expected {record.size}"
    return _Mark(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.sha256)


def _read_notes(path: Path) -> dict[str, _Mark]:
    with suppress(OSError, msgspec.MsgspecError):
        notes = msgspec.json.decode(path.read_bytes(), type=_Verified)
        if notes.schema == _CACHE_SCHEMA:
            return notes.files
    return {}


def _write_notes(path: Path, files: dict[str, _Mark]) -> None:
    """Best effort: where nothing can be noted, digests are computed at each opening."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(msgspec.json.encode(_Verified(files=files)))
        temporary.replace(path)
