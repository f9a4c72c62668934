"""The header of a safetensors file, checked before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.files.json_file import decode_once
from flamingo_reference.checkpoints.files.tensors import CheckpointError, TensorEntry

_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    # Of quantised bundles; a checkpoint's weights may not be of it (tensors.FLOATS).
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    # No weight is of these, but published files carry buffers (position_ids) that are ignored by name.
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


class _RawEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


def open_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, without reading them. Raises CheckpointError if the file is cut short or malformed."""
    advice = "Fetch the checkpoint again."
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is cut short or no safetensors file ({total} bytes). {advice}")
            text = file.read(length)
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        header = {name: msgspec.json.decode(entry, type=_RawEntry) for name, entry in raw.items()}
        _, repeated = decode_once(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header ({error}). {advice}") from error
    if repeated:
        raise CheckpointError(f"{path} holds {', '.join(repeated)} twice. {advice}")
    entries = {}
    for name, entry in header.items():
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has element type {entry.dtype}, expected one of {', '.join(_DTYPES)}.")
        dtype = np.dtype(_DTYPES[entry.dtype])
        start, stop = entry.data_offsets
        if stop - start != math.prod(entry.shape) * dtype.itemsize or start < 0 or min(entry.shape, default=0) < 0:
            raise CheckpointError(f"{path}: {name} has {stop - start} bytes for shape {entry.shape}. {advice}")
        if 8 + length + stop > total:
            raise CheckpointError(f"{path} is cut short: {name} ends beyond its {total} bytes. {advice}")
        entries[name] = TensorEntry(dtype, entry.shape, 8 + length + start, stop - start)
    end = 8 + length
    for name, placed in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if placed.start != end:
            raise CheckpointError(
                f"{path}: {name} begins at byte {placed.start}, expected {end}: tensors overlap or leave gaps. {advice}"
            )
        end += placed.size
    if end != total:
        raise CheckpointError(f"{path} has {total - end} bytes after its last tensor. {advice}")
    return entries
