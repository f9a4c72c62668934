"""Tensors of a checkpoint, whatever kind of file they lie in: where each is, and reading it without holding the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
AnyArray = npt.NDArray[Any]
FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
"""Element types that weights may have. bfloat16 is that of ml_dtypes, which needs no torch."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold exactly the tensors of its config."""


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor's place in a file: first byte and extent in bytes; strides in bytes, None where its elements follow each other."""

    dtype: Any
    shape: Shape
    start: int
    size: int
    strides: tuple[int, ...] | None = None


class TensorReader(Protocol):
    """Named tensors, read one at a time. What is read is in the file's own element type: nothing is rounded here."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> np.dtype[Any]: ...

    def read(self, name: str) -> AnyArray:
        """A tensor's numbers, not to be written to. May be called from several threads at once."""


class FileReader:
    """Tensors mapped from their files: memory is that of the pages being read."""

    def __init__(self, entries: Mapping[str, tuple[Path, TensorEntry]], absent: Mapping[str, Path] | None = None) -> None:
        """entries: tensor name -> its file and its place there. absent: tensors of which no more is known than the file they should be in,
        which is not there: they have names alone."""
        self._entries, self._absent = dict(entries), dict(absent or {})

    @property
    def absent(self) -> dict[str, Path]:
        """Tensors that are listed and not there, with the file that they should be in."""
        return dict(self._absent)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({path for path, _ in self._entries.values()})

    def names(self) -> list[str]:
        """All tensor names."""
        return [*self._entries, *self._absent]

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._place(name)[1].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor."""
        dtype: np.dtype[Any] = self._place(name)[1].dtype
        return dtype

    def read(self, name: str) -> AnyArray:
        """A tensor's numbers, mapped from the file (read-only), in the file's element type."""
        path, entry = self._place(name)
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(path, mode="r", offset=entry.start, shape=(entry.size,), dtype=np.uint8)
        if entry.strides is None:
            array: AnyArray = raw.view(entry.dtype).reshape(entry.shape)
            return array
        strided: AnyArray = np.ndarray(entry.shape, entry.dtype, buffer=raw, strides=entry.strides)
        return strided

    def _place(self, name: str) -> tuple[Path, TensorEntry]:
        if name in self._absent:
            raise CheckpointError(f"{name} lies in {self._absent[name]}, which is not there. Fetch it.")
        return self._entries[name]
