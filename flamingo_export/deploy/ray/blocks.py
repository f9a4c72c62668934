"""A file of requests in blocks, each answered by some worker and kept as a file of its own: what a stopped run left is not done again.

results/run.json            which requests, bundle and settings the results are of
results/block-000007.jsonl  results of lines 7N .. 8N - 1, in their order; present means complete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo_export.errors import BackendError, InputError
from flamingo_export.files import write_atomically

PARQUET = ".parquet"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Lines first .. first + count - 1 of a file."""

    number: int
    first: int
    count: int

    def path(self, out: Path) -> Path:
        """Where its results are."""
        return out / f"block-{self.number:06d}.jsonl"


def cut(requests: Path, size: int) -> list[Block]:
    """The blocks of a file, `size` lines each but for the last. Raises InputError for a file without requests."""
    total = sum(1 for _ in lines(requests))
    if not total:
        raise InputError(f"{requests} has no requests")
    return [
        Block(number=number, first=first, count=min(size, total - first)) for number, first in enumerate(range(0, total, size))
    ]


def lines(requests: Path) -> Iterator[bytes]:
    """Requests as JSON, one each: lines of a JSONL file that are not blank, or rows of a parquet file, their nulls left out.

    Raises InputError for a file that cannot be read, BackendError where pyarrow is missing.
    """
    try:
        if requests.suffix != PARQUET:
            with requests.open("rb") as file:
                yield from (line.rstrip(b"\n") for line in file if line.strip())
            return
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
        raise InputError(f"the requests in {requests} cannot be read: {error.strerror}") from error


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
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
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
    """What must be the same for blocks to go together."""
    digest = hashlib.sha256()
    with requests.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"requests": digest.hexdigest(), "bundle": bundle_digest, "block": size}
