"""DLPack without a tensor library: tensors on the device given to others and taken from them, through the C structure itself.

Source: dlpack.h, version 0.8 (DLManagedTensor), and Python's protocol of the array API standard. A capsule is named `dltensor` until it is
taken, then `used_dltensor`; who takes it calls the deleter when done.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

from flamingo_export.errors import InputError

CUDA, CUDA_MANAGED = 2, 13
_NAME, _USED = b"dltensor", b"used_dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(("PyCapsule_New", _api))
_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))

_given: dict[int, tuple[Any, ...]] = {}
"""What each structure that was given away keeps alive, until its deleter is called."""


def _forget(managed: Any) -> None:
    _given.pop(ctypes.addressof(managed.contents), None)


def _destroyed(capsule: int) -> None:
    """A capsule that nobody took."""
    if _valid(capsule, _NAME):
        _given.pop(_pointer(capsule, _NAME), None)


_delete, _destroy = _Deleter(_forget), _Destructor(_destroyed)


def give(owner: Any, address: int, shape: tuple[int, ...], code: int, bits: int, device: int = CUDA, index: int = 0) -> object:
    """A capsule of contiguous memory that `owner` keeps alive, on the device of that DLPack kind and index."""
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    tensor = _Tensor(address, _Device(device, index), len(shape), _DataType(code, bits, 1), sizes, None, 0)
    managed = _Managed(tensor, None, _delete)
    where = ctypes.addressof(managed)
    _given[where] = (owner, sizes, managed)
    capsule: object = _new(where, _NAME, _destroy)
    return capsule


class Taken:
    """Memory of another library: address on the device, shape, DLPack type. Given back when nothing refers to it any more."""

    def __init__(self, managed: Any) -> None:
        tensor = managed.contents.tensor
        self.address = (tensor.data or 0) + tensor.byte_offset
        self.shape = tuple(tensor.shape[: tensor.ndim])
        self.code, self.bits = int(tensor.dtype.code), int(tensor.dtype.bits)
        if managed.contents.deleter:
            weakref.finalize(self, managed.contents.deleter, managed).atexit = False


def take(value: Any, *, stream: int, devices: tuple[int, ...] = (CUDA, CUDA_MANAGED), index: int = 0) -> Taken:
    """The tensor of another library, fit to be read on `stream`. Raises InputError where it is not on GPU `index` or not contiguous."""
    if not hasattr(value, "__dlpack__"):
        raise InputError(f"{type(value).__name__} is neither an array of the host nor a tensor with __dlpack__")
    device = tuple(value.__dlpack_device__())
    if device[0] not in devices or device[1] != index:
        raise InputError(f"a tensor on DLPack device {device} was given; put it on GPU {index} or give an array of the host")
    capsule = value.__dlpack__(stream=stream)
    if not _valid(id(capsule), _NAME):
        raise InputError(f"{type(value).__name__}.__dlpack__ gave something else than a fresh DLPack capsule")
    managed = ctypes.cast(_pointer(id(capsule), _NAME), ctypes.POINTER(_Managed))
    _rename(capsule, _USED)
    found = Taken(managed)
    tensor = managed.contents.tensor
    if tensor.dtype.lanes != 1 or not _contiguous(tensor):
        raise InputError(f"a tensor of shape {found.shape} that is not contiguous was given; make it so first")
    return found


def _contiguous(tensor: Any) -> bool:
    shape = tensor.shape[: tensor.ndim]
    if not tensor.strides or 0 in shape:
        return True
    return all(size == 1 or tensor.strides[axis] == math.prod(shape[axis + 1 :]) for axis, size in enumerate(shape))
