"""Builds one engine: parse, check, compile, stream to a file. One body for datacenter TensorRT and TensorRT for RTX.

Polygraphy's loaders are not used: its engine_from_network returns the whole engine in memory and takes neither a stream writer nor
ahead-of-time targets, which are the two things that matter here; what is left of it is a page of code.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from flamingo_export.backends.tensorrt.estimate import estimate
from flamingo_export.backends.tensorrt.lengths import set_lengths
from flamingo_export.backends.tensorrt.log import BuilderMessages, listening, started
from flamingo_export.backends.tensorrt.lowering.lint import Expected
from flamingo_export.backends.tensorrt.lowering.shapes import CAPACITY, Profile, shape_of
from flamingo_export.backends.tensorrt.monitor import UNITS, Phases, monitor, watched
from flamingo_export.backends.tensorrt.parsing import check_network, check_warnings, layer_counts, parse
from flamingo_export.backends.tensorrt.summary import summarise
from flamingo_export.bundle.manifest import EngineSummary
from flamingo_export.errors import BackendError, BuildError
from flamingo_export.estimates import GIB
from flamingo_export.files import replacing, write_atomically
from flamingo_export.progress import SILENT, Progress
from flamingo_export.specs import SubgraphSpec


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One engine to build.

    graph: the lowered file, beside the weights it points into. target: `sm89`, or None for this machine's GPU. fp32: whether it computes
    in fp32, which then means fp32 and not TF32. timing_cache: file of measured kernels, read if it is there and written anew.
    """

    graph: Path
    spec: SubgraphSpec
    expected: Expected
    profiles: tuple[Profile, ...]
    capacity: int
    engine: Path
    target: str | None
    fp32: bool
    timing_cache: Path | None = None


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """A finished engine file."""

    size: int
    sha256: str
    summary: EngineSummary


def check(trt: ModuleType, task: Task) -> None:
    """Parses and checks without compiling. Raises BuildError as `build` does."""
    messages = BuilderMessages()
    with listening(trt, messages) as logger:
        builder = started(trt, trt.Builder, logger, messages)
        network = _network(trt, builder)
        parser = parse(trt, network, logger, task.graph, messages)
        set_lengths(trt, network, task.spec)
        check_network(trt, network, task.spec, task.expected, messages, bundle=task.graph.parent)
        del network, parser, builder


def build(trt: ModuleType, task: Task, *, progress: Progress = SILENT) -> Built:
    """Builds the engine file; nothing is left of it unless it is complete.

    Raises BuildError (refused, read otherwise than written, or not compiled, with TensorRT's reason in other words), OSError (disk), and
    KeyboardInterrupt after the build has stopped.
    """
    messages, cancelled, phases = BuilderMessages(), threading.Event(), Phases()
    progress.stage(f"engine {task.spec.name}", UNITS)
    try:
        return watched(lambda: _build(trt, task, messages, phases, cancelled), phases, cancelled, progress)
    except MemoryError as error:
        raise BuildError(
            f"{task.spec.name}: memory of the host ran out while its engine was built, which takes about "
            f"{estimate(sum(tensor.nbytes for tensor in task.expected.weights.values())).memory / GIB:.1f} GiB. {messages.explanation()}"
        ) from error


def _build(trt: ModuleType, task: Task, messages: BuilderMessages, phases: Phases, cancelled: threading.Event) -> Built:
    with listening(trt, messages) as logger, _engine_file(trt, task.engine) as writer:
        builder = started(trt, trt.Builder, logger, messages)
        network = _network(trt, builder)
        parser = parse(trt, network, logger, task.graph, messages)
        if not messages.any:
            raise BackendError(
                "other code of this process has given TensorRT its own logger, so its warnings cannot be checked. "
                "Build in a process of its own: flamingo-export build"
            )
        lengths = set_lengths(trt, network, task.spec)
        check_network(trt, network, task.spec, task.expected, messages, bundle=task.graph.parent)
        layers = layer_counts(network)
        config = _config(trt, builder, task)
        config.progress_monitor = held = monitor(trt, phases, cancelled)
        cache = _timing_cache(config, task.timing_cache)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        if not done or not writer.size:
            weights = sum(tensor.nbytes for tensor in task.expected.weights.values())
            raise BuildError(
                f"TensorRT {trt.__version__} did not build {task.spec.name}, whose weights take {weights / GIB:.2f} GiB. "
                f"{messages.explanation()}"
            )
        check_warnings(trt, task.spec, messages)
        _save_timing_cache(config, task.timing_cache)
        del cache, held, config, network, parser, builder
    summary = summarise(messages.facts, task.expected, layers, task.profiles, lengths)
    return Built(size=writer.size, sha256=writer.digest.hexdigest(), summary=summary)


def _network(trt: ModuleType, builder: Any) -> Any:
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _config(trt: ModuleType, builder: Any, task: Task) -> Any:
    config = builder.create_builder_config()
    if task.target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, task.target.upper()), 0)
        # Engines of TensorRT for RTX may allocate while they run, unless they must not: steps are captured as CUDA graphs.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if task.fp32:
        config.clear_flag(trt.BuilderFlag.TF32)
    for profile in task.profiles:
        shapes = builder.create_optimization_profile()
        for tensor in task.spec.inputs:
            least, usual, most = (
                shape_of(
                    tensor,
                    {CAPACITY: task.capacity} | {symbol: getattr(bounds, which) for symbol, bounds in profile.bounds.items()},
                )
                for which in ("least", "usual", "most")
            )
            shapes.set_shape(tensor.name, least, usual, most)
        config.add_optimization_profile(shapes)
    return config


@contextmanager
def _engine_file(trt: ModuleType, path: Path) -> Iterator[Any]:
    """A stream writer into a temporary file that takes the engine's name if the block ends well, and goes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self, file: Any) -> None:
            trt.IStreamWriter.__init__(self)
            self.file, self.digest, self.size = file, hashlib.sha256(), 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                self.file.write(data)
            except OSError as error:
                error.filename = error.filename or os.fspath(path)
                self.error = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

    with replacing(path, locked=True) as file:
        yield Writer(file)


def _timing_cache(config: Any, path: Path | None) -> Any:
    """Kernels measured in earlier builds: rebuilding takes a fraction of the time. One that does not fit this library is begun anew."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, path: Path | None) -> None:
    """Best effort: without it the next build measures again."""
    if path is None:
        return
    with suppress(OSError):
        write_atomically(path, bytes(memoryview(config.get_timing_cache().serialize())))
