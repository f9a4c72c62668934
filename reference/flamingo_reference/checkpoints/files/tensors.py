"""Tensors of a checkpoint, whatever kind of file they lie in: where each is, and reading it without holding the others."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import msgspec
import numpy as np

from flamingo_reference.arrays import Array, Shape

FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
"""Element types that weights may have. bfloat16 is that of ml_dtypes, which needs no torch."""


_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"^(?:module\.)+")


def plain_tensor_name(name: str) -> str:
    """A tensor's name without what training wrappers put into it."""
    return _PARALLEL.sub("", _WRAPPERS.sub("", name))


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold exactly the tensors of its config."""


def refuse_emptied(reader: FileReader, path: Path) -> None:
    """Raises CheckpointError for weights that were saved within DeepSpeed's ZeRO stage 3, whose parameters are empty on every process between
    uses: no weight of any model is a list of no numbers."""
    names = [name for name in reader.names() if name not in reader.absent]
    empty = [name for name in names if reader.shape(name) == (0,) and reader.dtype(name) in FLOATS]
    if empty:
        raise CheckpointError(
            f"{path} holds {len(empty)} empty tensors of {len(names)} (the first is {empty[0]}), as a model has that is saved while DeepSpeed's "
            "ZeRO stage 3 keeps its parts elsewhere. Make the whole weights with the zero_to_fp32.py that DeepSpeed wrote beside its checkpoint."
        )


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

    def read(self, name: str) -> Array:
        """A tensor's numbers, not to be written to. May be called from several threads at once."""


class FileReader:
    """Tensors mapped from their files: memory is that of the pages being read."""

    def __init__(self, entries: Mapping[str, tuple[Path, TensorEntry]], absent: Mapping[str, Path] | None = None) -> None:
        """entries: tensor name -> its file and its place there. absent: tensors of which no more is known than the file they should be in,
        which is not there: they have only names."""
        self._entries, self._absent = dict(entries), dict(absent or {})

    def plainly_named(self) -> FileReader:
        """The same tensors without what training wrappers put into names: `module.` in front (DistributedDataParallel, DeepSpeed),
        `_orig_mod.` (torch.compile), `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`. Raises CheckpointError if two tensors would
        have one name."""
        twice = sorted(name for name, count in Counter(plain_tensor_name(each) for each in self.names()).items() if count > 1)
        if twice:
            raise CheckpointError(
                f"{', '.join(map(str, self.files[:3]))}: {', '.join(twice[:20])} is there with and without the names of training "
                "wrappers (module., _orig_mod., _fsdp_wrapped_module.). Keep one of them."
            )
        return FileReader(
            {plain_tensor_name(name): place for name, place in self._entries.items()},
            {plain_tensor_name(name): path for name, path in self._absent.items()},
        )

    def same_place(self, one: str, other: str) -> bool:
        """Whether two names stand for the same bytes of a file, so that their numbers are equal."""
        return one in self._entries and self._entries.get(one) == self._entries.get(other)

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

    def read(self, name: str) -> Array:
        """A tensor's numbers, mapped from the file (read-only), in the file's element type."""
        path, entry = self._place(name)
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(path, mode="r", offset=entry.start, shape=(entry.size,), dtype=np.uint8)
        if entry.strides is None:
            array: Array = raw.view(entry.dtype).reshape(entry.shape)
            return array
        strided: Array = np.ndarray(entry.shape, entry.dtype, buffer=raw, strides=entry.strides)
        return strided

    def _place(self, name: str) -> tuple[Path, TensorEntry]:
        if name in self._absent:
            raise CheckpointError(f"{name} lies in {self._absent[name]}, which is not there. Fetch it.")
        return self._entries[name]
