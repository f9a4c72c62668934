"""TensorRT for RTX as far as sessions use it, for tests on machines without a GPU: an engine is a lowered graph run by ONNX Runtime.

It reads and writes memory of the fake CUDA device at the addresses that were set, when the stream comes to it, with the shapes that were set
when it was enqueued; refuses sizes beyond its profiles, and what was not set. tests/plugin checks that every name here is one of the real
bindings.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_cuda import FakeCuda, Misuse

from flamingo_export.backends.tensorrt.engine_contract import Contract

VERSION = "1.7.1.116"


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, BOOL = range(5)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class SeekPosition(enum.Enum):
    SET, CUR, END = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class ILogger:
    def __init__(self) -> None:
        pass


class IStreamReaderV2:
    def __init__(self) -> None:
        pass


_DTYPES = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, np.float32),
    onnx.TensorProto.FLOAT16: (DataType.HALF, np.float16),
    onnx.TensorProto.INT64: (DataType.INT64, np.int64),
    onnx.TensorProto.BOOL: (DataType.BOOL, np.bool_),
}


class RuntimeCache:
    def __init__(self) -> None:
        self.data = b""

    def deserialize(self, data: bytes) -> bool:
        self.data = bytes(data)
        return True

    def serialize(self) -> bytes:
        return self.data + b"kernel;"


class RuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


def write_engine(
    path: Path, graph: Path, contract: Contract, *, activations: int = 1 << 16, changes: Mapping[str, Any] | None = None
) -> None:
    """An engine file: the graph that it runs, its profiles, what it takes. `changes` make it another engine than the contract's."""
    described = {
        "magic": "fake engine",
        "version": VERSION,
        "graph": str(graph),
        "activations": activations,
        "aliases": dict(contract.spec.aliases),
        "profiles": [
            {tensor.name: contract.bounds(tensor, profile) for tensor in contract.spec.inputs} for profile in contract.profiles
        ],
        **(changes or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described))


class Engine:
    def __init__(self, trt: FakeTensorRT, described: dict[str, Any]) -> None:
        self._trt = trt
        self.cuda = trt.cuda.machine.current
        """The device that it was loaded to."""
        self.aliases = described["aliases"]
        self.profiles = [
            {name: tuple(tuple(shape) for shape in bounds) for name, bounds in profile.items()}
            for profile in described["profiles"]
        ]
        graph = Path(described["graph"])
        model = onnx.load(graph, load_external_data=False)
        for owner in (model.graph, *model.functions):
            for node in owner.node:
                kept = [attribute for attribute in node.attribute if attribute.name != "TRT_decomposable"]
                del node.attribute[:]
                node.attribute.extend(kept)
        runnable = graph.with_name(f".{graph.name}.fake.onnx")
        onnx.save(model, runnable)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(runnable, options)
        runnable.unlink()
        self.tensors = {
            value.name: (
                mode,
                _DTYPES[value.type.tensor_type.elem_type],
                [d.dim_value or -1 for d in value.type.tensor_type.shape.dim],
            )
            for mode, values in ((TensorIOMode.INPUT, model.graph.input), (TensorIOMode.OUTPUT, model.graph.output))
            for value in values
        }
        self.device_memory_size_v2 = described["activations"]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(self.profiles)
        self.cuda.memory -= 1 << 20  # its weights

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name][1][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][2])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return list(self.profiles[index][name])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Any) -> Context | None:
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise Misuse("memory of its own for each context")
        self._check_device()
        self._trt.contexts += 1
        return Context(self._trt, self, how)

    def _check_device(self) -> None:
        """Calls go to the thread's current device, whatever device the engine is on."""
        if self.cuda is not self._trt.cuda.machine.current:
            raise Misuse(
                f"an engine on device {self.cuda.index} was used while {self._trt.cuda.machine.current.index} is current"
            )


class Context:
    def __init__(self, trt: FakeTensorRT, engine: Engine, how: Any) -> None:
        self._trt, self._engine, self.how = trt, engine, how
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._enqueued: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile, self._shapes = profile, {}
        return 0 <= profile < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "no profile was chosen"
        least, _, most = self._engine.profiles[self._profile][name]
        if len(shape) != len(least) or not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            self._trt.error(f"{name} has shape {shape}, profile {self._profile} has {least} to {most}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.tensors:
            return False
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self._memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        engine, cuda = self._engine, self._engine.cuda
        engine._check_device()
        absent = [
            name for name, (mode, *_) in engine.tensors.items() if mode is TensorIOMode.INPUT and name not in self._shapes
        ]
        absent += [name for name in engine.tensors if name not in self._addresses]
        if absent:
            self._trt.error(f"{absent} were not set")
            return False
        if self._memory[1] < engine.device_memory_size_v2 or self._memory[0] % 256:
            self._trt.error(f"no memory for activations: {self._memory}")
            return False
        capturing = cuda._stream(stream).captured is not None
        if capturing and self._enqueued != self._shapes:
            self._trt.error("captured without having been enqueued with these shapes before")
            return False
        if self._trt.refuse_capture and capturing:
            self._trt.error("not capturable")
            return False
        for output, source in engine.aliases.items():
            if self._addresses[output] != self._addresses[source]:
                raise Misuse(f"{output} is not where {source} is")
        self._enqueued = dict(self._shapes)
        self._trt.enqueued += 1
        shapes, addresses, memory = dict(self._shapes), dict(self._addresses), self._memory
        cuda.ask(stream, lambda: self._compute(shapes, addresses, memory))
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], memory: tuple[int, int]) -> None:
        engine, cuda = self._engine, self._engine.cuda
        cuda.view(*memory).fill(0xEE)  # activations of whoever ran before are gone
        feeds = {}
        for name, shape in shapes.items():
            dtype = np.dtype(engine.tensors[name][1][1])
            size = math.prod(shape) * dtype.itemsize
            feeds[name] = cuda.view(addresses[name], size).view(dtype).reshape(shape).copy()
        outputs = [name for name, (mode, *_) in engine.tensors.items() if mode is TensorIOMode.OUTPUT]
        for name, value in zip(outputs, engine.session.run(outputs, feeds), strict=True):
            data = np.ascontiguousarray(value)
            assert data.dtype == engine.tensors[name][1][1]
            if data.size:
                cuda.view(addresses[name], data.nbytes)[:] = data.reshape(-1).view(np.uint8)


class FakeTensorRT(ModuleType):
    """The module. `refuse_capture`: engines fail in a capture. `said`: what deserialising says instead of giving an engine."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("tensorrt_rtx")
        self.__version__ = VERSION
        self.cuda = cuda
        self.contexts = self.enqueued = 0
        self.refuse_capture = False
        self.said: str | None = None
        self._logger: Any = None
        trt = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                trt._logger = logger

            def deserialize_cuda_engine(self, reader: Any) -> Engine | None:
                reader.seek(0, SeekPosition.SET)
                data = b""
                while part := reader.read(1000, 0):  # in pieces
                    data += part
                try:
                    described = json.loads(data)
                except ValueError:
                    trt.error("magicTag Assertion failed: the file is not an engine")
                    return None
                if trt.said:
                    trt.error(trt.said)
                    return None
                return Engine(trt, described)

        self.Builder = object
        self.Runtime = Runtime
        self.ILogger, self.IStreamReaderV2 = ILogger, IStreamReaderV2
        self.DataType, self.TensorIOMode, self.SeekPosition = DataType, TensorIOMode, SeekPosition
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def error(self, text: str) -> None:
        self._logger.log(1, text)
