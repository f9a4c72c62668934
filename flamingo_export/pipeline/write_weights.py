"""Writes a bundle's weights group by group, in memory that does not grow with the model.

Two groups at a time, each in its own thread from first tensor to last: drawing, casting, hashing and writing all let go of the
interpreter's lock, and a file's digest cannot be shared out. The calling thread keeps the journal and tells of progress.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flamingo_export.bundle.manifest import FileRecord
from flamingo_export.errors import CheckpointError
from flamingo_export.files import replacing
from flamingo_export.pipeline.work_folder import Finished, Journal
from flamingo_export.precision import E4M3_LARGEST, Precision, Quantisation
from flamingo_export.progress import Progress
from flamingo_export.quantize.matrices import quantised, range_scale
from flamingo_export.sources.base import WeightSource, tensor_digest
from flamingo_export.weights import STORAGE_DTYPES, Weight, group_file, groups, layout, stored_bytes
from flamingo_reference.arrays import Array

if TYPE_CHECKING:
    from flamingo_export.weights.calibration_table import CalibrationTable

THREADS = 2
# Tensors of more numbers than this are made one at a time, however many threads there are.
LARGE = 100_000_000
# Bytes hashed and written at a time: still in the cache when the second of the two reads them.
_CHUNK = 1 << 20
# Numbers looked at at a time when the largest is searched.
_BLOCK = 1 << 17


class _Done(msgspec.Struct, frozen=True):
    group: str
    record: Finished | None


class _Abandoned(Exception):
    """A group that is not written: another one failed, or holds what cannot be stored."""


class _Made(msgspec.Struct, frozen=True):
    """A tensor as it is stored (codes and scales, where it is quantised), or what forbids storing it."""

    pieces: tuple[Array, ...]
    sources: dict[str, str]
    bad: tuple[str, ...] = ()
    overflow: str | None = None


def write_weights(
    source: WeightSource,
    weights: Sequence[Weight],
    precision: Precision,
    work: Path,
    journal: Journal,
    progress: Progress,
    *,
    calibration: CalibrationTable | None = None,
) -> tuple[list[FileRecord], dict[str, str]]:
    """Writes every group that the journal does not hold yet; returns the files' records in order and the digest of each source tensor.

    calibration: ranges of what matrices are multiplied with, for those that a policy quantises; without it each range is taken for
    E4M3's own and all input channels for equally important.
    Raises CheckpointError naming all tensors that hold NaN or infinity, or overflow the storage type; OSError if the disk is full.
    """
    grouped = groups(weights)
    progress.stage("weights", sum(stored_bytes(weight, precision) for weight in weights), "bytes")
    for group in grouped:
        if group in journal.groups:
            progress.advance(sum(stored_bytes(weight, precision) for weight in grouped[group]))
    _Stream(source, precision, work, calibration).run(
        {group: members for group, members in grouped.items() if group not in journal.groups}, journal, progress
    )
    digests: dict[str, str] = {}
    for group in grouped:
        digests |= journal.groups[group].sources
    return [journal.groups[group].file for group in grouped], digests


class _Stream:
    def __init__(self, source: WeightSource, precision: Precision, work: Path, calibration: CalibrationTable | None) -> None:
        self._source, self._precision, self._work, self._calibration = source, precision, work, calibration
        self._events: SimpleQueue[int | _Done | BaseException] = SimpleQueue()
        self._stop = threading.Event()
        self._large = threading.Lock()
        self._bad: set[str] = set()
        self._overflows: list[str] = []

    def run(self, grouped: Mapping[str, Sequence[Weight]], journal: Journal, progress: Progress) -> None:
        """All groups; when it ends, however it ends, no thread is left."""
        (self._work / "weights").mkdir(exist_ok=True)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="weights") as pool:
            for group, members in grouped.items():
                pool.submit(self._group, group, members)
            try:
                left = len(grouped)
                while left:
                    event = self._events.get()
                    if isinstance(event, int):
                        progress.advance(event)
                    elif isinstance(event, _Done):
                        left -= 1
                        if event.record is not None:
                            journal.add(event.group, event.record)
                    else:
                        raise event
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        if self._bad:
            raise CheckpointError(
                f"tensors with NaN or infinite numbers: {', '.join(sorted(self._bad))}. Such a model cannot be built; "
                "check the training or conversion step that produced them."
            )
        if self._overflows:
            raise CheckpointError(
                f"numbers beyond the range of {self._precision.storage}: {'; '.join(sorted(self._overflows))}. "
                "Build with --storage bf16 (same size, range of fp32) or fp32."
            )

    @property
    def _faulty(self) -> bool:
        return bool(self._bad or self._overflows)

    def _group(self, group: str, members: Sequence[Weight]) -> None:
        try:
            if not self._stop.is_set():
                self._events.put(_Done(group, self._write(group, members)))
        except _Abandoned:
            self._events.put(_Done(group, None))
        except BaseException as error:
            self._events.put(error)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _Abandoned

    def _write(self, group: str, members: Sequence[Weight]) -> Finished:
        """The group's file, complete and on the disk. Raises _Abandoned if any group so far has a fault: tensors are only looked at then."""
        header, _ = layout(members, self._precision)
        path = self._work / group_file(group)
        digest = hashlib.sha256(header)
        sources: dict[str, str] = {}
        with replacing(path, locked=True, buffering=0) as file:
            _write_all(file.fileno(), memoryview(header))
            for weight in members:
                self._go_on()
                with self._turn(weight):
                    made = _make(self._source, weight, self._precision, self._calibration)
                    sources |= made.sources
                    self._bad.update(made.bad)
                    if made.overflow is not None:
                        self._overflows.append(made.overflow)
                    if self._faulty:
                        continue
                    for piece in made.pieces:
                        data = piece.reshape(-1).view(np.uint8).data
                        for start in range(0, len(data), _CHUNK):
                            self._go_on()
                            chunk = data[start : start + _CHUNK]
                            digest.update(chunk)
                            _write_all(file.fileno(), chunk)
                            self._events.put(len(chunk))
                        del data
                    del made
            if self._faulty:
                raise _Abandoned
            size = os.fstat(file.fileno()).st_size
        return Finished(file=FileRecord(path=group_file(group), size=size, sha256=digest.hexdigest()), sources=sources)

    def _turn(self, weight: Weight) -> AbstractContextManager[Any]:
        return self._large if math.prod(weight.shape) > LARGE else nullcontext()


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _make(source: WeightSource, weight: Weight, precision: Precision, calibration: CalibrationTable | None) -> _Made:
    """Reads, checks, folds and casts or quantises one tensor."""
    how = weight.quantisation(precision)
    dtype = np.dtype(np.float32) if how is not None else np.dtype(STORAGE_DTYPES[weight.storage(precision)])
    arrays = [source.read(name) for name in weight.sources]
    if (
        how is not None
        and weight.moves_only
        and all(array.dtype == arrays[0].dtype for array in arrays)
        and arrays[0].dtype.itemsize == 2
    ):
        # Moved as they are, and widened block by block where they are quantised: half the memory of the largest matrix.
        dtype = arrays[0].dtype
    inputs, digests, bad, largest = _inputs(weight, arrays, dtype, digested=source.digested)
    if bad:
        return _Made((), digests, bad=bad)
    with np.errstate(all="ignore"):  # what overflows is found below
        result = weight.make(inputs)
    if weight.moves_only:
        result = np.ascontiguousarray(result).view(dtype)
    else:
        largest = peak(result)
        result = np.ascontiguousarray(cast(result, dtype))
    if result.shape != weight.shape:
        raise AssertionError(f"{weight.name} was made in shape {result.shape}, expected {weight.shape}")
    if not math.isfinite(float(cast(np.array([largest]), dtype)[0])):
        return _Made((), digests, overflow=f"{weight.name} (up to {largest:.3g})")
    del inputs, arrays  # a large matrix is not in memory beside its codes and what it was made of
    found = (result,) if how is None else _quantised(weight, result, how, calibration)
    return _Made((*found, *(_scale_of(name, calibration) for name in weight.operands(precision))), digests)


def _inputs(
    weight: Weight, arrays: Sequence[Array], dtype: np.dtype[Any], *, digested: bool
) -> tuple[list[Array], dict[str, str], tuple[str, ...], float]:
    """What a weight's recipe takes, the digests of its sources, the names of those that hold NaN or infinity, and the largest magnitude."""
    inputs: list[Array] = []
    digests: dict[str, str] = {}
    bad: list[str] = []
    largest = 0.0
    for name, array in zip(weight.sources, arrays, strict=True):
        if digested:
            digests[name] = tensor_digest(array)
        top = peak(array)
        if not math.isfinite(top):
            bad.append(name)
        largest = max(largest, top)
        inputs.append(_moved(cast(array, dtype)) if weight.moves_only else cast(array, np.dtype(np.float32)))
    return inputs, digests, tuple(bad), largest


def _scale_of(name: str, calibration: CalibrationTable | None) -> Array:
    """Scale [] of an activation in E4M3: without a table, of the format's own range."""
    threshold = calibration.threshold(name) if calibration is not None else E4M3_LARGEST
    return np.array(range_scale(threshold), np.float32)


def _quantised(weight: Weight, matrix: Array, how: Quantisation, calibration: CalibrationTable | None) -> tuple[Array, ...]:
    """The pieces of a quantised matrix, as `weights.pieces` lists them."""
    if how.element == "fp8":
        return (*quantised(matrix, how), _scale_of(weight.name, calibration))
    # Where only zeros were seen there are no channels, and none matters more than another.
    rms = calibration.rms(weight.name) if calibration is not None else np.empty(0)
    return quantised(matrix, how, np.square(rms) if rms.size else None)


def cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """The numbers in another type, rounded to nearest even, in the memory order they are in."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def _moved(array: Array) -> Array:
    """16-bit numbers as integers: numpy moves those at full speed, and bfloat16, a type it does not know, one by one."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def peak(array: Array) -> float:
    """The largest magnitude; NaN or infinity if there is any.

    Without a temporary as large as the array: the bits of a float without its sign are in the order of its magnitude, NaN above all.
    """
    if array.size == 0:
        return 0.0
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        array = np.ascontiguousarray(array)
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    bits = array.ravel(order="K").view(unsigned)
    magnitude = unsigned.type(np.iinfo(unsigned).max >> 1)
    top = max(int((bits[start : start + _BLOCK] & magnitude).max()) for start in range(0, bits.size, _BLOCK))
    return float(np.array([top], unsigned).view(array.dtype)[0])
