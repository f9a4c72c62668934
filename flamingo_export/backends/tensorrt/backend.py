"""The backends `tensorrt` and `tensorrt-rtx`: portable graph -> lowered graph -> engine in the bundle -> session."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import msgspec
import onnx_ir as ir

from flamingo_export.backends.base import Availability, Capabilities, SessionOptions
from flamingo_export.backends.compiler import Estimate, Finished
from flamingo_export.backends.placement import on_one, placed
from flamingo_export.backends.tensorrt import lengths, library, plugin
from flamingo_export.backends.tensorrt.cuda import INSTALL, CudaRuntime
from flamingo_export.backends.tensorrt.device_memory import DeviceStream
from flamingo_export.backends.tensorrt.engine_builder import Task, build
from flamingo_export.backends.tensorrt.engine_contract import (
    check_record,
    contract_of,
    engine_spec,
    find_record,
    rebuild_command,
    runtime_cache_file,
)
from flamingo_export.backends.tensorrt.engine_loading import activation_bytes, load_engine
from flamingo_export.backends.tensorrt.engine_policies import check_policy
from flamingo_export.backends.tensorrt.estimate import check_memory, estimate
from flamingo_export.backends.tensorrt.library import Library
from flamingo_export.backends.tensorrt.lowering.candidates import add_candidates
from flamingo_export.backends.tensorrt.lowering.lint import check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.backends.tensorrt.lowering.shapes import check_limits, profiles
from flamingo_export.backends.tensorrt.session import TensorRTSession
from flamingo_export.bundle.manifest import EngineRecord, GraphRecord, Manifest, ShapeLimits
from flamingo_export.errors import BackendError
from flamingo_export.estimates import GIB
from flamingo_export.machine import available_memory, user_cache
from flamingo_export.precision import Policy, StorageType
from flamingo_export.progress import SILENT, Progress
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig

_WORTH_TELLING = 45.0  # seconds


class TensorRTBackend:
    """One library, given as a module or found when it is needed; `target` None is this machine's GPU."""

    capabilities = Capabilities()

    def __init__(self, which: Library, *, target: str | None = None, module: ModuleType | None = None) -> None:
        self._library, self._target, self._module = which, target, module
        self._streams: dict[int, tuple[DeviceStream, DeviceStream]] = {}
        """Where the decoder runs and where media are encoded meanwhile, once an engine was opened."""

    @property
    def name(self) -> str:
        return self._library.backend

    @property
    def native_functions(self) -> frozenset[str]:
        """Functions that the plugin computes."""
        return self._library.native_functions

    def availability(self) -> Availability:
        """Whether engines can be run here; nothing is imported."""
        which = self._library
        if self._module is None and not library.installed(which):
            return Availability(usable=False, detail=f"{which.title} is not installed", remedy=which.install)
        here = library.device()
        if here is None:
            builds = "builds engines for other machines here, but" if which.ahead_of_time else "is installed, but"
            return Availability(usable=False, detail=f"{which.title} {builds} there is no NVIDIA driver or GPU to run them")
        if not library.cuda_python():
            return Availability(
                usable=False, detail=f"{which.title} and a GPU ({here.target}) are there, cuda-python is not", remedy=INSTALL
            )
        return Availability(usable=True, detail=f"{which.title} on a GPU of {here.target}")

    def fits(self, manifest: Manifest, gpus: Sequence[int] = (0,)) -> bool:
        """Whether a bundle has an engine of each graph for these GPUs of this machine and this library's version, and they can be run here."""
        there = [library.device(gpu) for gpu in gpus]
        targets = {here.target for here in there if here is not None}
        if None in there or not self.availability().usable:
            return False
        try:
            version = (self._module or library.load(self._library)).__version__
        except BackendError:  # installed, but it does not load: doctor says why
            return False
        ours = {
            (each.graph, each.target) for each in manifest.engines if (each.backend, each.tool_version) == (self.name, version)
        }
        return all((graph.name, target) in ours for graph in manifest.graphs for target in targets)

    def prepare(self) -> Prepared:
        """All that can fail before work begins: library, GPU or target, plugin. Raises BackendError saying what is missing."""
        trt = self._module or library.load(self._library)
        target = library.resolve_target(self._library, trt, self._target)
        if not self.native_functions:
            return Prepared(trt=trt, target=target, plugin_sha256=None)
        digest = plugin.load(trt, target=target)
        return Prepared(
            trt=trt, target=target, plugin_sha256=digest, native_functions=plugin.offered(trt, self.native_functions)
        )

    def card_memory(self) -> int | None:
        """Bytes of this machine's GPU, if engines are built for it."""
        here = library.device()
        return (here.memory or None) if here is not None and self._target in (None, here.target) else None

    def check_limits(self, limits: ShapeLimits) -> None:
        """Raises BuildError if no engine can have these limits."""
        check_limits(limits)

    def check_policy(self, policy: Policy, target: str | None) -> None:
        """Raises BuildError if engines for the target cannot compute what the policy says."""
        check_policy(policy, self.name, self.native_functions, target)

    def estimate(self, weight_bytes: int) -> Estimate:
        """What compiling a graph that reads so many bytes of weights will take."""
        return estimate(weight_bytes)

    def check_memory(self, config: ModelConfig, graph: GraphRecord, sizes: Mapping[str, int]) -> Estimate:
        """What compiling a graph will take. sizes: bytes of each of the bundle's weights. Raises BuildError if this machine has too little."""
        return check_memory(config, graph, sizes, available_memory())

    def arithmetic(self, manifest: Manifest, options: SessionOptions) -> StorageType:
        """That of the graphs that engines are compiled from: the bundle's storage type."""
        return manifest.precision.storage

    def build(self, bundle: Path, manifest: Manifest, graph: GraphRecord, *, progress: Progress = SILENT) -> EngineRecord:
        """Lowers a graph and compiles it into the bundle.

        Raises BackendError (library, GPU or plugin missing), BuildError (lint, memory, or refused by TensorRT).
        """
        return self.compile(self.prepare(), bundle, manifest, graph, progress=progress)

    def compile(
        self,
        prepared: Prepared,
        bundle: Path,
        manifest: Manifest,
        graph: GraphRecord,
        *,
        progress: Progress = SILENT,
        finished: Finished = lambda path, request: None,
    ) -> EngineRecord:
        """`build` with what `prepare` found; an engine that `finished` knows is not built again."""
        trt, spec, limits = prepared.trt, engine_spec(manifest, graph), manifest.limits
        compute = manifest.precision.storage
        native = self.native_functions if prepared.native_functions is None else prepared.native_functions
        lowered = lower(ir.load(bundle / graph.file), compute=compute, capacity=limits.max_length, native_functions=native)
        add_candidates(lowered, spec, banned=manifest.config.banned_logits)
        expected = check_graph(lowered, spec, compute=compute, capacity=limits.max_length, native_functions=native)
        path = bundle / f"{graph.name}.{self.name}.onnx"
        data = save_lowered(lowered, path)
        uses = profiles(spec, limits)
        file = f"engines/{self.name}-{prepared.target}/{graph.name}.engine"
        request = hashlib.sha256(
            data + msgspec.json.encode([file, trt.__version__, uses, prepared.plugin_sha256, lengths.supported(trt)])
        ).hexdigest()
        earlier = finished(file, request)
        if earlier is not None:
            return earlier
        needed = self.check_memory(manifest.config, graph, WeightIndex.read(bundle).sizes())
        if needed.seconds > _WORTH_TELLING:
            progress.note(
                f"engine {graph.name}: about {needed.memory / GIB:.0f} GiB of memory and {needed.seconds / 60:.0f} minutes of one core"
            )
        task = Task(
            graph=path,
            spec=spec,
            expected=expected,
            profiles=uses,
            capacity=limits.max_length,
            engine=bundle / file,
            target=prepared.target if self._library.ahead_of_time else None,
            fp32=compute == "fp32",
            timing_cache=None if self._library.ahead_of_time else _timing_cache(self._library, trt, prepared.target),
        )
        built = build(trt, task, progress=progress)
        return EngineRecord(
            graph=graph.name,
            file=file,
            backend=self.name,
            target=prepared.target,
            tool_version=trt.__version__,
            plugin_sha256=prepared.plugin_sha256,
            sha256=built.sha256,
            size=built.size,
            request=request,
            lowered=path.name,
            compute=compute,
            banned=manifest.config.banned_logits,
            summary=built.summary,
        )

    def placement(self, bundle: Path, manifest: Manifest, options: SessionOptions) -> Mapping[str, str]:
        """The GPU of each graph. Raises BackendError (no such GPU, no room), IncompatibleEngine."""
        if len(options.gpus) < 2:
            return on_one(manifest, options)
        targets = {index: self._device(index).target for index in options.gpus}
        target = targets[options.gpus[0]]
        engines = {}
        for graph in manifest.graphs:
            record = find_record(bundle, manifest, graph, self.name, target)
            engines[graph.name] = record.size + activation_bytes(record)
        gpus = {index: self._on(index)[0].cuda.free_memory() for index in options.gpus}
        return placed(manifest, engines, WeightIndex.read(bundle).sizes(), gpus)

    def _device(self, index: int) -> library.Device:
        """The GPU of that number. Raises BackendError where engines cannot be run here, or there is none."""
        state, here = self.availability(), library.device(index)
        if not state.usable:
            advice = state.remedy or "Use --backend onnxruntime: the bundle has it too."
            raise BackendError(f"engines cannot be opened: {state.detail}. {advice}")
        if here is None:
            there = ", ".join(f"cuda:{number}" for number in range(library.device_count()))
            raise BackendError(
                f"there is no GPU number {index} here, there is {there}. They are counted from 0: --device cuda:0"
            )
        return here

    def _on(self, index: int) -> tuple[DeviceStream, DeviceStream]:
        """The streams of a GPU: of a decoder, and of media that are encoded meanwhile."""
        if index not in self._streams:
            # CUDA is asked before TensorRT, whose runtime ends the process where there is no driver.
            cuda = CudaRuntime(index)
            self._streams[index] = DeviceStream(cuda, first=True), DeviceStream(cuda, first=False)
        return self._streams[index]

    def open(self, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions) -> TensorRTSession:
        """Opens the engine of a graph, on the first GPU that options name; what they say of threads is for other backends.

        Raises BackendError (library, driver, GPU or plugin missing, out of memory), IncompatibleEngine (none for this GPU, of another
        version, altered, or another than the bundle needs), each with what to do.
        """
        index = options.gpu or 0
        here = self._device(index)
        record = find_record(bundle, manifest, graph, self.name, here.target)
        trt = self._module or library.load(self._library)
        path = check_record(bundle, manifest, record, trt.__version__)
        if record.plugin_sha256 is not None:
            plugin.load(trt, expected=record.plugin_sha256, target=here.target)
        streams = self._on(index)
        contract = contract_of(manifest, graph, record)
        decoding = bool(contract.spec.aliases)
        loaded = load_engine(
            trt,
            streams[0 if decoding else 1],
            path,
            record,
            contract,
            kernels=runtime_cache_file(record) if self._library.ahead_of_time else None,
            advice=f"Build it again: {rebuild_command(bundle, manifest, self.name, here.target)}",
        )
        return TensorRTSession(loaded, contract, asynchronous=not decoding)


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A library that is ready to build: its module, the GPU it builds for, the digest of the loaded plugin library, and the functions that
    this computes: one built before PhiRangeCrossAttention came to be leaves that to its body. None: all that the library of TensorRT may."""

    trt: ModuleType
    target: str
    plugin_sha256: str | None = None
    native_functions: frozenset[str] | None = None


def tensorrt_backend(name: str, *, target: str | None) -> TensorRTBackend:
    """The backend of that name (`tensorrt-rtx`, `tensorrt`), for `backends.registry`."""
    return TensorRTBackend(library.LIBRARIES[name], target=target)


def _timing_cache(which: Library, trt: ModuleType, target: str) -> Path | None:
    """Kernels measured on this kind of GPU. Ahead of time nothing is measured, so nothing is kept."""
    folder = user_cache("timing")
    return folder / f"{which.backend}-{trt.__version__}-{target}.cache" if folder else None
