"""An index on the disk: plain files that any safetensors reader opens.

    index.json                  bundle, what the features are, shards; `complete` once all are there
    items.jsonl                 an item a line, in the order of the rows
    features-00000.safetensors  `features` float32 [rows, E], each row of length 1

Shards are written one after the other, each whole or not at all, so an interrupted run resumes with the next one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flamingo_export.errors import EvaluationError, FlamingoExportError
from flamingo_export.evaluation.protocol import Features
from flamingo_export.files import disk_errors, exclusive, write_atomically
from flamingo_export.progress import SILENT, Progress

INDEX_FILE, ITEMS_FILE = "index.json", "items.jsonl"
SHARD_ROWS = 4096


class IndexedItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a row is of. Paths are relative to the index; None for media that were given in memory."""

    id: str
    image: str | None = None
    video: str | None = None
    clip: tuple[float, float] | None = None
    question: str | None = None
    answer: str = ""


class IndexRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`index.json`. items: digest of items.jsonl's items."""

    schema: int = 1
    bundle: str
    features: str
    items: str
    count: int
    width: int = 0
    shards: tuple[str, ...] = ()
    complete: bool = False


class Index:
    """A finished index, read shard by shard."""

    def __init__(self, folder: Path) -> None:
        """Raises EvaluationError if the folder holds no finished index."""
        self.folder, self.record = folder, read_record(folder)
        if not self.record.complete:
            raise EvaluationError(f"the index {folder} is not finished. Run the same index command again to finish it.")

    def items(self) -> list[IndexedItem]:
        """Of all rows. Raises EvaluationError if they are not those that the index was made of."""
        items = _read_items(self.folder)
        if len(items) != self.record.count:
            raise EvaluationError(
                f"{self.folder / ITEMS_FILE} has {len(items)} items, the index {self.record.count} rows. Make it again."
            )
        return items

    def blocks(self) -> Iterator[tuple[int, Features]]:
        """(first row, features float32 [rows, E]); one shard is in memory at a time."""
        first = 0
        for name in self.record.shards:
            if Path(name).name != name:
                raise EvaluationError(
                    f"{name!r} in {self.folder / INDEX_FILE} is not a file of the index. Make the index again."
                )
            values = _read_shard(self.folder / name, self.record.width)
            yield first, values
            first += len(values)
        if first != self.record.count:
            raise EvaluationError(
                f"the shards of {self.folder} hold {first} rows, expected {self.record.count}. Make the index again."
            )

    def check_bundle(self, digest: str, name: str) -> None:
        """Raises EvaluationError if the index is of another bundle: features of two encoders cannot be compared."""
        if self.record.bundle != digest:
            raise EvaluationError(
                f"the index {self.folder} was made by another bundle than {name} (digest {self.record.bundle[:12]}, expected {digest[:12]}). "
                f"Make it again: flamingo-export index {shlex.quote(name)} --data ... --out {shlex.quote(str(self.folder))} --overwrite"
            )


def build_index(
    folder: Path,
    items: Sequence[IndexedItem],
    encode: Callable[[Sequence[int]], Iterable[Features]],
    *,
    bundle: str,
    features: str,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Index:
    """Writes an index, or resumes one that was interrupted.

    encode: vectors [E] of the items at these positions, in order. bundle: its digest. features: what they are.
    Raises EvaluationError if the folder holds another index (unless it is to be overwritten) or something else.
    """
    lines = b"".join(msgspec.json.encode(item) + b"\n" for item in items)
    wanted = IndexRecord(bundle=bundle, features=features, items=_digest(lines), count=len(items))

    def busy(pid: str) -> FlamingoExportError:
        return EvaluationError(f"another process ({pid}) is writing the index {folder}")

    def unwritable(error: OSError) -> FlamingoExportError:
        return EvaluationError(f"{folder} cannot be written: {error.strerror}")

    with exclusive(folder / ".lock", busy=busy, unwritable=unwritable), disk_errors(folder, EvaluationError):
        record = _resumed(folder, wanted, overwrite)
        if record.complete:
            return Index(folder)
        write_atomically(folder / ITEMS_FILE, lines, locked=True)
        progress.stage("features", len(items))
        done = len(record.shards) * SHARD_ROWS
        progress.advance(done)
        while done < len(items):
            rows = range(done, min(done + SHARD_ROWS, len(items)))
            found = []
            for vector in encode(rows):
                found.append(_unit(vector))
                progress.advance(1)
            name = f"features-{len(record.shards):05d}.safetensors"
            _write_shard(folder / name, np.stack(found))
            record = msgspec.structs.replace(record, shards=(*record.shards, name), width=len(found[0]))
            _write_record(folder, record)
            done += SHARD_ROWS
        _write_record(folder, msgspec.structs.replace(record, complete=True))
    return Index(folder)


def read_record(folder: Path) -> IndexRecord:
    """`index.json`. Raises EvaluationError."""
    try:
        return msgspec.json.decode((folder / INDEX_FILE).read_bytes(), type=IndexRecord)
    except FileNotFoundError:
        raise EvaluationError(
            f"{folder} is not an index. Make one: flamingo-export index BUNDLE --data train.jsonl --out {shlex.quote(str(folder))}"
        ) from None
    except (msgspec.MsgspecError, OSError) as error:
        raise EvaluationError(f"{folder / INDEX_FILE} cannot be read as an index ({error}). Make it again.") from None


def _resumed(folder: Path, wanted: IndexRecord, overwrite: bool) -> IndexRecord:
    """The record to resume from."""
    if not (folder / INDEX_FILE).exists():
        if foreign := [
            path.name for path in folder.iterdir() if path.name not in (".lock", ITEMS_FILE) and not path.name.startswith(".")
        ]:
            raise EvaluationError(f"{folder} holds {foreign[0]}, so it is not an index. Give another --out.")
        return wanted
    found = read_record(folder)
    fresh = msgspec.structs.replace(found, shards=(), width=0, complete=False)
    if fresh == wanted:
        whole = [name for name in found.shards if (folder / name).is_file()]
        return found if len(whole) == len(found.shards) else msgspec.structs.replace(found, shards=(), complete=False)
    if not overwrite:
        differing = [name for name in ("bundle", "features", "items", "count") if getattr(found, name) != getattr(wanted, name)]
        raise EvaluationError(
            f"{folder} is an index of something else ({', '.join(differing)} differ). Give another --out, or --overwrite it."
        )
    (folder / INDEX_FILE).unlink()
    for name in found.shards:
        (folder / Path(name).name).unlink(missing_ok=True)
    return wanted


def _write_record(folder: Path, record: IndexRecord) -> None:
    write_atomically(folder / INDEX_FILE, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n", locked=True)


def _write_shard(path: Path, values: Features) -> None:
    from safetensors.numpy import save

    write_atomically(path, save({"features": np.ascontiguousarray(values)}), locked=True)


def _read_shard(path: Path, width: int) -> Features:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        values: Any = load_file(path)["features"]
    except (SafetensorError, KeyError, OSError) as error:
        raise EvaluationError(f"{path} cannot be read as features ({error}). Make the index again.") from None
    if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != width:
        raise EvaluationError(
            f"{path} holds {values.dtype} {list(values.shape)}, expected float32 [rows, {width}]. Make the index again."
        )
    found: Features = values
    return found


def _read_items(folder: Path) -> list[IndexedItem]:
    path = folder / ITEMS_FILE
    try:
        return [msgspec.json.decode(line, type=IndexedItem) for line in path.read_bytes().splitlines() if line]
    except (msgspec.MsgspecError, OSError) as error:
        raise EvaluationError(f"{path} cannot be read as an index's items ({error}). Make the index again.") from None


def _unit(vector: Features) -> Features:
    length = float(np.linalg.norm(vector))
    return vector.astype(np.float32) / np.float32(length or 1.0)


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
