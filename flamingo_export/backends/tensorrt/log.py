"""What TensorRT says while it parses and builds, kept where it matters, and its errors in words that help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from flamingo_export.errors import BackendError

_FACTS = ("Total Activation Memory:", "Total Weights Memory:", "LayerType: ")

# What TensorRT says -> what it means here. The first that fits is reported.
_MEANINGS = (
    (
        r"out ?of ?memory|bad_alloc|cuMemAlloc|cudaErrorMemoryAllocation|failed to allocate",
        "memory ran out while building. Close other programs or build on a machine with more; --max-length, --max-batch and 16-bit "
        "weights (--storage) make engines smaller",
    ),
    (
        r"could not find any implementation|no implementation",
        "TensorRT found no kernel for some nodes of the graph. It reports the same error when it runs out of memory while trying "
        "kernels: free memory and retry. If there was enough, the GPU lacks kernels for this type: try --storage fp16",
    ),
    (
        r"plugin not found|getPluginCreator|no plugin",
        "the plugin library is not loaded, or has another name, version or namespace",
    ),
    (
        r"no importer|unsupported operator|No schema registered|parser does not support",
        "this version of TensorRT does not have an operator of the graph",
    ),
    (
        r"serialization.*version|not compatible with this version|version tag does not match|magic",
        "the engine or timing cache is of another TensorRT version: build it again with this one",
    ),
    (
        r"incompatible device|compute capability|generated on a different|hardware compat",
        "the engine is for another GPU: build it again with --target of this one",
    ),
    (
        r"driver.*insufficient|CUDA initialization failure|error 35\b",
        "the NVIDIA driver is missing or too old for this TensorRT",
    ),
    (r"cancel", "the build was cancelled"),
)


def meaning(text: str) -> str | None:
    """What a message of TensorRT's means for a user, None where it is not known."""
    return next((words for pattern, words in _MEANINGS if re.search(pattern, text, re.IGNORECASE)), None)


class BuilderMessages:
    """Messages kept of one build: errors, warnings, and those that describe the engine."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.facts: list[str] = []
        self.any = False
        """Whether any came: none does, where other code of the process has given TensorRT its logger before."""

    def add(self, severity: int, text: str) -> None:
        """severity: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose."""
        self.any = True
        if severity <= 1:
            self.errors.append(text)
        elif severity == 2:
            self.warnings.append(text)
        elif any(fact in text for fact in _FACTS):
            self.facts.append(text)

    def explanation(self) -> str:
        """The first error and what it means."""
        if not self.errors:
            return "TensorRT gave no reason"
        known = next((words for text in self.errors if (words := meaning(text))), None)
        first = " ".join(self.errors[0].split())
        return f"{known}. TensorRT said: {first}" if known else f"TensorRT said: {first}"


def started(trt: ModuleType, kind: Any, logger: Any, messages: BuilderMessages) -> Any:
    """TensorRT's `Builder` or `Runtime`. Raises BackendError with its reason where there is none to be had: a driver that is too old, say."""
    try:
        return kind(logger)
    except TypeError as error:  # what the bindings make of a factory that gives nothing
        raise BackendError(f"TensorRT {trt.__version__} does not start here: {messages.explanation()}") from error


class _ProcessLogger:
    """The one logger that TensorRT takes in a process, and who listens at the moment."""

    def __init__(self, trt: ModuleType) -> None:
        self.listener: BuilderMessages | None = None
        process = self

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if process.listener is not None:
                    process.listener.add(int(severity), text)

        self.logger = Logger()


_loggers: dict[str, _ProcessLogger] = {}


@contextmanager
def listening(trt: ModuleType, messages: BuilderMessages) -> Iterator[Any]:
    """A logger that fills `messages` for the length of a `with` block and prints nothing. It outlives the block, as TensorRT wants."""
    process = _loggers.setdefault(trt.__name__, _ProcessLogger(trt))
    before, process.listener = process.listener, messages
    try:
        yield process.logger
    finally:
        process.listener = before
