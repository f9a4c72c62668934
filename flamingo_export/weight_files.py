"""Writes a bundle's weights group by group, in memory that does not grow with the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.artifacts import Finished, Journal
from flamingo_export.errors import CheckpointError
from flamingo_export.manifest import FileRecord
from flamingo_export.precision import Precision, StorageType
from flamingo_export.progress import Progress
from flamingo_export.sources import WeightSource, tensor_digest
from flamingo_export.weights import STORAGE_DTYPES, Weight, group_file, groups, layout

Array = npt.NDArray[Any]

# Tensors made while the one before is hashed and written: bounded, as the largest of an 80B model take a gigabyte each.
AHEAD_BYTES = 600_000_000


class _Made(msgspec.Struct, frozen=True):
    """A tensor in its storage type, and the digests of what it was made of."""

    array: Array
    sources: dict[str, str]
    bad: tuple[str, ...]
    overflow: str | None


def write_weights(
    source: WeightSource, weights: Sequence[Weight], precision: Precision, work: Path, journal: Journal, progress: Progress
) -> tuple[list[FileRecord], dict[str, str]]:
    """Writes every group that the journal does not hold yet; returns the files' records and the digest of each source tensor.

    Raises CheckpointError naming the tensors of a group that hold NaN or infinity, or overflow the storage type.
    """
    records: list[FileRecord] = []
    digests: dict[str, str] = {}
    grouped = groups(weights)
    progress.stage("weights", sum(_size(weight, precision) for weight in weights))
    for group, members in grouped.items():
        finished = journal.finished(group, work)
        if finished is None:
            finished = _write_group(source, group, members, precision, work, progress)
            journal.add(group, finished)
        else:
            progress.advance(sum(_size(weight, precision) for weight in members))
        records.append(finished.file)
        digests |= finished.sources
    return records, digests


def _size(weight: Weight, precision: Precision) -> int:
    return int(np.prod(weight.shape, dtype=np.int64)) * np.dtype(STORAGE_DTYPES[weight.storage(precision)]).itemsize


def _write_group(
    source: WeightSource, group: str, members: Sequence[Weight], precision: Precision, work: Path, progress: Progress
) -> Finished:
    header, _ = layout(members, precision)
    path = work / group_file(group)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    digest = hashlib.sha256(header)
    sources: dict[str, str] = {}
    bad: list[str] = []
    overflows: list[str] = []
    with temporary.open("wb") as file:
        file.write(header)
        for weight, made in _made_ahead(source, members, precision):
            bad += made.bad
            overflows += [made.overflow] if made.overflow else []
            sources |= made.sources
            data = memoryview(made.array.reshape(-1).view(np.uint8))
            digest.update(data)
            file.write(data)
            progress.advance(_size(weight, precision))
        if bad:
            raise CheckpointError(
                f"tensors with NaN or infinite numbers: {', '.join(sorted(set(bad)))}. The checkpoint cannot be used."
            )
        if overflows:
            raise CheckpointError(
                f"tensors with numbers beyond {precision.storage}'s range: {', '.join(overflows)}. Build with --precision bf16 or fp32."
            )
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    temporary.replace(path)
    return Finished(file=FileRecord(path=group_file(group), size=size, sha256=digest.hexdigest()), sources=sources)


def _made_ahead(source: WeightSource, members: Sequence[Weight], precision: Precision) -> Iterator[tuple[Weight, _Made]]:
    """Each weight with its tensor, one being made in another thread while the caller writes the one before."""

    def maker(weight: Weight) -> Callable[[], _Made]:
        return lambda: _make(source, weight, weight.storage(precision))

    with ThreadPoolExecutor(1) as pool:
        ahead: Future[_Made] | None = None
        for place, weight in enumerate(members):
            made = ahead.result() if ahead is not None else maker(weight)()
            following = members[place + 1] if place + 1 < len(members) else None
            small = following is not None and _size(following, precision) <= AHEAD_BYTES
            ahead = pool.submit(maker(following)) if following is not None and small else None
            yield weight, made


def _make(source: WeightSource, weight: Weight, storage: StorageType) -> _Made:
    dtype = np.dtype(STORAGE_DTYPES[storage])
    inputs: list[Array] = []
    digests: dict[str, str] = {}
    bad: list[str] = []
    for name in weight.sources:
        array = source.read(name)
        digests[name] = tensor_digest(array)
        if not _finite(array):
            bad.append(name)
        inputs.append(_cast(array, dtype) if weight.moves_only else array)
    if bad:
        return _Made(np.zeros(weight.shape, dtype), digests, tuple(bad), None)
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(_cast(weight.make(inputs), dtype).reshape(weight.shape))
    return _Made(made, digests, (), None if _finite(made) else weight.name)


def _cast(array: Array, dtype: np.dtype[Any]) -> Array:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _finite(array: Array) -> bool:
    """Whether all numbers are finite, without a temporary as large as the array: minimum and maximum carry NaN along."""
    if array.size == 0:
        return True
    return bool(np.isfinite(np.float64(array.min())) and np.isfinite(np.float64(array.max())))
