"""ONNX Runtime: runs the portable graphs as they are, on the CPU or through the CUDA provider.

Buffers live in host memory and are shared with ONNX Runtime, not copied: `OrtValue.ortvalue_from_numpy` keeps the array's memory, and one
value bound both as cache input and as its aliased output makes TensorScatter write in place. On a GPU (`--device cuda`) nothing of this holds:
`onnxruntime_device` lowers the graphs to 16 bits and keeps all in the device's memory.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flamingo_export.backends import onnxruntime_library
from flamingo_export.backends.base import (
    Availability,
    Buffer,
    Capabilities,
    HostSession,
    Session,
    SessionOptions,
    Tensor,
    check_feeds,
    on_host,
)
from flamingo_export.backends.cut_tables import CutTables
from flamingo_export.backends.external_data import loadable
from flamingo_export.backends.host_array import HostArray
from flamingo_export.backends.host_memory import release
from flamingo_export.backends.placement import on_one, placed
from flamingo_export.bundle.manifest import EngineRecord, GraphRecord, Manifest
from flamingo_export.errors import BackendError, BundleError, InputError, first_line, pip_install
from flamingo_export.machine import physical_cores
from flamingo_export.precision import Policy, StorageType
from flamingo_export.specs import KIND_DTYPES, SubgraphSpec, decoder_spec, subgraph_specs
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.decoder_cuts import graph_bytes
from flamingo_reference.arrays import Array

# Types that numpy has no name for, as TensorProto numbers them: onnx is not needed to run a bundle.
_ONNX_TYPES = {np.dtype(ml_dtypes.bfloat16): 16, np.dtype(ml_dtypes.float8_e4m3fn): 17}
_INSTALL_CUDA = f"Uninstall onnxruntime, then install the build for GPUs, with CUDA 13 and its driver: {pip_install('gpu')}"


class OnnxRuntimeBackend:
    """Portable graphs on ONNX Runtime."""

    name = "onnxruntime"
    capabilities = Capabilities(fp8_products=False, widens_weights=True, host_threads=True)
    native_functions: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._places: dict[int, Any] = {}
        """GPUs in use, by number: `onnxruntime_device.Place`."""

    def availability(self) -> Availability:
        """Usable where an onnxruntime is installed that can run bundles; `detail` names version and providers."""
        try:
            import onnxruntime
        except ImportError as error:
            return Availability(
                usable=False, detail=f"onnxruntime cannot be imported ({error})", remedy=onnxruntime_library.INSTALL
            )
        fault = onnxruntime_library.too_old(onnxruntime.__version__)
        if fault:
            return Availability(usable=False, detail=fault, remedy=onnxruntime_library.INSTALL)
        providers = [provider.removesuffix("ExecutionProvider") for provider in onnxruntime.get_available_providers()]
        return Availability(usable=True, detail=f"onnxruntime {onnxruntime.__version__}, providers: {', '.join(providers)}")

    def arithmetic(self, manifest: Manifest, options: SessionOptions) -> StorageType:
        """fp32 on the CPU, whatever type weights are stored in; on a GPU the storage type."""
        return "fp32" if options.gpu is None else manifest.precision.storage

    def placement(self, bundle: Path, manifest: Manifest, options: SessionOptions) -> Mapping[str, str]:
        """The GPU of each graph. Raises BackendError (no such GPU, no room)."""
        if len(options.gpus) < 2:
            return on_one(manifest, options)
        sizes = WeightIndex.read(bundle).sizes()
        weights = {graph.name: graph_bytes(manifest.config, sizes, graph) for graph in manifest.graphs}
        gpus = {gpu: self._place(gpu).cuda.free_memory() for gpu in options.gpus}
        return placed(manifest, weights, sizes, gpus)

    def build(self, bundle: Path, manifest: Manifest, graph: GraphRecord) -> EngineRecord | None:
        """None: the portable graph is run as it is."""
        return None

    def open(self, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions) -> Session:
        """Opens a graph of the bundle.

        Raises BackendError if onnxruntime or the asked device is missing, it is too old or memory is short, BundleError if the file cannot
        be loaded.
        """
        onnxruntime = onnxruntime_library.load()
        config = manifest.config
        spec = (
            subgraph_specs(config, media=manifest.precision.media)[graph.name]
            if graph.layers is None
            else decoder_spec(config, range(*graph.layers), name=graph.name, media=manifest.precision.media)
        )
        path = bundle / graph.file
        settings = session_options(options, manifest.precision.policy)
        if (gpu := options.gpu) is not None:
            return self._on_gpu(gpu, bundle, manifest, graph, options, settings)
        source, folder = loadable(bundle, path)
        if folder is not None:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            session = onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"], enable_fallback=False)
        except MemoryError as error:
            raise BackendError(f"{path} does not fit in memory. {_MEMORY_ADVICE}") from error
        except Exception as error:
            if _is_memory(error):
                raise BackendError(f"{path} does not fit in memory ({first_line(error)}). {_MEMORY_ADVICE}") from error
            if not _is_ort_error(error):
                raise
            raise BundleError(
                f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}: {first_line(error)}. "
                "Check the bundle (flamingo-export inspect) or build it again."
            ) from error
        release()  # opening NFNet-F6 leaves 2.3 GB freed but kept
        tables = [value.name for value in session.get_overridable_initializers()]
        return OnnxRuntimeSession(session, spec, CutTables(bundle, tables) if tables else None)

    def _on_gpu(
        self, gpu: int, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions, settings: Any
    ) -> Session:
        """Device memory and 16 bits. Imported when it is asked for: it needs what builds and lowers graphs."""
        place = self._place(gpu)
        device = importlib.import_module("flamingo_export.backends.onnxruntime_device")
        session: Session = device.open_on_device(place, bundle, manifest, graph, options, settings)
        return session

    def _place(self, gpu: int) -> Any:
        """A GPU's memory and lanes. Raises BackendError."""
        import onnxruntime

        if gpu not in self._places and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BackendError(f"this onnxruntime {onnxruntime.__version__} has no CUDA provider. {_INSTALL_CUDA}.")
        if gpu not in self._places:
            self._places[gpu] = importlib.import_module("flamingo_export.backends.onnxruntime_device").Place.of(gpu)
        return self._places[gpu]


_MEMORY_ADVICE = "Free memory, or build with 16-bit storage or a smaller size."


def session_options(wanted: SessionOptions, policy: Policy | None) -> Any:
    """ONNX Runtime's options for a session of a bundle's graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if wanted.lean:
        # Without the blocked layout of convolutions, whose weights are in memory twice while it is made: NFNet-F6 opens in 1.7 GB, not 4.1.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = wanted.threads or physical_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Each session has its own pool: one that spins after its work would take a core from the next session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if policy is not None and policy.needs_ranges:
        # There is no FP8 product on the CPU. Left to itself ONNX Runtime widens the weights at each call, which takes 25 times as long as
        # a product of fp32 (or refuses the graph); set to leave the pairs as they are it widens them once, when opening.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Blocks of int4 and int8 are multiplied with activations rounded to 8 bits in blocks: three times as fast as in fp32, and the only
    # level at which 8-bit weights have a kernel of their own.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    # Plans of one shape are of no use to the next: prompts differ in length, the cache grows.
    options.enable_mem_pattern = False
    return options


class HostBuffer(HostArray):
    """A tensor in host memory that ONNX Runtime reads and writes in place."""

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.value = _ort_value(array)
        self._views: dict[tuple[int, ...], HostBuffer] = {}
        self._rows: dict[tuple[int, int], HostBuffer] = {}

    def rows(self, first: int, count: int) -> HostBuffer:
        """Rows from `first` on, sharing memory; the same object each time, so that binding it again is free."""
        if (first, count) == (0, len(self.array)):
            return self
        if (first, count) not in self._rows:
            self._rows[first, count] = HostBuffer(self.array[first : first + count])
        return self._rows[first, count]

    def view(self, shape: tuple[int, ...]) -> HostBuffer:
        """Its beginning in another shape, sharing memory; the same object each time."""
        if shape == self.array.shape:
            return self
        if shape not in self._views:
            self._views[shape] = HostBuffer(self.array.reshape(-1)[: math.prod(shape)].reshape(shape))
        return self._views[shape]


class OnnxRuntimeSession(HostSession):
    """One opened graph. What does not change from call to call stays bound; feeds are copied into inputs bound once per shape."""

    def __init__(self, session: Any, spec: SubgraphSpec, tables: CutTables | None = None) -> None:
        self._session = session
        self._tables = tables
        self._binding = session.io_binding()
        self._spec = spec
        self.reads_bound_media = any(tensor.name == "first_media" for tensor in spec.inputs)
        self._alias_of = {source: output for output, source in spec.aliases.items()}
        self._kinds = {tensor.name: KIND_DTYPES[tensor.kind] for tensor in spec.inputs}
        self._outputs = {tensor.name for tensor in spec.outputs if tensor.name not in spec.aliases}
        self._bound: dict[str, HostBuffer] = {}
        self._feeds: dict[str, Array] = {}
        """Arrays that the runtime reads for inputs that are fed; each keeps alive the memory bound for it."""
        self._checked: dict[tuple[Any, ...], list[tuple[str, tuple[int, ...], Any]]] = {}

    @property
    def spec(self) -> SubgraphSpec:
        return self._spec

    def allocate(self, name: str, shape: tuple[int, ...]) -> HostBuffer:
        """A zeroed buffer for input `name`; pages that are never touched take no memory. Raises BackendError if there is no room for it."""
        try:
            return HostBuffer(np.zeros(shape, self._kinds[name]))
        except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
            raise BackendError(
                f"{self._spec.name}: {name} of {'x'.join(map(str, shape))} does not fit in memory ({first_line(error)}). "
                "Free memory, or build with smaller limits (build --max-length)."
            ) from error

    def bind(self, name: str, buffer: Buffer) -> None:
        """Input `name`, and the output that aliases it, or output `name`, are this buffer from now on. Raises InputError for an unknown one."""
        if not isinstance(buffer, HostBuffer):
            raise InputError(
                f"{self._spec.name}: a buffer of another backend was bound to {name}; allocate it with this session"
            )
        if name not in self._kinds and name not in self._outputs:
            raise InputError(f"{self._spec.name}: {name} is not an input, nor an output with memory of its own")
        if self._bound.get(name) is buffer:
            return
        self._check_open()
        if name in self._kinds:
            self._binding.bind_ortvalue_input(name, buffer.value)
        written = self._alias_of.get(name, name if name in self._outputs else None)
        if written is not None:
            self._binding.bind_ortvalue_output(written, buffer.value)
        self._bound[name] = buffer
        self._checked.clear()

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        """Outputs that are not bound, as fresh arrays. Raises InputError for feeds that break the contract, BackendError if running fails."""
        given = {name: on_host(name, value) for name, value in feeds.items()}
        results_of = self._outputs_for(given)
        for name, value in given.items():
            held = self._feeds.get(name)
            if held is None or held.shape != value.shape:
                held = self._hold(name, value)
            np.copyto(held, value)
        results = {}
        for name, shape, dtype in results_of:
            array = results[name] = np.empty(shape, dtype)
            self._binding.bind_ortvalue_output(name, _ort_value(array))
        try:
            if self._tables is not None:
                self._tables.fit(self._shape_of("key_positions", given)[-1], self._bind_table)
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            if not _is_ort_error(error) and not isinstance(error, MemoryError):
                raise
            advice = _MEMORY_ADVICE if _is_memory(error) else "The bundle may be damaged: flamingo-export parity checks it."
            raise BackendError(f"{self._spec.name} failed in onnxruntime: {first_line(error)}. {advice}") from error
        return results if outputs is None else {name: results[name] for name in outputs}

    def close(self) -> None:
        """Frees graph and weights; buffers stay valid."""
        self._binding = self._session = self._tables = None
        self._bound, self._feeds, self._checked = {}, {}, {}

    def _check_open(self) -> None:
        if self._session is None:
            raise BackendError(f"{self._spec.name}: the session is closed. Load the bundle again.")

    def _hold(self, name: str, value: Array) -> Array:
        held = np.empty(value.shape, self._kinds[name])
        self._binding.bind_ortvalue_input(name, _ort_value(held))
        self._feeds[name] = held
        return held

    def _bind_table(self, name: str, table: Array) -> None:
        self._binding.bind_ortvalue_input(name, _ort_value(table))

    def _shape_of(self, name: str, feeds: Mapping[str, Array]) -> tuple[int, ...]:
        return feeds[name].shape if name in feeds else self._bound[name].shape

    def _outputs_for(self, feeds: Mapping[str, Array]) -> list[tuple[str, tuple[int, ...], Any]]:
        """Names, shapes and dtypes of the results; the contract is checked once for each set of shapes, not at each step."""
        key = tuple((name, value.shape, value.dtype) for name, value in feeds.items())
        known = self._checked.get(key)
        if known is not None:
            return known
        self._check_open()
        check_feeds(self._spec, feeds, self._bound)
        faults = [
            f"{name} is {value.dtype}, expected {self._kinds[name]}"
            for name, value in feeds.items()
            if value.dtype != self._kinds[name]
        ]
        if faults:
            raise InputError(f"{self._spec.name}: " + "; ".join(faults))
        sizes: dict[str, int] = {}
        for tensor in self._spec.inputs:
            actual = self._shape_of(tensor.name, feeds)
            sizes.update((dim, size) for dim, size in zip(tensor.shape, actual, strict=True) if isinstance(dim, str))
        outputs = []
        for tensor in self._spec.outputs:
            if tensor.name not in self._bound and self._spec.aliases.get(tensor.name) not in self._bound:
                shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
                outputs.append((tensor.name, shape, KIND_DTYPES[tensor.kind]))
        if len(self._checked) > 256:  # prompts of ever new lengths must not fill memory
            self._checked.clear()
        self._checked[key] = outputs
        return outputs


def _ort_value(array: Array) -> Any:
    import onnxruntime

    if array.dtype in _ONNX_TYPES:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_TYPES[array.dtype])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _is_ort_error(error: Exception) -> bool:
    # Errors of loading have classes of their own, those of running with bound inputs and outputs arrive as RuntimeError. A message
    # that quotes a damaged file's bytes is not text, and arrives as what Python makes of that.
    return isinstance(error, RuntimeError | UnicodeDecodeError) or type(error).__module__.startswith("onnxruntime.")


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError) or "bad_alloc" in text or "failed to allocate memory" in text or "out of memory" in text
    )
