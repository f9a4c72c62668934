"""Where each tensor of a bundle lies: groups, their safetensors files, and the index that graphs are built from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from flamingo_export.errors import BundleError
from flamingo_export.precision import ElementType, Precision
from flamingo_export.quantize.matrices import code_shape, scale_shape
from flamingo_export.weights.components import bundle_weights
from flamingo_export.weights.recipes import Weight
from flamingo_reference.arrays import Array
from flamingo_reference.checkpoints.files.safetensors_file import open_header
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.config import ModelConfig

STORAGE_DTYPES: Mapping[ElementType, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_ELEMENT_DTYPES: Mapping[ElementType, Any] = {
    **STORAGE_DTYPES,
    "fp8": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "int4": np.uint8,  # two a byte along the last axis; nothing else in a bundle is uint8
}
_SAFETENSORS_NAMES: Mapping[ElementType, str] = {
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "fp8": "F8_E4M3",
    "int8": "I8",
    "int4": "U8",
}
WEIGHTS_FOLDER = "weights"
SCALE, INPUT_SCALE = ".scale", ".input_scale"
"""What the names of scales end with: those of a matrix's blocks or output channels, and (fp8) of its input or an operand of attention."""


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies: file relative to the bundle, byte offset and length in it. shape: in elements, whatever their bits."""

    file: str
    offset: int
    length: int
    storage: ElementType
    shape: tuple[int, ...]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as a safetensors file holds it; `shape` of int4 is that of its bytes."""

    name: str
    shape: tuple[int, ...]
    element: ElementType

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its numbers."""
        dtype: np.dtype[Any] = np.dtype(_ELEMENT_DTYPES[self.element])
        return dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pieces(weight: Weight, precision: Precision) -> list[Piece]:
    """What is stored of a weight: itself, or its codes and scales where the policy quantises it."""
    how = weight.quantisation(precision)
    operands = [Piece(name=name + INPUT_SCALE, shape=(), element="fp32") for name in weight.operands(precision)]
    if how is None:
        return [Piece(name=weight.name, shape=weight.shape, element=weight.storage(precision)), *operands]
    stored = [
        Piece(name=weight.name, shape=code_shape(weight.shape, how), element=how.element),
        Piece(name=weight.name + SCALE, shape=scale_shape(weight.shape, how), element="fp32"),
    ]
    if how.element == "fp8":
        stored.append(Piece(name=weight.name + INPUT_SCALE, shape=(), element="fp32"))
    return [*stored, *operands]


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
    starts: dict[str, int] = {}
    every = [piece for weight in weights for piece in pieces(weight, precision)]
    start = 0
    for piece in every:
        stop = start + piece.size
        entries[piece.name] = {
            "dtype": _SAFETENSORS_NAMES[piece.element],
            "shape": list(piece.shape),
            "data_offsets": [start, stop],
        }
        starts[piece.name] = start
        start = stop
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 64)  # tensor data begin on a cache line
    header = len(text).to_bytes(8, "little") + text
    file = group_file(weights[0].group)
    placed = {
        piece.name: Placed(
            file=file,
            offset=len(header) + starts[piece.name],
            length=piece.size,
            storage=piece.element,
            shape=_in_elements(piece.shape, piece.element),
        )
        for piece in every
    }
    return header, placed


def _in_elements(shape: tuple[int, ...], element: ElementType) -> tuple[int, ...]:
    return (*shape[:-1], 2 * shape[-1]) if element == "int4" else shape


class WeightIndex:
    """Where every tensor of a bundle lies."""

    def __init__(self, placed: Mapping[str, Placed]) -> None:
        self._placed = dict(placed)

    @classmethod
    def planned(cls, config: ModelConfig, precision: Precision) -> WeightIndex:
        """The index of a bundle that need not exist yet."""
        placed: dict[str, Placed] = {}
        for members in groups(bundle_weights(config, precision)).values():
            placed |= layout(members, precision)[1]
        return cls(placed)

    @classmethod
    def read(cls, bundle: Path) -> WeightIndex:
        """The index of a bundle folder, from its files' headers.

        Raises BundleError if one is cut short or malformed, or holds elements that no bundle has.
        """
        elements = {np.dtype(dtype): element for element, dtype in _ELEMENT_DTYPES.items()}
        placed = {}
        for path in sorted((bundle / WEIGHTS_FOLDER).glob("*.safetensors")):
            try:
                header = open_header(path)
            except CheckpointError as error:
                raise BundleError(f"{error} It belongs to the bundle {bundle}: build that again, or copy it again.") from error
            for name, entry in header.items():
                if (element := elements.get(entry.dtype)) is None:
                    raise BundleError(
                        f"{path}: {name} has elements of type {entry.dtype}, which no bundle has. Build it again."
                    )
                placed[name] = Placed(
                    file=f"{WEIGHTS_FOLDER}/{path.name}",
                    offset=entry.start,
                    length=entry.size,
                    storage=element,
                    shape=_in_elements(entry.shape, element),
                )
        return cls(placed)

    def __getitem__(self, name: str) -> Placed:
        return self._placed[name]

    def __contains__(self, name: str) -> bool:
        return name in self._placed

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor by name."""
        return {name: placed.length for name, placed in self._placed.items()}

    def read_tensor(self, bundle: Path, name: str) -> Array:
        """The numbers of a tensor as they are stored, mapped from its file (read-only): codes of a quantised matrix, int4 in pairs."""
        placed = self._placed[name]
        raw = np.memmap(bundle / placed.file, mode="r", dtype=np.uint8, offset=placed.offset, shape=(placed.length,))
        shape = (*placed.shape[:-1], placed.shape[-1] // 2) if placed.storage == "int4" else placed.shape
        array: Array = raw.view(_ELEMENT_DTYPES[placed.storage]).reshape(shape)
        return array


def stored_bytes(weight: Weight, precision: Precision) -> int:
    """Bytes of a tensor in the bundle."""
    return sum(piece.size for piece in pieces(weight, precision))
