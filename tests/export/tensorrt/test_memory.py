"""ElementType types against ml_dtypes, DLPack against numpy and torch, buffers and streams on the fake device, and what that forbids."""

from __future__ import annotations

import gc
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from fake_cuda import FakeCuda, Misuse

from flamingo_export.backends.tensorrt import dlpack
from flamingo_export.backends.tensorrt.cuda import CudaError
from flamingo_export.backends.tensorrt.device_memory import DeviceBuffer, DeviceStream, DeviceTensor
from flamingo_export.backends.tensorrt.dtypes import ELEMENT_TYPES, decode, element_type, element_type_from_dlpack, encode
from flamingo_export.errors import InputError

FP32, FP16, BF16, INT64 = (ELEMENT_TYPES[name] for name in ("fp32", "fp16", "bf16", "int64"))


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def stream(cuda) -> DeviceStream:
    return DeviceStream(cuda, first=True)


# ElementType types.


def test_bf16_is_rounded_as_ml_dtypes_does():
    """Every upper half of a float with the lower halves at which rounding turns, and random bits: ties, denormals, infinities, any NaN."""
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    turns = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    drawn = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    value = np.concatenate([(upper | turns).reshape(-1), drawn]).view(np.float32)
    found = np.empty(value.shape, np.uint16)
    encode(value, found, BF16)
    with np.errstate(invalid="ignore"):
        expected = value.astype(ml_dtypes.bfloat16)
    nan = np.isnan(value)
    assert np.array_equal(found[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(decode(found, BF16)[nan]).all()
    assert np.array_equal(decode(found, BF16)[~nan], expected.astype(np.float32)[~nan])


def test_every_element_comes_back():
    for element in ELEMENT_TYPES.values():
        assert element_type_from_dlpack(element.code, element.bits) is element
        value = np.array([[1, 0], [3, 1]]).astype(
            np.float32 if element.storage.kind == "f" or element is BF16 else element.storage
        )
        stored = np.empty(value.shape, element.storage)
        encode(value, stored, element)
        assert decode(stored, element).dtype == value.dtype
        assert np.array_equal(decode(stored, element), value)
    assert element_type("float", "bf16") is BF16
    assert element_type("fp32", "bf16") is FP32
    over = np.empty(1, np.float16)
    encode(np.array([1e6], np.float32), over, FP16)
    assert np.isinf(over).all()
    with pytest.raises(InputError, match="float32 was given, int64 is expected"):
        encode(np.ones(1, np.float32), np.empty(1, np.int64), INT64)
    with pytest.raises(InputError, match="int64 was given, floats are expected"):
        encode(np.ones(1, np.int64), np.empty(1, np.uint16), BF16)
    with pytest.raises(InputError, match="type code 2 with 64 bits"):
        element_type_from_dlpack(2, 64)


# DLPack.


class Exported:
    """A tensor of another library on DLPack device `device`."""

    def __init__(self, array: np.ndarray, device: int = dlpack.CUDA) -> None:
        self.array, self.device = array, device
        self.streams: list[int | None] = []

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, *, stream: int | None = None) -> object:
        self.streams.append(stream)
        return dlpack.give(self.array, self.array.ctypes.data, self.array.shape, 2, 32)


class OnHost:
    """What numpy is given: our capsule, said to lie on the host."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_) -> object:
        return dlpack.give(self.array, self.array.ctypes.data, self.array.shape, 2, 32, device=1)


@pytest.mark.slow
def test_numpy_reads_our_capsules_and_we_numpys():
    gc.collect()
    before = len(dlpack._given)
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = np.from_dlpack(cast("Any", OnHost(array)))
    assert np.array_equal(found, array)
    assert found.ctypes.data == array.ctypes.data
    assert len(dlpack._given) == before + 1
    del found
    gc.collect()
    assert len(dlpack._given) == before  # its deleter was called
    taken = dlpack.take(array, stream=cast("int", None), devices=(1,))
    assert (taken.address, taken.shape, taken.code, taken.bits) == (array.ctypes.data, (3, 4), 2, 32)
    with pytest.raises(InputError, match="not contiguous"):
        dlpack.take(array.T, stream=cast("int", None), devices=(1,))
    dlpack.give(array, array.ctypes.data, (3, 4), 2, 32)  # nobody takes it
    gc.collect()
    assert len(dlpack._given) == before


def test_torch_reads_our_capsules():
    torch = pytest.importorskip("torch")
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert torch.equal(torch.from_dlpack(OnHost(array)), torch.from_numpy(array))


def test_what_others_have_is_taken_on_our_stream(stream):
    other = Exported(np.ones((2, 3), np.float32))
    tensor = DeviceTensor.taken(other, stream)
    assert other.streams == [stream.handle]
    assert (tensor.shape, tensor.element, tensor.address) == ((2, 3), FP32, other.array.ctypes.data)
    with pytest.raises(InputError, match=r"DLPack device \(1, 0\)"):
        DeviceTensor.taken(np.ones(3), stream)
    with pytest.raises(InputError, match="neither an array of the host nor"):
        DeviceTensor.taken("text", stream)


def test_others_wait_for_our_stream(cuda, stream):
    tensor = DeviceTensor.empty(stream, (2, 3), FP32)
    cuda.fill(tensor.address, 0, tensor.nbytes, stream.handle)
    theirs = cuda.stream(first=False)
    seen = []
    taken = dlpack.take(Handed(tensor), stream=theirs)
    cuda.ask(theirs, lambda: seen.append(cuda.view(taken.address, tensor.nbytes).view(np.float32).copy()))
    cuda.synchronize(theirs)  # not ours
    assert np.array_equal(seen[0], np.zeros(6))
    assert tensor.__dlpack_device__() == (2, 0)


class Handed:
    """A consumer's view of our tensor."""

    def __init__(self, tensor: DeviceTensor) -> None:
        self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__


# Buffers, tensors and streams.


@pytest.mark.parametrize("element", [FP32, FP16, BF16])
def test_buffers_hold_what_is_written(cuda, stream, element):
    other = DeviceStream(cuda, first=False)
    buffer = DeviceBuffer.zeroed(stream, (3, 2, 4), element)
    assert not buffer.read().any()
    rows = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    for index in range(2):
        buffer.write(index, rows[index])
    source = DeviceBuffer.zeroed(other, (1, 2, 4), element)
    source.write(0, rows[2])
    tensor = DeviceTensor(source, source.address, (1, 2, 4), element, other)
    buffer.write(2, tensor[0])
    assert np.array_equal(buffer.read(), rows)
    assert np.array_equal(tensor.read()[0], rows[2])
    assert np.array_equal(buffer.rows(0, 2).read(), rows[:2])
    assert buffer.rows(0, 2) is buffer.rows(0, 2)
    assert buffer.rows(0, 2).address == buffer.address
    middle = buffer.rows(1, 2)
    assert middle is buffer.rows(1, 2)
    assert np.array_equal(middle.read(), rows[1:])
    assert np.array_equal(middle.rows(1, 1).read(), rows[2:])
    cache = DeviceBuffer.zeroed(stream, (2, 3, 5, 4), element)
    values = np.arange(60, dtype=np.float32).reshape(3, 5, 4)
    cache.write(0, values)
    cache.rows(0, 2).copy_slots(0, 1, 2)
    assert np.array_equal(cache.read()[1, :, :2], values[:, :2])
    assert not cache.read()[1, :, 2:].any()
    with pytest.raises(InputError, match="rows 2 to 3 of a buffer"):
        buffer.rows(2, 2)
    grown = DeviceBuffer.zeroed(stream, (5, 2, 4), element)
    grown.copy_from(buffer)
    assert np.array_equal(grown.read()[:3], rows)
    for value in (rows[0, 0], rows):
        with pytest.raises(InputError, match="for row 0 of a buffer"):
            buffer.write(0, value)
    with pytest.raises(InputError, match="cannot be copied into"):
        buffer.copy_from(DeviceBuffer.zeroed(stream, (2, 2, 5), element))
    with pytest.raises(InputError, match="cannot take the shape"):
        tensor.reshape(3, 3)
    with pytest.raises(IndexError):
        tensor[1]


def test_what_another_lane_wrote_is_waited_for_once_published(cuda, stream):
    """The fake does what a stream is asked when it is waited for: without `publish` the reader would see zeros."""
    other = DeviceStream(cuda, first=False)
    buffer = DeviceBuffer.zeroed(stream, (1, 4), FP32)
    tensor = DeviceTensor.empty(other, (1, 4), FP32)
    cuda.fill(tensor.address, 1, tensor.nbytes, other.handle)
    buffer.write(0, tensor[0])
    seen = []
    peek = lambda: seen.append(cuda.view(buffer.address, 16)[0])  # noqa: E731
    cuda.ask(stream.handle, peek)
    cuda.synchronize(stream.handle)
    buffer.publish()
    cuda.ask(stream.handle, peek)
    cuda.synchronize(stream.handle)
    assert seen == [0, 1]


def test_memory_comes_back_in_the_order_of_its_lane(cuda, stream):
    used = cuda.used
    tensor = DeviceTensor.empty(stream, (1000,), FP32)
    cuda.fill(tensor.address, 0, tensor.nbytes, stream.handle)
    assert cuda.used == used + 4000
    del tensor
    gc.collect()
    assert cuda.used == used + 4000  # what was asked before is still to come
    cuda.synchronize(stream.handle)
    assert cuda.used == used


def test_lanes_share_one_block_of_activations(cuda, stream):
    stream.reserve(1000)
    first = stream.activations
    stream.reserve(500)
    assert stream.activations is first
    stream.reserve(2000)
    assert stream.activations.size == 2000
    del first
    gc.collect()
    assert cuda.used == 2000


# The fake itself: what it must not let pass.


def test_the_fake_finds_misuse(cuda):
    stream, device, pinned = cuda.stream(first=False), cuda.malloc(64), cuda.malloc_host(64)
    with pytest.raises(Misuse, match="go beyond an allocation of 64"):
        cuda.copy(device, pinned, 65, "to device", stream)
    with pytest.raises(Misuse, match="not allocated"):
        cuda.copy(device, np.zeros(64, np.uint8).ctypes.data, 64, "to device", stream)
    with pytest.raises(Misuse, match=r"device memory .* used as pinned"):
        cuda.copy(device, device, 64, "to device", stream)
    with pytest.raises(Misuse, match="a stream that is not there"):
        cuda.copy(device, pinned, 64, "to device", 3)
    cuda.copy(device, pinned, 64, "to device", stream)
    cuda.free_async(device, stream)
    cuda.copy(device, pinned, 64, "to device", stream)
    with pytest.raises(Misuse, match="not any more"):
        cuda.synchronize(stream)
    cuda.begin_capture(stream)
    for call in (lambda: cuda.malloc(4), lambda: cuda.synchronize(stream)):
        with pytest.raises(CudaError, match="during a capture"):
            call()
    cuda.abandon_capture(stream)
    cuda.destroy_stream(stream)
    with pytest.raises(Misuse, match="a stream that is not there"):
        cuda.synchronize(stream)
