"""Engines that need no TensorRT, under the sessions that run TensorRT's: same streams, buffers, graphs and checks, PyTorch for the arithmetic.

An engine here is a lowered graph (`torch_graph`) or a call of the phi kernel; its contexts take shapes and addresses and are enqueued on a
stream as TensorRT's contexts are. Tensors at those addresses reach PyTorch through DLPack, so nothing is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from flamingo_export.backends.base import Availability, SessionOptions
from flamingo_export.backends.placement import on_one
from flamingo_export.backends.tensorrt import dlpack
from flamingo_export.backends.tensorrt.cuda import Cuda
from flamingo_export.backends.tensorrt.device_memory import DeviceStream
from flamingo_export.backends.tensorrt.engine_contract import Contract, contract_of
from flamingo_export.backends.tensorrt.lowering.candidates import add_candidates
from flamingo_export.backends.tensorrt.lowering.lower import lower
from flamingo_export.backends.tensorrt.session import TensorRTSession
from flamingo_export.bundle.manifest import EngineRecord, GraphRecord, Manifest
from flamingo_export.errors import BackendError
from flamingo_export.precision import StorageType
from flamingo_export.specs import TensorSpec
from gpu.kernel_library import arguments
from gpu.torch_graph import Attend, TorchGraph

PLUGIN_FUNCTION = frozenset({"PhiCrossAttention"})
Tensors = dict[str, Tensor]
Compute = Callable[[Tensors, int], None]
"""(inputs and outputs by name, stream): computes the outputs where they lie."""


class Card(Protocol):
    """A device with PyTorch on it."""

    cuda: Cuda
    device: torch.device

    def enqueue(self, stream: int, work: Callable[[], None], pool: Any) -> None:
        """Runs what `work` asks of PyTorch on a stream; what it allocates comes from `pool`, if there is one."""

    def pool(self) -> Any:
        """Memory that graphs captured from it may keep using, or None."""

    def foreign(self, array: np.ndarray[Any, Any]) -> Any:
        """A tensor of PyTorch's on the device, to be handed over by DLPack."""


class RealCard:
    """The GPU that PyTorch and the CUDA runtime call by the same number."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.device = torch.device("cuda", cuda.dlpack_device[1])
        # As compiled engines in fp32, which compute in fp32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def enqueue(self, stream: int, work: Callable[[], None], pool: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self.device)), contextlib.ExitStack() as stack:
            if pool is not None:
                stack.enter_context(torch.cuda.use_mem_pool(pool, device=self.device))
            work()

    def pool(self) -> Any:
        return torch.cuda.MemPool()

    def foreign(self, array: np.ndarray[Any, Any]) -> Any:
        return torch.from_numpy(array).to(self.device)


class Engine:
    """Takes the place of a loaded TensorRT engine under a session."""

    def __init__(self, card: Card, stream: DeviceStream, contract: Contract, compute: Compute) -> None:
        self.trt = SimpleNamespace(__name__="torch", __version__=torch.__version__, ILogger=object)
        self.card, self.stream, self.contract, self.compute = card, stream, contract, compute
        self.tensors: dict[str, TensorSpec] = {t.name: t for t in (*contract.spec.inputs, *contract.spec.outputs)}
        self.enqueued = 0
        """Times that a context was run or captured; launches of captured graphs do not come here."""

    def context(self, profile: int, *, captured: bool) -> Context:
        return Context(self, profile, self.card.pool() if captured else None)

    def close(self) -> None:
        self.compute = _closed


def _closed(tensors: Tensors, stream: int) -> None:
    raise BackendError("the engine is closed")


@dataclass
class Context:
    """An engine with shapes and addresses, as TensorRT's IExecutionContext."""

    engine: Engine
    profile: int
    pool: Any

    def __post_init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        contract = self.engine.contract
        least, _, most = contract.bounds(self.engine.tensors[name], contract.profiles[self.profile])
        if len(shape) != len(least) or not all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self.engine.tensors

    def set_device_memory(self, address: int, size: int) -> None:
        """Activations are PyTorch's."""

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        tensors = {name: self._tensor(name, shape) for name, shape in self._all_shapes().items()}
        engine.enqueued += 1
        try:
            engine.card.enqueue(stream, lambda: engine.compute(tensors, stream), self.pool)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            raise BackendError(f"{engine.contract.spec.name} failed in PyTorch: {error}") from error
        return True

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            dims = self.engine.tensors[name].shape
            sizes.update((dim, size) for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str))
        return {name: self.engine.contract.shape(tensor, sizes) for name, tensor in self.engine.tensors.items()}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """What lies at an address. Whoever reads it does so on the same stream, so nobody waits."""
        element = self.engine.contract.element(self.engine.tensors[name])
        if 0 in shape:
            return torch.empty(shape, dtype=_DTYPES[element.name], device=self.engine.card.device)
        bits = (1, 8) if element.name == "fp8" else (element.code, element.bits)  # as bytes: not every PyTorch takes FP8
        capsule = dlpack.give(None, self._addresses[name], shape, *bits, *self.engine.card.cuda.dlpack_device)
        tensor: Tensor = torch.from_dlpack(capsule)  # type: ignore[attr-defined]
        return tensor.view(torch.float8_e4m3fn) if element.name == "fp8" else tensor


_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int64": torch.int64,
    "bool": torch.bool,
}


def kernel_attend(launch: Callable[[Any, int], None], stream: Callable[[], int]) -> Attend:
    """Calls of the phi kernel as `torch_graph` makes them. launch(arguments, stream); stream: the one that PyTorch is on."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, media_rows: Tensor, phi: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
    ) -> Tensor:
        q, k, v, media_rows, phi = (x.contiguous() for x in (q, k, v, media_rows, phi))
        y = torch.empty_like(q)
        launch(arguments(q, k, v, media_rows, phi, y, k_scale=k_scale, v_scale=v_scale), stream())
        return y

    return attend


class TorchBackend:
    """Follows backends.base.Backend. attend: computes the phi calls; None: the graphs' own bodies, of standard operators."""

    name = "torch-on-device"

    def __init__(self, card: Card, attend: Attend | None = None) -> None:
        self.card, self.attend = card, attend
        self.native_functions = PLUGIN_FUNCTION if attend is not None else frozenset()
        self.streams = DeviceStream(card.cuda, first=True), DeviceStream(card.cuda, first=False)
        self.sessions: list[TensorRTSession] = []
        self.engines: list[Engine] = []

    def availability(self) -> Availability:
        return Availability(usable=True, detail=f"PyTorch {torch.__version__} on {self.card.device}")

    def arithmetic(self, manifest: Manifest, options: SessionOptions) -> StorageType:
        """That of the lowered graphs."""
        return manifest.precision.storage

    def placement(self, bundle: Path, manifest: Manifest, options: SessionOptions) -> Mapping[str, str]:
        """All on the card."""
        return on_one(manifest, options)

    def build(self, bundle: Path, manifest: Manifest, graph: GraphRecord) -> EngineRecord | None:
        """None: graphs are lowered when they are opened."""
        return None

    def open(self, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions) -> TensorRTSession:
        """The graph as TensorRT would be given it, under TensorRT's session."""
        contract = contract_of(manifest, graph)
        model = ir.load(bundle / graph.file)
        ir.external_data.set_base_dir(model.graph, bundle)  # graphs of single layers lie elsewhere, their weights do not
        lowered = lower(
            model,
            compute=manifest.precision.storage,
            capacity=contract.capacity,
            native_functions=self.native_functions,
        )
        add_candidates(lowered, contract.spec, banned=manifest.config.banned_logits)
        computed = TorchGraph(lowered, self.card.device, self.attend)
        decoding = bool(contract.spec.aliases)
        engine = Engine(self.card, self.streams[0 if decoding else 1], contract, _graph(computed, contract))
        session = TensorRTSession(engine, contract, asynchronous=not decoding)
        self.sessions.append(session)
        self.engines.append(engine)
        return session


def _graph(graph: TorchGraph, contract: Contract) -> Compute:
    inputs = [tensor.name for tensor in contract.spec.inputs]
    outputs = [tensor.name for tensor in contract.spec.outputs if tensor.name not in contract.spec.aliases]

    def compute(tensors: Tensors, stream: int) -> None:
        with torch.no_grad():
            found: Mapping[str, Tensor] = graph({name: tensors[name] for name in inputs})
            for name in outputs:
                tensors[name].copy_(found[name])

    return compute
