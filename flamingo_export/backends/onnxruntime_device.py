"""ONNX Runtime on a GPU: the sessions of TensorRT's engines, with ONNX Runtime for what the engine computes.

    portable graph --lower--> 16 bits, caches of one capacity --> InferenceSession on our stream
    feeds, bank, caches, results: our device memory, bound by address; past and present are one address, so TensorScatter writes in place

Weights are read in the type that they are stored in, and products are computed in it: nothing is widened to fp32 on the way. Where each node
runs is checked when a graph is opened, since a heavy one on the CPU would move the caches over the bus at each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from flamingo_export.backends import onnxruntime_library
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.external_data import placed
from flamingo_export.backends.tensorrt.cuda import OUT_OF_MEMORY, Cuda, CudaRuntime, DeviceMemoryError
from flamingo_export.backends.tensorrt.device_memory import DeviceStream
from flamingo_export.backends.tensorrt.dtypes import ElementType
from flamingo_export.backends.tensorrt.engine_contract import Contract, contract_of
from flamingo_export.backends.tensorrt.engine_loading import check_room
from flamingo_export.backends.tensorrt.session import TensorRTSession
from flamingo_export.bundle.manifest import GraphRecord, Manifest
from flamingo_export.errors import BackendError, BundleError, first_line
from flamingo_export.specs import TensorSpec

CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
NEEDED = MappingProxyType(
    {"Attention": "1.25", "TensorScatter": "1.24", "MatMul": "1.20", "MatMulNBits": "1.20", "Conv": "1.20"}
)
"""Operators that must not run on the CPU, and the version of onnxruntime-gpu that has CUDA kernels of them as the graphs call them."""
PLACEMENT = "session.record_ep_graph_assignment_info"
WEIGHTS_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
UNAWAITED = "disable_synchronize_execution_providers"
_ONNX_NUMBERS = MappingProxyType({"bf16": 16, "fp8": 17})
"""Types that numpy has no name for, as TensorProto numbers them."""


@dataclass
class Place:
    """A device: its memory and streams, and what ONNX Runtime calls it."""

    cuda: Cuda
    streams: tuple[DeviceStream, DeviceStream]
    """Of the decoder, and of media that are encoded meanwhile."""
    provider: str = CUDA_PROVIDER
    device: str = "cuda"
    index: int = 0

    @classmethod
    def of(cls, index: int) -> Place:
        """A GPU by its number. Raises BackendError without CUDA provider, cuda-python, driver or such a GPU."""
        cuda = CudaRuntime(index)
        return cls(cuda, (DeviceStream(cuda, first=True), DeviceStream(cuda, first=False)), index=index)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Asks work of a stream: ONNX Runtime's kernels go to the stream that its session was opened with."""
        work()

    def providers(self, stream: DeviceStream) -> list[Any]:
        """As InferenceSession takes them."""
        return [(self.provider, provider_options(self.index, stream.handle)), CPU_PROVIDER]


def provider_options(index: int, stream: int) -> dict[str, str]:
    """Of the CUDA provider: on our stream, with memory as it is needed, without rounding fp32 products to TF32."""
    return {
        "device_id": str(index),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }


def open_on_device(
    place: Place, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions, settings: Any
) -> TensorRTSession:
    """A graph of a bundle on a device. settings: onnxruntime.SessionOptions to add to.

    Raises BackendError (memory, or an operator left to the CPU), BundleError if the file cannot be loaded.
    """
    onnxruntime = onnxruntime_library.load()
    contract = contract_of(manifest, graph)
    decoding = bool(contract.spec.aliases)
    stream = place.streams[0 if decoding else 1]
    data, folder, size = lowered(bundle, manifest, graph, contract)
    check_room(stream, graph.name, size, contract)
    settings.add_session_config_entry(WEIGHTS_FOLDER_KEY, str(folder))
    settings.add_session_config_entry(PLACEMENT, "1")
    try:
        session = onnxruntime.InferenceSession(data, settings, providers=place.providers(stream), enable_fallback=False)
    except Exception as error:
        if not isinstance(error, RuntimeError | MemoryError) and not type(error).__module__.startswith("onnxruntime."):
            raise
        if short_of_memory(error):
            raise DeviceMemoryError(
                "cudaErrorMemoryAllocation", f"{graph.name} does not fit on the GPU ({first_line(error)}). {OUT_OF_MEMORY}."
            ) from error
        raise BundleError(
            f"{bundle / graph.file} cannot be loaded by onnxruntime {onnxruntime.__version__} in {contract.compute}: {first_line(error)}. "
            "Check the bundle (flamingo-export inspect) or build it again."
        ) from error
    check_placement(session, place, contract, onnxruntime.__version__)
    engine = DeviceEngine(place, stream, contract, session, onnxruntime)
    # Which of its kernels may be captured differs by version, and is not known: docs/decisions/0020-onnxruntime-without-cuda-graphs.md.
    return TensorRTSession(engine, contract, asynchronous=not decoding, captures=False)


def lowered(bundle: Path, manifest: Manifest, graph: GraphRecord, contract: Contract) -> tuple[bytes, Path, int]:
    """The graph as it is computed, the folder that its weights' paths begin at, and their bytes.

    Floats are of the bundle's storage type and caches of its one capacity; functions at the seam keep bodies of standard operators, and the best
    candidates are chosen on the device. Raises BundleError if the graph cannot be read.
    """
    import onnx_ir as ir

    from flamingo_export.backends.tensorrt.lowering.candidates import add_candidates
    from flamingo_export.backends.tensorrt.lowering.lower import lower

    path = bundle / graph.file
    try:
        model = ir.load(path)
    except Exception as error:  # whatever protobuf makes of a file that is not a graph
        raise BundleError(f"{path} cannot be read: {first_line(error)}. Build the bundle again.") from error
    ir.external_data.set_base_dir(model.graph, bundle)  # graphs of single layers lie elsewhere, their weights do not
    lower(model, compute=contract.compute, capacity=contract.capacity, native_functions=frozenset())
    for each in (model.graph, *(function.graph for function in model.functions.values())):
        for node in each:
            node.attributes.pop("TRT_decomposable", None)  # TensorRT's own
    add_candidates(model, contract.spec, banned=manifest.config.banned_logits)
    proto = ir.serde.serialize_model(model)
    folder = placed(bundle, path, proto)
    size = sum(
        int(entry.value) for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "length"
    )
    return proto.SerializeToString(), folder, size


def check_placement(session: Any, place: Place, contract: Contract, version: str) -> None:
    """Raises BackendError if the provider is not there, or heavy operators are left to the CPU."""
    if place.provider not in session.get_providers():
        raise BackendError(
            f"{place.provider} did not load: onnxruntime {version} runs on {', '.join(session.get_providers())}. It needs CUDA and cuDNN of the "
            "version it was built with: see `python -c 'import onnxruntime; onnxruntime.print_debug_info()'`."
        )
    if place.provider == CPU_PROVIDER:
        return
    left = on_cpu(session)
    heavy = [name for name in NEEDED if left[name]]
    if heavy:
        counted = ", ".join(f"{name} ({left[name]})" for name in heavy)
        needed = max((NEEDED[name] for name in heavy), key=lambda text: tuple(map(int, text.split("."))))
        raise BackendError(
            f"{contract.spec.name}: onnxruntime-gpu {version} leaves {counted} to the CPU in {contract.compute}, so caches would cross the bus "
            f"at each step. CUDA kernels for them are in {needed} and later, in fp16 and fp32: install it, build with --storage fp16, or use "
            "--device cpu."
        )


def on_cpu(session: Any) -> Counter[str]:
    """Operators that run on the CPU, by name. The session must have been opened with PLACEMENT."""
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == CPU_PROVIDER:
            found.update(node.op_type for node in part.get_nodes())
    return found


def short_of_memory(error: Exception) -> bool:
    """Whether memory is what an error is about."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("failed to allocate", "out of memory", "bad_alloc", "memoryallocation")
    )


class DeviceEngine:
    """Takes the place of a loaded TensorRT engine under a session."""

    def __init__(self, place: Place, stream: DeviceStream, contract: Contract, session: Any, onnxruntime: Any) -> None:
        self.trt = SimpleNamespace(__name__="onnxruntime", __version__=onnxruntime.__version__, ILogger=object)
        self.place, self.stream, self.contract, self.session = place, stream, contract, session
        self.tensors: dict[str, TensorSpec] = {t.name: t for t in (*contract.spec.inputs, *contract.spec.outputs)}
        # What the stream was asked is waited for where results are wanted, and not at the end of each run.
        self.how = onnxruntime.RunOptions()
        self.how.add_run_config_entry(UNAWAITED, "1")

    def context(self, profile: int, *, captured: bool) -> DeviceContext:
        """One set of bindings; every profile has its own."""
        return DeviceContext(self, profile)

    def close(self) -> None:
        """Frees graph and weights."""
        self.session = None


class DeviceContext:
    """A session with shapes and addresses, as TensorRT's IExecutionContext."""

    def __init__(self, engine: DeviceEngine, profile: int) -> None:
        self._engine, self._profile = engine, profile
        self._binding = engine.session.io_binding()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return name in self._engine.tensors

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.tensors

    def set_device_memory(self, address: int, size: int) -> None:
        """Activations are in ONNX Runtime's own arena."""

    def execute_async_v3(self, stream: int) -> bool:
        """Asks a run of the stream. Raises BackendError if it fails."""
        engine = self._engine
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            dims = engine.tensors[name].shape
            sizes.update((dim, size) for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str))
        places = {
            name: (self._addresses[name], engine.contract.shape(tensor, sizes)) for name, tensor in engine.tensors.items()
        }
        engine.place.enqueue(stream, lambda: self._run(places))
        return True

    def _run(self, places: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        engine = self._engine
        place, outputs = engine.place, {tensor.name for tensor in engine.contract.spec.outputs}
        for name, (address, shape) in places.items():
            if self._bound.get(name) == (address, shape):
                continue
            bind = self._binding.bind_output if name in outputs else self._binding.bind_input
            bind(name, place.device, place.index, _type(engine.contract.element(engine.tensors[name])), list(shape), address)
            self._bound[name] = (address, shape)
        try:
            engine.session.run_with_iobinding(self._binding, engine.how)
        except Exception as error:
            if not isinstance(error, RuntimeError | MemoryError) and not type(error).__module__.startswith("onnxruntime."):
                raise
            what = f"{engine.contract.spec.name} failed in onnxruntime {engine.trt.__version__}: {first_line(error)}"
            if short_of_memory(error):
                raise DeviceMemoryError("cudaErrorMemoryAllocation", f"{what}. {OUT_OF_MEMORY}.") from error
            raise BackendError(f"{what}. The bundle may be damaged: flamingo-export parity checks it.") from error


def _type(element: ElementType) -> Any:
    return _ONNX_NUMBERS.get(element.name, element.storage.type)
