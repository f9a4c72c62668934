"""Our own checkpoint format: `config.json`, `*.safetensors` (one file, or shards with an index), `tokenizer/tokenizer.json`.

Tensor names are the parameter names of `flamingo_reference.model.Flamingo`; linear weights are [out, in] as PyTorch has them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_reference.checkpoints.names import Shape, expected_tensors
from flamingo_reference.checkpoints.writer import INDEX, SINGLE, writing
from flamingo_reference.config import ConfigError, ModelConfig

AnyArray = npt.NDArray[Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold exactly the tensors of its config."""


class TensorReader:
    """Tensors of a checkpoint folder, read one at a time from its safetensors files."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: tensor name -> the file that holds it."""
        self._files = dict(files)
        self._entries: dict[str, TensorEntry] = {}
        headers = {path: open_header(path) for path in sorted(set(self._files.values()))}
        for name, path in self._files.items():
            if name not in headers[path]:
                raise CheckpointError(f"{path} does not hold {name}, which the index places there. Fetch the checkpoint again.")
            self._entries[name] = headers[path][name]
        owners: dict[str, list[str]] = {}
        for path, header in headers.items():
            for name in header:
                owners.setdefault(name, []).append(path.name)
        twice = {name: places for name, places in owners.items() if len(places) > 1}
        if twice:
            raise CheckpointError(f"tensors held by more than one file: {twice}. Remove the files that do not belong.")
        unlisted = sorted(set(owners) - set(self._files))
        if unlisted:
            raise CheckpointError(f"the index does not list {', '.join(unlisted)}. Remove the files that do not belong.")

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._entries)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor; bfloat16 is that of ml_dtypes."""
        dtype: np.dtype[Any] = self._entries[name].dtype
        return dtype

    def read(self, name: str) -> AnyArray:
        """A tensor's numbers, mapped from the file (read-only)."""
        entry = self._entries[name]
        if entry.size == 0:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(self._files[name], mode="r", offset=entry.start, shape=(entry.size,), dtype=np.uint8)
        array: AnyArray = raw.view(entry.dtype).reshape(entry.shape)
        return array


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor's place in its safetensors file: start and size in bytes."""

    dtype: Any
    shape: Shape
    start: int
    size: int


class _RawEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def open_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, without reading them. Raises CheckpointError if the file is cut short or malformed."""
    advice = "Fetch the checkpoint again."
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is cut short or no safetensors file ({total} bytes). {advice}")
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        header = {name: msgspec.json.decode(entry, type=_RawEntry) for name, entry in raw.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} has a malformed safetensors header ({error}). {advice}") from error
    entries = {}
    for name, entry in header.items():
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has element type {entry.dtype}, expected one of {', '.join(_DTYPES)}.")
        dtype = np.dtype(_DTYPES[entry.dtype])
        start, stop = entry.data_offsets
        if stop - start != math.prod(entry.shape) * dtype.itemsize or start < 0:
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


def open_tensors(folder: Path) -> TensorReader:
    """The tensors of a checkpoint folder: `model.safetensors`, or shards listed by `model.safetensors.index.json`.

    Raises CheckpointError if files are missing, cut short, malformed or hold a tensor twice.
    """
    index_path, single = folder / INDEX, folder / SINGLE
    if index_path.is_file():
        try:
            index = msgspec.json.decode(index_path.read_bytes(), type=_Index)
        except msgspec.MsgspecError as error:
            raise CheckpointError(f"{index_path} is malformed: {error}") from error
        outside = sorted({file for file in index.weight_map.values() if Path(file).name != file})
        if outside:
            raise CheckpointError(f"{index_path} names files outside of its folder: {', '.join(outside)}")
        missing = sorted({file for file in index.weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{index_path} names files that are not there: {', '.join(missing)}. Fetch them.")
        return TensorReader({name: folder / file for name, file in index.weight_map.items()})
    if single.is_file():
        return TensorReader(dict.fromkeys(open_header(single), single))
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; a checkpoint folder needs one."
    )


def load_native(folder: Path) -> tuple[ModelConfig, TensorReader]:
    """Config and tensors of a checkpoint in our own format, checked against each other.

    Raises CheckpointError naming all tensors that are missing, unknown or of another shape at once.
    """
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=ModelConfig)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); a checkpoint folder needs one.") from error
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} is no model config: {error}") from error
    try:
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    reader = open_tensors(folder)
    check_tensors(config, {name: reader.shape(name) for name in reader.names()}, where=str(folder))
    return config, reader


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape], *, where: str) -> None:
    """Raises CheckpointError naming every tensor that is missing, unknown or misshapen, with the nearest expected name."""
    expected = expected_tensors(config)
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in shapes]
    for name, shape in shapes.items():
        if name not in expected:
            nearest = difflib.get_close_matches(name, expected, n=1)
            faults.append(f"unknown {name} {shape}" + (f" (nearest: {nearest[0]})" if nearest else ""))
        elif shape != expected[name]:
            faults.append(f"{name} has shape {shape}, expected {expected[name]}")
    if faults:
        raise CheckpointError(f"{where}: {len(faults)} tensors do not fit model {config.name!r}: " + "; ".join(faults))


def save_native(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, AnyArray]],
    *,
    tokenizer: Path | None = None,
    max_file_bytes: int | None = None,
) -> None:
    """Writes `config.json`, the tensors and, where given, a copy of the tokenizer.json `tokenizer`.

    Tensors are taken one by one. They go to `model.safetensors`, or, where max_file_bytes is given and it would grow beyond, to shards with
    an index. A checkpoint already there is replaced once all has been written. Raises CheckpointError naming all tensors that do not fit.
    """
    expected = expected_tensors(config)
    shapes: dict[str, Shape] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder, expected, max_file_bytes=max_file_bytes) as writer:
        for name, array in tensors:
            if name in shapes:
                raise CheckpointError(f"{folder}: tensor {name} was given twice")
            shapes[name] = tuple(array.shape)
            if expected.get(name) == shapes[name]:
                writer.add(name, array)
        check_tensors(config, shapes, where=str(folder))
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=1) + b"\n")
    if tokenizer is not None:
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
