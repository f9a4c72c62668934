"""Tensors in device memory and what carries them there and back: streams with what belongs to them, tensors, buffers."""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from flamingo_export.backends.base import Buffer, Tensor
from flamingo_export.backends.tensorrt import dlpack
from flamingo_export.backends.tensorrt.cuda import Cuda
from flamingo_export.backends.tensorrt.dtypes import ElementType, decode, element_type_from_dlpack, encode
from flamingo_export.errors import InputError
from flamingo_reference.arrays import Array

_STAGE_BYTES = 1 << 24
ALIGNMENT = 256


class Memory:
    """Device memory that goes when nothing refers to it any more. ordered: it belongs to what its stream does from now on, and costs no wait."""

    def __init__(self, stream: DeviceStream, size: int, *, ordered: bool = False) -> None:
        cuda, handle = stream.cuda, stream.handle
        self.stream, self.size = stream, size
        asked = max(size, 1)
        self.address = cuda.malloc_async(asked, handle) if ordered else cuda.malloc(asked)
        address = self.address
        give_back = (lambda: cuda.free_async(address, handle)) if ordered else (lambda: cuda.free(address))
        # At the end of the process the driver frees everything, and may be gone already.
        weakref.finalize(self, give_back).atexit = False


class Pinned:
    """Page-locked memory of the host, as bytes."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address = cuda.malloc_host(max(size, 1))
        self.bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(self.address))
        weakref.finalize(self, cuda.free_host, self.address).atexit = False

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """Its beginning as an array."""
        return self.bytes[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class DeviceStream:
    """A CUDA stream (`handle`) and what belongs to it: an event to wait for it with, memory for activations that its sessions share (they run
    one after the other), and pinned memory through which single arrays come and go."""

    def __init__(self, cuda: Cuda, *, first: bool) -> None:
        self.cuda = cuda
        self.handle = cuda.stream(first=first)
        weakref.finalize(self, cuda.destroy_stream, self.handle).atexit = False
        self._event = cuda.event()
        weakref.finalize(self, cuda.destroy_event, self._event).atexit = False
        self.activations: Memory | None = None
        self._stage: Pinned | None = None
        self._landing: tuple[Pinned, int] | None = None
        self._arrivals: DeviceStream | None = None

    @property
    def device(self) -> tuple[int, int]:
        """Of its memory, as DLPack names it."""
        return self.cuda.dlpack_device

    @property
    def arrivals(self) -> DeviceStream:
        """Another stream of its device, on which comes what this one is not to wait for yet."""
        if self._arrivals is None:
            self._arrivals = DeviceStream(self.cuda, first=False)
        return self._arrivals

    def reserve(self, size: int) -> None:
        """Makes room for the activations of one more session."""
        if self.activations is None or self.activations.size < size:
            self.activations = None  # the smaller block goes first, and with it waits for what still uses it
            self.activations = Memory(self, size)

    def follow(self, other: DeviceStream) -> None:
        """What this stream is asked from now on comes after what the other was asked so far."""
        if other is not self:
            other.cuda.record(other._event, other.handle)
            self.cuda.wait(self.handle, other._event)

    def fetch(self, target: int, other: DeviceStream, source: int, size: int) -> None:
        """Copies from memory of the other stream's device to this one's: after what the other was asked so far, before what either is asked from
        now on. The host does not wait. Where devices do not reach each other the bytes go through pinned memory, piece by piece."""
        if self.device == other.device:
            self.follow(other)
            self.cuda.copy(target, source, size, "on device", self.handle)
            other.follow(self)
        elif self.cuda.reaches(other.device[1]):
            self.follow(other)
            self.cuda.copy_peer(target, source, size, other.device[1], self.handle)
            other.follow(self)
        else:
            self._fetch_by_host(target, other, source, size)

    def _fetch_by_host(self, target: int, other: DeviceStream, source: int, size: int) -> None:
        if self._landing is None:
            self._landing = Pinned(self.cuda, _STAGE_BYTES), self.cuda.event()
            weakref.finalize(self, self.cuda.destroy_event, self._landing[1]).atexit = False
            self.cuda.record(self._landing[1], self.handle)
        stage, emptied = self._landing
        for start in range(0, size, _STAGE_BYTES):
            count = min(_STAGE_BYTES, size - start)
            other.cuda.wait(other.handle, emptied)
            other.cuda.copy(stage.address, source + start, count, "to host", other.handle)
            self.follow(other)
            self.cuda.copy(target + start, stage.address, count, "to device", self.handle)
            self.cuda.record(emptied, self.handle)

    def upload(self, address: int, data: Array) -> None:
        """Copies bytes [n] to the device and waits."""
        stage = self._staging()
        for start in range(0, len(data), _STAGE_BYTES):
            part = data[start : start + _STAGE_BYTES]
            stage.bytes[: len(part)] = part
            self.cuda.copy(address + start, stage.address, len(part), "to device", self.handle)
            self.cuda.synchronize(self.handle)

    def download(self, address: int, size: int) -> Array:
        """Waits, and returns a copy of device memory as bytes."""
        stage, found = self._staging(), np.empty(size, np.uint8)
        for start in range(0, size, _STAGE_BYTES):
            count = min(_STAGE_BYTES, size - start)
            self.cuda.copy(stage.address, address + start, count, "to host", self.handle)
            self.cuda.synchronize(self.handle)
            found[start : start + count] = stage.bytes[:count]
        return found

    def _staging(self) -> Pinned:
        if self._stage is None:
            self._stage = Pinned(self.cuda, _STAGE_BYTES)
        return self._stage


class DeviceTensor:
    """A tensor in device memory, contiguous, kept alive by `owner`; what is in it is known to what `stream` does from now on."""

    def __init__(self, owner: Any, address: int, shape: tuple[int, ...], element: ElementType, stream: DeviceStream) -> None:
        self._owner, self.address, self.shape, self.element, self.stream = owner, address, tuple(shape), element, stream

    @classmethod
    def empty(cls, stream: DeviceStream, shape: tuple[int, ...], element: ElementType) -> DeviceTensor:
        """Fresh memory for what the stream does next."""
        memory = Memory(stream, math.prod(shape) * element.size, ordered=True)
        return cls(memory, memory.address, shape, element, stream)

    @classmethod
    def taken(cls, value: Any, stream: DeviceStream) -> DeviceTensor:
        """Another library's tensor on the device, through DLPack. Raises InputError."""
        kind, index = stream.cuda.dlpack_device
        found = dlpack.take(value, stream=stream.handle, devices=(kind, dlpack.CUDA_MANAGED), index=index)
        return cls(found, found.address, found.shape, element_type_from_dlpack(found.code, found.bits), stream)

    def near(self, stream: DeviceStream) -> DeviceTensor:
        """Itself where it lies on the stream's device, else a copy there; the host does not wait."""
        if self.stream.device == stream.device:
            return self
        copied = DeviceTensor.empty(stream, self.shape, self.element)
        stream.fetch(copied.address, self.stream, self.address, self.nbytes)
        return copied

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements; uint16 stands for bf16."""
        return self.element.storage

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.element.size

    def reshape(self, *shape: int) -> DeviceTensor:
        """The same memory in another shape. Raises InputError where the sizes differ."""
        if math.prod(shape) != math.prod(self.shape):
            raise InputError(f"a tensor of shape {self.shape} cannot take the shape {shape}")
        return DeviceTensor(self._owner, self.address, shape, self.element, self.stream)

    def __getitem__(self, index: int) -> DeviceTensor:
        """A row of the first axis, sharing memory. Raises IndexError."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of a tensor of shape {self.shape}")
        row = self.shape[1:]
        address = self.address + index * math.prod(row) * self.element.size
        return DeviceTensor(self._owner, address, row, self.element, self.stream)

    def read(self) -> Array:
        """A copy on the host; floats in float32."""
        data = self.stream.download(self.address, self.nbytes)
        return decode(data.view(self.element.storage).reshape(self.shape), self.element)

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        """For other libraries, which read it on their stream; None: on CUDA's default one."""
        cuda = self.stream.cuda
        if stream in (-1, self.stream.handle):  # the consumer needs no order, or has it
            pass
        elif stream is None or stream in (0, 1, 2):
            cuda.synchronize(self.stream.handle)  # what the default streams are called differs; waiting is right for all
        else:
            event = cuda.event()
            cuda.record(event, self.stream.handle)
            cuda.wait(stream, event)
            cuda.destroy_event(event)
        return dlpack.give(self, self.address, self.shape, self.element.code, self.element.bits, *cuda.dlpack_device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.stream.cuda.dlpack_device


class DeviceBuffer:
    """A tensor that outlives calls: media bank, cache. Written by its own stream or another, read by its own."""

    def __init__(self, memory: Memory, shape: tuple[int, ...], element: ElementType, *, offset: int = 0) -> None:
        """offset: bytes of the memory before it."""
        self._memory, self._shape, self.element, self._offset = memory, tuple(shape), element, offset
        self._rows: dict[tuple[int, int], DeviceBuffer] = {}
        self._written_by: DeviceStream | None = None
        self._views: dict[tuple[int, ...], DeviceBuffer] = {}

    @classmethod
    def zeroed(cls, stream: DeviceStream, shape: tuple[int, ...], element: ElementType) -> DeviceBuffer:
        """Raises DeviceMemoryError."""
        memory = Memory(stream, math.prod(shape) * element.size)
        stream.cuda.fill(memory.address, 0, memory.size, stream.handle)
        stream.cuda.synchronize(stream.handle)  # another stream may be the first to write
        return cls(memory, shape, element)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def address(self) -> int:
        return self._memory.address + self._offset

    @property
    def nbytes(self) -> int:
        return math.prod(self._shape) * self.element.size

    def write(self, index: int, value: Tensor) -> None:
        """Copies `value` into row `index`: from its device by the value's stream, from another by a stream of arrivals, without waiting; from
        the host, waiting."""
        row = self._shape[1:]
        if value.shape != row or not 0 <= index < self._shape[0]:
            raise InputError(f"a value of shape {value.shape} for row {index} of a buffer {self._shape}")
        size = math.prod(row) * self.element.size
        address, stream = self.address + index * size, self._memory.stream
        if isinstance(value, np.ndarray):
            encoded = np.empty(row, self.element.storage)
            encode(value, encoded, self.element)
            self.publish()
            stream.upload(address, encoded.reshape(-1).view(np.uint8))
            return
        tensor = value if isinstance(value, DeviceTensor) else DeviceTensor.taken(value, stream)
        if tensor.element is not self.element:
            raise InputError(f"a value of {tensor.element.name} for a buffer of {self.element.name}")
        near = tensor.stream.device == stream.device
        writer = tensor.stream if near else stream.arrivals
        if self._written_by not in (None, writer):
            self.publish()
        if near:
            stream.cuda.copy(address, tensor.address, size, "on device", writer.handle)
        else:
            writer.fetch(address, tensor.stream, tensor.address, size)
        self._written_by = writer
        if tensor is not value:
            stream.cuda.synchronize(stream.handle)  # whose memory it is may take it back now

    def publish(self) -> None:
        """What its stream is asked from now on comes after all writes so far; the host does not wait."""
        if self._written_by is not None:
            self._memory.stream.follow(self._written_by)
            self._written_by = None

    def read(self) -> Array:
        """A copy on the host; floats in float32."""
        self.publish()
        data = self._memory.stream.download(self.address, self.nbytes)
        return decode(data.view(self.element.storage).reshape(self._shape), self.element)

    def copy_from(self, other: Buffer) -> None:
        """Copies the whole of `other`, alike but for fewer rows, into the first rows; the host does not wait. Raises InputError: an engine's
        capacity does not grow."""
        if not isinstance(other, DeviceBuffer) or other.shape[1:] != self._shape[1:] or other.shape[0] > self._shape[0]:
            raise InputError(f"a buffer of shape {other.shape} cannot be copied into one of {self._shape}")
        stream = self._memory.stream
        self.publish()
        other.publish()
        stream.fetch(self.address, other._memory.stream, other.address, other.nbytes)  # to free the other waits for it

    def rows(self, first: int, count: int) -> DeviceBuffer:
        """Rows from `first` on, sharing memory; the same object each time, so that binding it again is free."""
        if first == 0:
            return self.view((count, *self._shape[1:]))
        if not 0 <= first <= first + count <= self._shape[0]:
            raise InputError(f"rows {first} to {first + count - 1} of a buffer of shape {self._shape}")
        if (first, count) not in self._rows:
            row = math.prod(self._shape[1:]) * self.element.size
            shape = (count, *self._shape[1:])
            self._rows[first, count] = DeviceBuffer(self._memory, shape, self.element, offset=self._offset + first * row)
        return self._rows[first, count]

    def copy_slots(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` slots of row `source` to row `target`, on the device, in the order of its stream; the host does not wait."""
        _, heads, capacity, size = self._shape
        head = capacity * size * self.element.size
        self.publish()
        stream = self._memory.stream
        for index in range(heads):
            there, here = (self.address + (row * heads + index) * head for row in (target, source))
            stream.cuda.copy(there, here, count * size * self.element.size, "on device", stream.handle)

    def view(self, shape: tuple[int, ...]) -> DeviceBuffer:
        """Its beginning in another shape, sharing memory; the same object each time. Raises InputError for a larger one."""
        if shape == self._shape:
            return self
        if math.prod(shape) > math.prod(self._shape):
            raise InputError(f"a buffer of shape {self._shape} has no room for the shape {shape}")
        if shape not in self._views:
            self._views[shape] = DeviceBuffer(self._memory, shape, self.element, offset=self._offset)
        return self._views[shape]
