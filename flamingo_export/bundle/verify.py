"""Files of a finished bundle: their digests, and opening a bundle only if they are what its manifest lists."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import msgspec

from flamingo_export.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest
from flamingo_export.errors import BundleError
from flamingo_export.files import not_utf8, write_atomically
from flamingo_export.machine import user_cache
from flamingo_export.progress import SILENT, Progress

_CHUNK = 1 << 22
_CACHE_SCHEMA = 1
_MOST = 2**20
_MOST_OF = {"image_size": 4096, "num_layers": 4096}
"""Far beyond any model: numbers of a configuration and limits."""
_READ_FOLDERS = ("weights", "tokenizer", "golden")


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
    user's cache folder, so read-only bundles open as well. Links are followed, as in Hugging Face's cache: a file is what the manifest
    says of it, wherever it lies. Raises BundleError naming every file that is missing, cut short, altered or named by a path that leaves
    the bundle, and if the manifest's values are invalid.
    """
    manifest = read_manifest(bundle)
    if not_utf8(bundle):
        raise BundleError(
            f"the name {bundle} is not UTF-8, which ONNX Runtime cannot open. Rename that folder, or go into it first."
        )
    check_manifest(bundle, manifest)
    verify(bundle, manifest, progress=progress)
    return manifest


def check_manifest(bundle: Path, manifest: Manifest) -> None:
    """Raises BundleError unless the manifest's values can be: graphs and weights that it lists with their digests, a sound configuration,
    limits that leave room."""
    listed = {record.path for record in manifest.files}
    faults = [
        f"graph {graph.name} is {graph.file!r}, expected a file that the manifest lists"
        for graph in manifest.graphs
        if graph.file not in listed
    ]
    faults += [f"{path} is not among the files that it lists" for path in _unlisted(bundle, listed)]
    if manifest.schema_version < 1:
        faults.append(f"schema_version is {manifest.schema_version}, expected at least 1")
    limits = manifest.limits
    for name, value in msgspec.structs.asdict(limits).items():
        if not 1 <= value <= _MOST:
            faults.append(f"limits.{name} is {value}, expected 1 to {_MOST}")
    if limits.chunk > limits.max_length:
        faults.append(f"limits.chunk is {limits.chunk}, more than max_length {limits.max_length}")
    layers = manifest.config.language_model.num_layers
    faults += [
        f"graph {graph.name} has the layers {list(graph.layers)}, expected some of the {layers}"
        for graph in manifest.graphs
        if graph.layers is not None and not 0 <= graph.layers[0] < graph.layers[1] <= layers
    ]
    faults += _beyond(msgspec.to_builtins(manifest.config), "config")
    try:
        manifest.config.validate()
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise BundleError(f"the manifest of {bundle} is invalid: {'; '.join(faults)}. Build the bundle again.")


def _beyond(value: object, name: str) -> Iterator[str]:
    """Numbers of a configuration that no model has: memory would be asked for by them before anything else is noticed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _beyond(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _beyond(inner, name)
    elif isinstance(value, int):
        most = _MOST_OF.get(name.rsplit(".", 1)[-1], _MOST)
        if value > most:
            yield f"{name} is {value}, expected at most {most}"


def _unlisted(bundle: Path, listed: set[str]) -> list[str]:
    """What the runtime or the graphs may read without its being named: weights, tokenizer, golden values."""
    found = (path for folder in _READ_FOLDERS for path in (bundle / folder).rglob("*") if not path.is_dir())
    return sorted({path.relative_to(bundle).as_posix() for path in found} - listed)


def verify(bundle: Path, manifest: Manifest, *, cache: Path | None = None, progress: Progress = SILENT) -> Verification:
    """Checks the files of a bundle against its manifest. cache: folder of notes, None takes the user's. Raises BundleError as above.

    Notes are best effort: where they cannot be kept, every file is read at each opening.
    """
    notes = _notes_file(bundle, cache)
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


def is_intact(bundle: Path, record: FileRecord) -> bool:
    """Whether a file of the bundle is as recorded. One that was verified and has not changed since is not read again."""
    found = _mark(bundle, record)
    if isinstance(found, str):
        return False
    known = _read_notes(_notes_file(bundle)).get(record.path) == found
    return known or file_record(bundle, bundle / record.path).sha256 == record.sha256


def _notes_file(bundle: Path, cache: Path | None = None) -> Path | None:
    folder = cache or cache_folder()
    return folder / f"{hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()}.json" if folder else None


def cache_folder() -> Path | None:
    """Where openings of bundles are noted; None where the user has no such place."""
    return user_cache("verified")


def _mark(bundle: Path, record: FileRecord) -> _Mark | str:
    """The file as it is now, or what is wrong with it."""
    pure = PurePosixPath(record.path)
    if (
        "\0" in record.path
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in record.path
        or not pure.parts
        or record.path == MANIFEST_NAME
    ):
        return f"{record.path!r} does not name a file of the bundle"
    path = bundle.joinpath(*pure.parts)
    try:
        stat = path.stat()
        if not path.is_file():
            return f"{record.path} is not a file"
    except OSError:
        if path.is_symlink():
            return f"{record.path} is a link to {os.readlink(path)}, which is not there"
        return f"{record.path} is missing"
    if stat.st_size != record.size:
        from flamingo_reference.checkpoints.files.failed_downloads import stand_in

        found = stand_in(path)
        why = "" if found is None else f", and is {found.removesuffix('.')}"
        return f"{record.path} has {stat.st_size} bytes, expected {record.size}{why}"
    return _Mark(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.sha256)


def _read_notes(path: Path | None) -> dict[str, _Mark]:
    if path is None:
        return {}
    with suppress(OSError, msgspec.MsgspecError):
        notes = msgspec.json.decode(path.read_bytes(), type=_Verified)
        if notes.schema == _CACHE_SCHEMA:
            return notes.files
    return {}


def _write_notes(path: Path | None, files: dict[str, _Mark]) -> None:
    """Best effort: where nothing can be noted, digests are computed at each opening."""
    if path is None:
        return
    with suppress(OSError):
        write_atomically(path, msgspec.json.encode(_Verified(files=files)))
