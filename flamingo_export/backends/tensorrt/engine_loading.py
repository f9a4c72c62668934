"""An engine file into a loaded engine that is what its bundle says, and contexts of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from flamingo_export.backends.tensorrt.cuda import OUT_OF_MEMORY, DeviceMemoryError
from flamingo_export.backends.tensorrt.device_memory import DeviceStream
from flamingo_export.backends.tensorrt.engine_contract import Contract, check_engine, resident_bytes
from flamingo_export.backends.tensorrt.log import BuilderMessages, listening, started
from flamingo_export.bundle.manifest import EngineRecord
from flamingo_export.errors import BackendError, IncompatibleEngine

_READ_BYTES = 1 << 26


class Opened(Protocol):
    """What computes under a session: a loaded engine, or a stand-in for one."""

    trt: Any
    """A module by whose name and version errors go; its ILogger is listened to."""
    stream: DeviceStream

    def context(self, profile: int, *, captured: bool) -> Any:
        """As TensorRT's IExecutionContext."""

    def close(self) -> None: ...


class Loaded:
    """An engine on the device, and how its contexts are made.

    All contexts take the stream's memory for activations (USER_MANAGED): they run one after the other. TensorRT for RTX compiles kernels for
    this GPU when they are first needed; they are kept in `kernels` for the next process.
    """

    def __init__(self, trt: ModuleType, runtime: Any, engine: Any, stream: DeviceStream, kernels: Path | None) -> None:
        self.trt, self.engine, self.stream = trt, engine, stream
        self._runtime = runtime
        self._kernels = kernels
        self._cache: Any = None
        self._configs: dict[bool, Any] = {}
        if kernels is not None:
            self._configs = {captured: self._config(captured) for captured in (False, True)}
        stream.reserve(engine.device_memory_size_v2)

    def context(self, profile: int, *, captured: bool) -> Any:
        """A context for one profile. captured: for CUDA graphs, whose kernels must be the final ones. Raises BackendError."""
        trt, stream = self.trt, self.stream
        messages = BuilderMessages()
        with listening(trt, messages):
            how = self._configs[captured] if self._configs else trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self.engine.create_execution_context(how)
            if context is None:
                raise failure(stream, f"TensorRT {trt.__version__} made no context", messages)
            try:
                taken = context.set_optimization_profile_async(profile, stream.handle)
            except RuntimeError as error:  # what the bindings make of a refusal
                messages.errors.append(str(error))
                taken = False
            if not taken:
                raise failure(stream, f"TensorRT {trt.__version__} did not take profile {profile}", messages)
        return context

    def close(self) -> None:
        """Keeps what was compiled, and lets go of the engine: contexts must be gone."""
        self._save_kernels()
        self._configs, self._cache = {}, None
        self.engine = self._runtime = None

    def _config(self, captured: bool) -> Any:
        trt = self.trt
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if captured:
            # Compiled in the background, a graph would keep the kernel that stands in meanwhile.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._kernels is not None and self._kernels.is_file():
                # One of another driver or a damaged one is not taken, and kernels are compiled anew.
                self._cache.deserialize(self._kernels.read_bytes())
        config.set_runtime_cache(self._cache)
        return config

    def _save_kernels(self) -> None:
        """Best effort: without it the next process compiles again."""
        if self._cache is None or self._kernels is None:
            return
        try:
            self._kernels.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._kernels.with_name(f"{self._kernels.name}.{os.getpid()}")
            temporary.write_bytes(bytes(memoryview(self._cache.serialize())))
            temporary.replace(self._kernels)
        except OSError:
            pass


def load_engine(
    trt: ModuleType,
    stream: DeviceStream,
    path: Path,
    record: EngineRecord,
    contract: Contract,
    *,
    kernels: Path | None,
    advice: str,
) -> Loaded:
    """Loads an engine file and checks what it is. advice: how to build it again. kernels: file of compiled kernels, for TensorRT for RTX.

    Raises IncompatibleEngine (not an engine of this version or GPU, or another one than the contract), DeviceMemoryError.
    """
    _check_memory(stream, path, record, contract)
    stream.cuda.use()
    messages = BuilderMessages()
    with listening(trt, messages) as logger:
        runtime = started(trt, trt.Runtime, logger, messages)
        with path.open("rb") as file:
            engine = runtime.deserialize_cuda_engine(stream_reader(trt, file))
        if engine is None:
            reason = first_error(messages)
            if _is_memory(reason):
                raise failure(
                    stream,
                    f"{path} needs about {_needed(path, record) / 2**20:.0f} MiB on the GPU and was not loaded",
                    messages,
                )
            raise IncompatibleEngine(f"TensorRT {trt.__version__} does not take {path}: {reason}. {advice}")
        try:
            check_engine(trt, engine, contract)
        except IncompatibleEngine as error:
            raise IncompatibleEngine(f"{path} is not the engine that this bundle needs: {error}. {advice}") from None
        return Loaded(trt, runtime, engine, stream, kernels)


def first_error(messages: BuilderMessages) -> str:
    """What TensorRT said first, on one line."""
    return " ".join(messages.errors[0].split()) if messages.errors else "it gave no reason"


def failure(stream: DeviceStream, what: str, messages: BuilderMessages) -> BackendError:
    """What to raise when TensorRT did not do something: where memory was short, with what is free and what to do about it."""
    reason = first_error(messages)
    if not _is_memory(reason):
        return BackendError(f"{what}: {reason}")
    free, total = stream.cuda.free_memory()
    return DeviceMemoryError(
        "cudaErrorMemoryAllocation",
        f"{what}: {reason}. {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free. {OUT_OF_MEMORY}.",
    )


def _is_memory(text: str) -> bool:
    return any(words in text.lower() for words in ("out of memory", "outofmemory", "memoryallocation"))


def _check_memory(stream: DeviceStream, path: Path, record: EngineRecord, contract: Contract) -> None:
    """Before anything is loaded."""
    check_room(stream, os.fspath(path), _needed(path, record), contract)


def check_room(stream: DeviceStream, what: str, own: int, contract: Contract) -> None:
    """Raises DeviceMemoryError where there is no room for an engine, the media bank and one row of caches. own: bytes of the engine itself."""
    free, total = stream.cuda.free_memory()
    bank, row = resident_bytes(contract)
    needed = own + bank + row
    if needed <= free:
        return
    mib = 2.0**20
    beside = ""
    if row:
        beside = (
            f" ({own / mib:.0f} for itself, {bank / mib:.0f} for the media bank, {row / mib:.0f} for each request's cache of "
            f"{contract.capacity} slots)"
        )
    raise DeviceMemoryError(
        "cudaErrorMemoryAllocation",
        f"{what} needs about {needed / mib:.0f} MiB on the GPU{beside}, {free / mib:.0f} of {total / mib:.0f} MiB are free. {OUT_OF_MEMORY}.",
        asked=needed,
        free=free,
    )


def _needed(path: Path, record: EngineRecord) -> int:
    """Bytes on the GPU: an engine takes its file's size, which is all weights, and the activations of its largest profile."""
    return path.stat().st_size + activation_bytes(record)


def activation_bytes(record: EngineRecord) -> int:
    """Bytes of intermediate results that an engine takes on the GPU."""
    profiles = record.summary.profiles if record.summary is not None else ()
    return max((profile.activation_bytes or 0 for profile in profiles), default=0)


def stream_reader(trt: ModuleType, file: Any) -> Any:
    """The file as TensorRT reads it, so that no copy of the whole engine lies in host memory."""

    class Reader(trt.IStreamReaderV2):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IStreamReaderV2.__init__(self)

        def read(self, num_bytes: int, stream: int) -> bytes:
            data: bytes = file.read(min(num_bytes, _READ_BYTES))
            return data

        def seek(self, offset: int, where: Any) -> bool:
            whence = {trt.SeekPosition.SET: os.SEEK_SET, trt.SeekPosition.CUR: os.SEEK_CUR, trt.SeekPosition.END: os.SEEK_END}
            try:
                file.seek(offset, whence[where])
            except (OSError, ValueError):
                return False
            return True

    return Reader()
