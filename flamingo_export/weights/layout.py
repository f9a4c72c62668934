"""Where each tensor of a bundle lies: groups, their safetensors files, and the index that graphs are built from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from flamingo_export.precision import Precision, StorageType
from flamingo_export.weights.components import bundle_weights
from flamingo_export.weights.recipes import Array, Weight
from flamingo_reference.checkpoints.safetensors_file import open_header
from flamingo_reference.config import ModelConfig

STORAGE_DTYPES: Mapping[StorageType, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_SAFETENSORS_NAMES: Mapping[StorageType, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
WEIGHTS_FOLDER = "weights"


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies: file relative to the bundle, byte offset and length in it."""

    file: str
    offset: int
    length: int
    storage: StorageType
    shape: tuple[int, ...]


def groups(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Weights by group, in order."""
    grouped: dict[str, list[Weight]] = {}
    for weight in weights:
        grouped.setdefault(weight.group, []).append(weight)
    return grouped


def group_file(group: str) -> str:
    """Path of a group's file in the bundle."""
    return f"{WEIGHTS_FOLDER}/{group}.safetensors"


def layout(weights: Sequence[Weight], precision: Precision) -> tuple[bytes, dict[str, Placed]]:
    """Header of a group's safetensors file, and where each tensor will lie in it. Tensor data follow in the order given."""
    entries: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    start = 0
    for weight in weights:
        storage = weight.storage(precision)
        stop = start + math.prod(weight.shape) * np.dtype(STORAGE_DTYPES[storage]).itemsize
        entries[weight.name] = {
            "dtype": _SAFETENSORS_NAMES[storage],
            "shape": list(weight.shape),
            "data_offsets": [start, stop],
        }
        spans[weight.name] = (start, stop)
        start = stop
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 64)  # tensor data begin on a cache line
    header = len(text).to_bytes(8, "little") + text
    placed = {
        weight.name: Placed(
            file=group_file(weight.group),
            offset=len(header) + spans[weight.name][0],
            length=spans[weight.name][1] - spans[weight.name][0],
            storage=weight.storage(precision),
            shape=weight.shape,
        )
        for weight in weights
    }
    return header, placed


class WeightIndex:
    """Where every tensor of a bundle lies."""

    def __init__(self, placed: Mapping[str, Placed]) -> None:
        self._placed = dict(placed)

    @classmethod
    def planned(cls, config: ModelConfig, precision: Precision) -> WeightIndex:
        """The index of a bundle that need not exist yet."""
        placed: dict[str, Placed] = {}
        for members in groups(bundle_weights(config)).values():
            placed |= layout(members, precision)[1]
        return cls(placed)

    @classmethod
    def read(cls, bundle: Path) -> WeightIndex:
        """The index of a bundle folder, from its files' headers. Raises CheckpointError if one is cut short or malformed."""
        storages: dict[str, StorageType] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        placed = {}
        for path in sorted((bundle / WEIGHTS_FOLDER).glob("*.safetensors")):
            for name, entry in open_header(path).items():
                placed[name] = Placed(
                    file=f"{WEIGHTS_FOLDER}/{path.name}",
                    offset=entry.start,
                    length=entry.size,
                    storage=storages[entry.dtype.name],
                    shape=entry.shape,
                )
        return cls(placed)

    def __getitem__(self, name: str) -> Placed:
        return self._placed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor by name."""
        return {name: placed.length for name, placed in self._placed.items()}

    def read_tensor(self, bundle: Path, name: str) -> Array:
        """The numbers of a tensor, mapped from its file (read-only)."""
        placed = self._placed[name]
        raw = np.memmap(bundle / placed.file, mode="r", dtype=np.uint8, offset=placed.offset, shape=(placed.length,))
        array: Array = raw.view(STORAGE_DTYPES[placed.storage]).reshape(placed.shape)
        return array
