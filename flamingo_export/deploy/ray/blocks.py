"""A file of requests in blocks, each answered by some worker and kept as a file of its own: what a stopped run left is not done again.

results/run.json            which requests, bundle and settings the results are of
results/block-000007.jsonl  results of requests 7N .. 8N - 1, in their order; present means complete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo_export.errors import BackendError, InputError
from flamingo_export.files import replacing, write_atomically

PARQUET = ".parquet"
_ROWS = ".requests.jsonl"
"""A parquet file's rows, while they are answered."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Requests first .. first + count - 1 of a file, in its bytes start .. end - 1."""

    number: int
    first: int
    count: int
    start: int
    end: int

    def path(self, out: Path) -> Path:
        """Where its results are."""
        return out / f"block-{self.number:06d}.jsonl"

    def read(self, requests: Path) -> list[bytes]:
        """Its requests. Reads no other part of the file, so that many blocks do not cost more than the file is long.

        Raises InputError where the file is not the one that was cut.
        """
        with requests.open("rb") as file:
            file.seek(self.start)
            found = [line for line in file.read(self.end - self.start).split(b"\n") if line.strip()]
        if len(found) != self.count:
            raise InputError(f"{requests} has changed while it was answered. Start again with another --out.")
        return found


def cut(requests: Path, size: int) -> list[Block]:
    """The blocks of a file of JSON lines, `size` requests each but for the last; it is read once.

    Raises InputError for a file without requests, or one that cannot be read.
    """
    found: list[Block] = []
    first = count = start = place = 0
    try:
        with requests.open("rb") as file:
            for line in file:
                place += len(line)
                count += bool(line.strip())
                if count == size:
                    found.append(Block(number=len(found), first=first, count=count, start=start, end=place))
                    first, count, start = first + size, 0, place
    except OSError as error:
        raise InputError(f"the requests in {requests} cannot be read: {error.strerror}") from error
    if count:
        found.append(Block(number=len(found), first=first, count=count, start=start, end=place))
    if not found:
        raise InputError(f"{requests} has no requests")
    return found


def as_json_lines(requests: Path, out: Path) -> Path:
    """The file itself, or the rows of a parquet file as JSON lines in `out`: those can be read from any place, parquet's row groups cannot.

    What an earlier run has written there is taken as it is, so `claim` comes before. Raises as `rows` does.
    """
    if requests.suffix != PARQUET:
        return requests
    written = out / _ROWS
    if not written.exists():
        with replacing(written, locked=True) as file:
            for row in rows(requests):
                file.write(row + b"\n")
    return written


def finished(out: Path) -> None:
    """All results are there: removes what only the run needed."""
    (out / _ROWS).unlink(missing_ok=True)


def rows(requests: Path) -> Iterator[bytes]:
    """Rows of a parquet file as JSON, their nulls left out.

    Raises InputError for a file that cannot be read, BackendError where pyarrow is missing.
    """
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BackendError("parquet files are read by pyarrow: pip install '.[cpu,serve,ray]'") from error
    try:
        for batch in ParquetFile(requests).iter_batches(1024):
            for row in batch.to_pylist():
                yield json.dumps(_without_nulls(row), default=str).encode()
    except ArrowInvalid as error:
        raise InputError(f"{requests} is not a parquet file: {error}") from error
    except OSError as error:
        raise InputError(f"the requests in {requests} cannot be read: {error.strerror or error}") from error


def _without_nulls(value: Any) -> Any:
    """A parquet file has every column in every row; what is null was not said."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Makes the folder of results, or checks that those in it are of the same run. Raises InputError if they are not."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, expected a folder for the results")
    beside = out / "run.json"
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
    if there <= {beside.name}:  # no result yet
        out.mkdir(parents=True, exist_ok=True)
        finished(out)
        write_atomically(beside, json.dumps(identity, indent=2).encode() + b"\n")
        return
    try:
        known = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        known = None
    if known != identity:
        differs = [name for name in identity if not isinstance(known, dict) or known.get(name) != identity[name]]
        raise InputError(f"{out} holds results of another run ({', '.join(differs)} differ). Name another folder with --out.")


def identity_of(requests: Path, bundle_digest: str, size: int) -> dict[str, Any]:
    """What must be the same for blocks to go together. Raises InputError for a file that cannot be read."""
    digest = hashlib.sha256()
    try:
        with requests.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"the requests in {requests} cannot be read: {error.strerror}") from error
    return {"requests": digest.hexdigest(), "bundle": bundle_digest, "block": size}
