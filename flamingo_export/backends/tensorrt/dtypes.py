"""ElementType types of engines and how the host holds them: numpy has no bf16, so its bits are kept in uint16; FP8 is ml_dtypes' E4M3."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from flamingo_export.errors import InputError
from flamingo_export.precision import StorageType
from flamingo_export.specs import ElementKind
from flamingo_reference.arrays import Array


class ElementType(msgspec.Struct, frozen=True, kw_only=True):
    """name: as in the manifest; trt: TensorRT's DataType; storage: numpy's; code and bits: DLPack's DLDataType."""

    name: str
    trt: str
    storage: np.dtype[Any]
    code: int
    bits: int

    @property
    def size(self) -> int:
        """Bytes of one."""
        return self.storage.itemsize


ELEMENT_TYPES = {
    element.name: element
    for element in (
        ElementType(name="fp32", trt="FLOAT", storage=np.dtype(np.float32), code=2, bits=32),
        ElementType(name="fp16", trt="HALF", storage=np.dtype(np.float16), code=2, bits=16),
        ElementType(name="bf16", trt="BF16", storage=np.dtype(np.uint16), code=4, bits=16),
        ElementType(name="fp8", trt="FP8", storage=np.dtype(ml_dtypes.float8_e4m3fn), code=10, bits=8),
        ElementType(name="int64", trt="INT64", storage=np.dtype(np.int64), code=0, bits=64),
        ElementType(name="bool", trt="BOOL", storage=np.dtype(np.bool_), code=6, bits=8),
    )
}


def element_type(kind: ElementKind, compute: StorageType) -> ElementType:
    """The type that a tensor of the contract has in an engine that computes in `compute`."""
    return ELEMENT_TYPES[compute if kind == "float" else kind]


def element_type_from_dlpack(code: int, bits: int) -> ElementType:
    """The element of a DLPack type. Raises InputError for one that no engine has."""
    for element in ELEMENT_TYPES.values():
        if (element.code, element.bits) == (code, bits):
            return element
    raise InputError(f"a DLPack tensor of type code {code} with {bits} bits: engines take {', '.join(ELEMENT_TYPES)}")


def encode(value: Array, into: Array, element: ElementType) -> None:
    """Writes an array of the host into memory of the same shape laid out as the element; floats are rounded to nearest, ties to even.

    Beyond fp16's range they become infinite, as they do in the graph. Raises InputError for a dtype that would lose more; FP8 are codes,
    which floats become with only a scale.
    """
    if element.name == "bf16":
        if value.dtype.kind != "f":
            raise InputError(f"{value.dtype} was given, floats are expected")
        into[...] = _to_bf16(value.astype(np.float32, copy=False))
        return
    if (element.name == "fp8") != (value.dtype == ELEMENT_TYPES["fp8"].storage) or not np.can_cast(
        value.dtype, element.storage, "same_kind"
    ):
        raise InputError(f"{value.dtype} was given, {element.storage} is expected")
    with np.errstate(over="ignore"):
        np.copyto(into, value, casting="same_kind")


def decode(array: Array, element: ElementType) -> Array:
    """A fresh array of what memory laid out as the element holds; floats in float32, FP8 as it is."""
    if element.name == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32 if element.storage.kind == "f" else array.dtype)


def _to_bf16(value: Array) -> Array:
    bits = np.ascontiguousarray(value).view(np.uint32).reshape(value.shape)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Adding would carry a NaN over into infinity or zero.
    return np.where(np.isnan(value), (bits >> 16) | 0x40, rounded).astype(np.uint16)
