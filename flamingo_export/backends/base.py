"""What every backend offers, so that the generation loop and parity are one and the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from flamingo_export.bundle.manifest import EngineRecord, GraphRecord, Manifest
from flamingo_export.precision import StorageType
from flamingo_export.specs import SubgraphSpec, TensorSpec
from flamingo_reference.arrays import Array


class DeviceArray(Protocol):
    """A tensor in a backend's memory, handed on without passing through the host; others take it through DLPack."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements; those of bf16, which numpy does not have, as uint16."""

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory in another shape."""

    def __getitem__(self, index: int) -> DeviceArray:
        """A row of the first axis, sharing memory."""

    def __dlpack__(self, *, stream: int | None = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


Tensor = Array | DeviceArray


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a backend can run here, the devices or providers it found, and what to install if it cannot."""

    usable: bool
    detail: str
    remedy: str | None = None


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a session is opened. `threads` 0 lets the backend choose; `device` is `cpu`, `cuda`, `cuda:1`, or several GPUs for a decoder in parts,
    `cuda:0,cuda:1`; `lean` puts memory before speed."""

    threads: int = 0
    device: str = "cpu"
    lean: bool = False

    @property
    def gpu(self) -> int | None:
        """The number of the first GPU that `device` names, None for the CPU. Raises BackendError for what is neither."""
        return next(iter(self.gpus), None)

    @property
    def gpus(self) -> tuple[int, ...]:
        """Numbers of all GPUs that `device` names, in its order; none for the CPU. Raises BackendError for what is neither, or named twice."""
        from flamingo_export.errors import BackendError

        if self.device == "cpu":
            return ()
        found = []
        for name in self.device.split(","):
            kind, colon, number = name.strip().partition(":")
            if kind != "cuda" or (colon and not (number.isascii() and number.isdigit())):
                raise BackendError(
                    f"there is no device {self.device!r}. Choose cpu, cuda, a GPU by its number, cuda:1, or several for a decoder in parts: "
                    "cuda:0,cuda:1."
                )
            found.append(int(number or 0))
        if len(set(found)) < len(found):
            raise BackendError(f"the device {self.device!r} names a GPU twice. Name each once: cuda:0,cuda:1.")
        return tuple(found)

    def on(self, device: str) -> SessionOptions:
        """The same on another device."""
        return msgspec.structs.replace(self, device=device)


class Buffer(Protocol):
    """A tensor in the backend's memory that outlives a call: a media bank or a cache."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def write(self, index: int, value: Tensor) -> None:
        """Copies `value` [...] into row `index` of the first axis. It may still be under way when this returns, until `publish`."""

    def publish(self) -> None:
        """Runs that start from now on see all that was written."""

    def read(self) -> Array:
        """A copy on the host."""

    def copy_from(self, other: Buffer) -> None:
        """Copies the whole of `other`, equal to or smaller than this along every axis, into the leading corner. It may lie on another device:
        what its session was asked before is copied, and runs that start from now on see it."""

    def rows(self, first: int, count: int) -> Buffer:
        """Rows first .. first + count - 1 of the first axis, sharing memory; the same object each time, so that binding it is free."""

    def copy_slots(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` slots of a cache [B, H, C, D] from row `source` to row `target`. Runs that start from now on see it."""

    def view(self, shape: tuple[int, ...]) -> Buffer:
        """Its beginning as a tensor of another shape, not larger, sharing memory; the same object each time, so that binding it is free."""


class Session(Protocol):
    """One opened subgraph.

    Buffers stay bound from call to call; every other input is fed to `run`. Binding an input that an output aliases
    (`spec.aliases`) binds that output too, so the cache is updated in place and is not among the results. Nor is any other output that
    a buffer is bound to, the next session's input say.
    """

    @property
    def spec(self) -> SubgraphSpec: ...

    @property
    def largest(self) -> Mapping[str, int]:
        """Sizes that it cannot go beyond, by their letters; C, if there, is the one capacity that caches have. Empty: no bounds."""

    @property
    def place(self) -> Hashable:
        """Where its buffers lie. Sessions of one place may share them."""

    @property
    def asynchronous(self) -> bool:
        """Whether `compute` and `Buffer.write` return before the work is done, so that it overlaps with other sessions'."""

    @property
    def reads_bound_media(self) -> bool:
        """Whether a run takes time for every row of media that is bound, and not only for those that `media_rows` names."""

    def allocate(self, name: str, shape: tuple[int, ...]) -> Buffer:
        """A zeroed buffer fit for input `name`."""

    def bind(self, name: str, buffer: Buffer) -> None:
        """From now on input `name` reads (and an output that aliases it writes) this buffer, or output `name` is written there."""

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        """Runs once and returns the outputs that are not bound, as arrays of the host that the caller owns.

        outputs: those that are wanted; None: all. Floats come in float32, FP8 as the codes that it is (ml_dtypes).
        Raises InputError naming inputs that are missing, unknown or of another shape or dtype than the contract, or sizes beyond `largest`.
        """

    def compute(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As `run`, the results left where the backend has them, for other sessions of the same backend and for buffers."""

    def close(self) -> None:
        """Frees the session's memory; bound buffers stay valid."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """How tokens are drawn from candidates, all [B, S]; float64 but for top_k, int64. temperature 0: the likeliest; top_p, min_p 0: no such
    bound. uniform: the host's random numbers in [0, 1)."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    uniform: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Handed:
    """Tokens that the host does not know yet: they are chosen of the candidates that the run before gives.

    source: int64 [B, S], whose next token it is: a branch of that run, counted through its [B, K]. -1: the token that is fed.
    draws: None takes the likeliest of all.
    """

    source: Array
    draws: Draws | None = None


class Running(Protocol):
    """A run that was asked for."""

    def tokens(self) -> Array | None:
        """The tokens that it runs, int64 [B, S], where some were drawn on the device. Waits until they are, not until it is done."""

    def result(self) -> Mapping[str, Array]:
        """Waits, and gives what `Session.run` would have given."""


@runtime_checkable
class RunsAhead(Protocol):
    """A decoder that can be asked for a step before the step before it is known (decision 18)."""

    @property
    def runs_ahead(self) -> bool:
        """Whether it can on this device."""

    def start(
        self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None, handed: Handed | None = None
    ) -> Running:
        """As `Session.run`, but returns at once. handed: tokens in place of those in the feeds, of the run that was asked for last, whose
        outputs TOP_VALUES and TOP_IDS were wanted. Raises as `run` does; what fails later raises in `Running.result`."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between backends for those who choose one.

    fp8_products: multiplies in FP8; else products of FP8 bundles are computed in fp32. widens_weights: the bundle's weights lie in host memory
    on the device `cpu`, those of 16 bits and FP8 widened to fp32. host_threads: on the device `cpu` it computes on as many threads as a
    session is given, so that several sessions run side by side.
    """

    fp8_products: bool = True
    widens_weights: bool = False
    host_threads: bool = False


class Backend(Protocol):
    """A way to run a bundle's graphs."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def native_functions(self) -> frozenset[str]:
        """Functions at the seam (`flamingo::...`) that this backend runs itself; the others keep their bodies."""

    def availability(self) -> Availability: ...

    def arithmetic(self, manifest: Manifest, options: SessionOptions) -> StorageType:
        """The type that it computes a bundle's graphs in; statistics of normalisations and sums may be in a wider one."""

    def placement(self, bundle: Path, manifest: Manifest, options: SessionOptions) -> Mapping[str, str]:
        """The device that each graph is to be opened on, of those that options name (`backends.placement`). Raises BackendError where several
        are named and the graphs do not fit on them."""

    def build(self, bundle: Path, manifest: Manifest, graph: GraphRecord) -> EngineRecord | None:
        """Compiles a graph into the bundle, or None where the portable graph is run as it is."""

    def open(self, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions) -> Session: ...


class HostSession(ABC):
    """What sessions whose tensors lie in host memory have in common."""

    largest: Mapping[str, int] = MappingProxyType({})
    place: Hashable = "host"
    asynchronous = False
    reads_bound_media = False

    @abstractmethod
    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]: ...

    def compute(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`run`: the host is where the results are."""
        return self.run(feeds)


def on_host(name: str, value: Tensor) -> Array:
    """A tensor as an array of the host, which it must be already. Raises InputError."""
    from flamingo_export.errors import InputError

    if not isinstance(value, np.ndarray):
        raise InputError(f"{name} lies on a device, and this backend takes arrays of the host. Read it back first.")
    return value


def check_feeds(spec: SubgraphSpec, feeds: Mapping[str, Tensor], bound: Mapping[str, Buffer]) -> None:
    """Raises InputError unless feeds and bound buffers together are exactly the inputs of `spec`, sizes agreeing, and so are bound outputs'."""
    from flamingo_export.errors import InputError

    faults: list[str] = []
    sizes: dict[str, int] = {}
    known = {tensor.name for tensor in spec.inputs}
    faults += [f"{name} is not an input" for name in feeds if name not in known]
    kinds = {"int64": np.dtype(np.int64), "bool": np.dtype(np.bool_)}
    for tensor in spec.inputs:
        if tensor.name in feeds:
            value = feeds[tensor.name]
            shape = value.shape
            wanted = kinds.get(tensor.kind)
            if wanted is not None and value.dtype != wanted:
                faults.append(f"{tensor.name} is {value.dtype}, expected {wanted}")
        elif tensor.name in bound:
            shape = bound[tensor.name].shape
        else:
            faults.append(f"{tensor.name} is missing")
            continue
        if not _fits(tensor, shape, sizes):
            faults.append(f"{tensor.name} has shape {tuple(shape)}, expected {tensor.shape} with {sizes}")
    faults += [
        f"{tensor.name} is bound to a buffer of shape {bound[tensor.name].shape}, expected {tensor.shape} with {sizes}"
        for tensor in spec.outputs
        if tensor.name in bound and not _fits(tensor, bound[tensor.name].shape, sizes)
    ]
    if faults:
        raise InputError(f"{spec.name}: " + "; ".join(faults))


def _fits(tensor: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a tensor can have this shape; `sizes` takes up what it says of letters that were not known."""
    return len(shape) == len(tensor.shape) and all(
        size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
        for size, dim in zip(shape, tensor.shape, strict=True)
    )
