"""Writing safetensors files tensor by tensor: memory is that of one tensor, whatever the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from flamingo_reference.arrays import Array

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PARTIAL = ".partial-"
_TYPES: Mapping[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _File:
    """A safetensors file being written. Its header comes first but is known last, so space for it is kept free and filled with blanks."""

    def __init__(self, path: Path, header_room: int) -> None:
        self.path, self.size = path, 0
        self.names: list[str] = []
        self._entries: dict[str, Any] = {}
        self._room = header_room
        self._file: IO[bytes] = path.open("wb")
        self._file.seek(8 + header_room)

    def add(self, name: str, array: Array) -> None:
        """Appends a tensor."""
        if array.dtype.name not in _TYPES:
            raise ValueError(f"{name} has element type {array.dtype}, expected one of {', '.join(_TYPES)}")
        raw = np.asarray(array, order="C").reshape(-1).view(np.uint8)
        self._entries[name] = {
            "dtype": _TYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [self.size, self.size + raw.size],
        }
        self._file.write(raw.data)
        self.size += raw.size
        self.names.append(name)

    def finish(self) -> None:
        """Writes the header and closes the file."""
        header = msgspec.json.encode(self._entries).ljust(self._room)
        assert len(header) == self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header)
        self._file.close()

    def discard(self) -> None:
        """Removes the file."""
        # Closing writes what is buffered: on a full disk that fails once more, which must not keep the file from being removed.
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


class TensorWriter:
    """Writes `model.safetensors`, or shards and their index, into a folder; nothing is in place until `publish`."""

    def __init__(self, folder: Path, names: Iterable[str], *, max_file_bytes: int | None = None) -> None:
        """names: every tensor that may come. max_file_bytes: begin another file rather than let one grow beyond; None: one file."""
        self._folder, self._limit = folder, max_file_bytes
        longest = {"dtype": "BF16", "shape": [10**6] * 4, "data_offsets": [10**15] * 2}
        room = len(msgspec.json.encode(dict.fromkeys(names, longest)))
        self._room = room + -room % 64 + 56  # with the 8 bytes of its length, tensors begin on a cache line
        self._files: list[_File] = []

    def add(self, name: str, array: Array) -> None:
        """Writes a tensor. Raises ValueError for an element type other than float64, float32, float16, bfloat16."""
        current = self._files[-1] if self._files else None
        full = (
            current is not None and self._limit is not None and current.size + array.nbytes > self._limit and current.size > 0
        )
        if current is None or full:
            current = _File(self._folder / f"{_PARTIAL}{len(self._files) + 1:05d}.safetensors", self._room)
            self._files.append(current)
        current.add(name, array)

    def publish(self) -> None:
        """Completes the files and puts them in the place of those that were there."""
        for file in self._files:
            file.finish()
        stale = {self._folder / INDEX, self._folder / SINGLE, *self._folder.glob("model-*.safetensors")}
        for path in sorted(stale):
            path.unlink(missing_ok=True)
        total = len(self._files)
        if total == 1:
            self._files[0].path.replace(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, file in enumerate(self._files, start=1):
            name = f"model-{number:05d}-of-{total:05d}.safetensors"
            file.path.replace(self._folder / name)
            weight_map |= dict.fromkeys(file.names, name)
        index = {"metadata": {"total_size": sum(file.size for file in self._files)}, "weight_map": weight_map}
        (self._folder / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n")

    def discard(self) -> None:
        """Removes what was written and not published."""
        for file in self._files:
            file.discard()


@contextlib.contextmanager
def writing(folder: Path, names: Iterable[str], *, max_file_bytes: int | None = None) -> Iterator[TensorWriter]:
    """A TensorWriter that publishes when its block ends well, and leaves nothing behind when it does not."""
    writer = TensorWriter(folder, names, max_file_bytes=max_file_bytes)
    try:
        yield writer
        writer.publish()
    finally:
        writer.discard()
