"""The PyTorch reference as a backend: the same generation loop, on the model that defines what is right. Slow; needs torch.

It runs the weights that the bundle was made from, not the bundle's own, which are folded: the shipped nano checkpoint, random weights drawn
anew from their seed, or a source that is handed in.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_export.backends.base import Availability, Buffer, Capabilities, HostSession, SessionOptions, check_feeds, on_host
from flamingo_export.backends.base import Tensor as HostOrDevice
from flamingo_export.backends.placement import on_one
from flamingo_export.bundle.manifest import EngineRecord, GraphRecord, Manifest
from flamingo_export.errors import BackendError, CheckpointError, InputError, pip_install
from flamingo_export.precision import StorageType
from flamingo_export.sources.origin import find_origin
from flamingo_export.specs import KIND_DTYPES, SubgraphSpec, decoder_spec, subgraph_specs
from flamingo_reference.arrays import Array
from flamingo_reference.config import RelativePositions

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_export.sources import WeightSource
    from flamingo_reference.model.subgraphs import Subgraph

_INSTALL = f"Install it: {pip_install('torch')}"


class ReferenceBackend:
    """`flamingo_reference.model.subgraphs` in fp32 on the CPU."""

    name = "reference"
    capabilities = Capabilities(fp8_products=False)
    native_functions: frozenset[str] = frozenset()

    def __init__(self, source: WeightSource | None = None) -> None:
        """source: the weights, for bundles whose origin cannot be found (see `origin.find_origin`)."""
        self._source = source

    def availability(self) -> Availability:
        """Usable where torch is installed."""
        if importlib.util.find_spec("torch") is None:
            return Availability(usable=False, detail="PyTorch is not installed", remedy=_INSTALL)
        return Availability(usable=True, detail=f"PyTorch {importlib.metadata.version('torch')}, CPU, fp32")

    def arithmetic(self, manifest: Manifest, options: SessionOptions) -> StorageType:
        """fp32, whatever type weights are stored in."""
        return "fp32"

    def placement(self, bundle: Path, manifest: Manifest, options: SessionOptions) -> Mapping[str, str]:
        """All where the options say."""
        return on_one(manifest, options)

    def build(self, bundle: Path, manifest: Manifest, graph: GraphRecord) -> EngineRecord | None:
        """None: there is nothing to compile."""
        return None

    def open(self, bundle: Path, manifest: Manifest, graph: GraphRecord, options: SessionOptions) -> ReferenceSession:
        """The module of a subgraph, with its weights read from their origin.

        Raises BackendError if torch is missing, a device other than the CPU is asked for, or the weights' origin is not known.
        """
        state = self.availability()
        if not state.usable:
            raise BackendError(f"the reference cannot run: {state.detail}. {_INSTALL}")
        if options.device != "cpu":
            raise BackendError(f"the reference runs on the CPU, not on {options.device}. Choose another backend or device.")
        import torch

        from flamingo_reference.model.subgraphs import Decoder, load_subgraph

        if self._source is None:
            try:
                self._source = find_origin(manifest)
            except CheckpointError as error:
                raise BackendError(f"the reference has no weights to run: {error}") from error
        config = manifest.config
        layers = range(*graph.layers) if graph.layers is not None else None
        kind = "decoder" if layers is not None else graph.name
        if kind not in subgraph_specs(config):
            raise BackendError(f"the reference has no subgraph {graph.name!r}")
        spec = subgraph_specs(config)[kind] if layers is None else decoder_spec(config, layers, name=graph.name)
        if options.threads:
            torch.set_num_threads(options.threads)
        module = load_subgraph(config, kind, self._source.read, layers=layers, dtype=torch.float32).eval()
        if isinstance(module, Decoder):
            module.in_place = True
            if isinstance(config.language_model.positions, RelativePositions):
                module.precompute(config.language_model.max_positions)
        return ReferenceSession(module, spec)


class TorchBuffer:
    """A tensor in host memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def write(self, index: int, value: HostOrDevice) -> None:
        """Copies `value` into row `index`."""
        self.tensor.numpy()[index] = on_host("the value", value)

    def publish(self) -> None:
        """Nothing: what was written is there."""

    def read(self) -> Array:
        """A copy."""
        copied: Array = self.tensor.numpy().copy()
        return copied

    def copy_from(self, other: Buffer) -> None:
        """Copies the whole of `other` into the leading corner."""
        source = other.read()
        self.tensor.numpy()[tuple(slice(size) for size in source.shape)] = source

    def rows(self, first: int, count: int) -> TorchBuffer:
        """Rows from `first` on, sharing memory."""
        return TorchBuffer(self.tensor[first : first + count])

    def copy_slots(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` slots [:, :, count] of a row to another."""
        self.tensor[target, :, :count] = self.tensor[source, :, :count]

    def view(self, shape: tuple[int, ...]) -> TorchBuffer:
        """Its beginning in another shape, sharing memory."""
        return TorchBuffer(self.tensor.reshape(-1)[: math.prod(shape)].reshape(shape))


class ReferenceSession(HostSession):
    """One subgraph's module. Caches are written in place, as the graphs write them."""

    def __init__(self, module: Subgraph, spec: SubgraphSpec) -> None:
        self._module: Subgraph | None = module
        self._spec = spec
        self._bound: dict[str, TorchBuffer] = {}

    @property
    def spec(self) -> SubgraphSpec:
        return self._spec

    def allocate(self, name: str, shape: tuple[int, ...]) -> TorchBuffer:
        """A zeroed buffer for input `name`."""
        import torch

        return TorchBuffer(torch.from_numpy(np.zeros(shape, KIND_DTYPES[self._spec.input(name).kind])))

    def bind(self, name: str, buffer: Buffer) -> None:
        """Input `name`, and the output that aliases it, or output `name`, are this buffer from now on. Raises InputError for an unknown one."""
        if not isinstance(buffer, TorchBuffer):
            raise InputError(
                f"{self._spec.name}: a buffer of another backend was bound to {name}; allocate it with this session"
            )
        outputs = {tensor.name for tensor in self._spec.outputs} - self._spec.aliases.keys()
        if name not in outputs | {tensor.name for tensor in self._spec.inputs}:
            raise InputError(f"{self._spec.name}: {name} is not an input, nor an output with memory of its own")
        self._bound[name] = buffer

    def run(self, feeds: Mapping[str, HostOrDevice], outputs: Collection[str] | None = None) -> dict[str, Array]:
        """Outputs that are not bound. Raises InputError for feeds that break the contract or do not fit the cache."""
        import torch

        if self._module is None:
            raise BackendError(f"{self._spec.name}: the session is closed. Load the bundle again.")
        check_feeds(self._spec, feeds, self._bound)
        tensors: dict[str, Tensor] = {}
        for tensor in self._spec.inputs:
            if tensor.name in feeds:
                # Copied: what is fed belongs to the caller, and the decoder writes into its caches.
                tensors[tensor.name] = torch.from_numpy(
                    np.array(on_host(tensor.name, feeds[tensor.name]), KIND_DTYPES[tensor.kind])
                )
            else:
                tensors[tensor.name] = self._bound[tensor.name].tensor
        try:
            with torch.no_grad():
                results: dict[str, Any] = self._module(tensors)
        except ValueError as error:
            raise InputError(f"{self._spec.name}: {error}") from error
        for name in results.keys() & self._bound.keys():
            self._bound[name].tensor.copy_(results[name])
        return {
            name: np.array(value.numpy())
            for name, value in results.items()
            if name not in self._bound
            and self._spec.aliases.get(name) not in self._bound
            and (outputs is None or name in outputs)
        }

    def close(self) -> None:
        """Frees the weights; buffers stay valid."""
        self._module = None
        self._bound = {}
