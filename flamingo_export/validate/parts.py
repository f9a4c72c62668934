"""The reference model one part at a time, first in fp64, then in PyTorch's fp32 with weights as the bundle stores them.

A part is read from the checkpoint once, widened and narrowed in place, and dropped: memory is that of the largest part, whatever the model.
A live model's own modules are used, hooks and all, not modules made anew from its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flamingo_export.backends.memory import release
from flamingo_export.precision import StorageType
from flamingo_export.sources import LiveSource, WeightSource
from flamingo_export.weights import bundle_weights
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flamingo_reference.model import Flamingo

Wide = TypeVar("Wide")
Narrow = TypeVar("Narrow")


class Parts(Protocol):
    """The parts of a reference model."""

    config: ModelConfig

    def stage(self, prefix: str, wide: Callable[[Any], Wide], narrow: Callable[[Any], Narrow]) -> tuple[Wide, Narrow]:
        """Results of `wide` on the part in fp64 and of `narrow` on it in fp32 with stored weights.

        prefix: vision_encoder, resampler, cross_attention.i, language_model.layers.j, or language_model (embedding and norm only).
        """


def parts_of(source: WeightSource, storage: StorageType) -> Parts:
    """The parts of a source: of the live model itself where it is one."""
    return LiveParts(source.model, storage) if isinstance(source, LiveSource) else SourceParts(source, storage)


def rounded_weights(config: ModelConfig) -> dict[str, str | None]:
    """Checkpoint tensors that reach the bundle in its storage type, each with the gate that it is multiplied by, if any; the others stay
    fp32."""
    return {
        name: next((source for source in weight.sources if source.endswith("_gate")), None)
        for weight in bundle_weights(config)
        if not weight.full_precision
        for name in weight.sources
        if name.endswith(".weight")
    }


def as_stored(weight: Tensor, gate: Tensor | None, storage: StorageType) -> Tensor:
    """A weight [out, in] in fp32 as the bundle stores it: rounded, where it is gated after it was multiplied by tanh(gate), [] or [out].

    The product is divided by the factor again, since the model that it goes into applies the gate itself.
    """
    import torch

    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    if gate is None or storage == "fp32":
        return weight.float().to(stored).float()
    factor = gate.double().tanh().float().reshape(-1, 1)
    rounded = (weight.float() * factor).to(stored).float()
    return torch.where(factor == 0, weight.float(), rounded / factor)


class SourceParts:
    """Parts made from a source of weights, each read when its turn comes."""

    def __init__(self, source: WeightSource, storage: StorageType) -> None:
        self.config = source.config
        self._source, self._storage = source, storage
        self._names = list(source.names())
        self._rounded = rounded_weights(self.config)

    def stage(self, prefix: str, wide: Callable[[Any], Wide], narrow: Callable[[Any], Narrow]) -> tuple[Wide, Narrow]:
        import torch

        from flamingo_reference.parts import load_part

        module = load_part(self.config, prefix, self._source.read)
        with torch.no_grad():
            undo = _widen(module, at_use=prefix == "vision_encoder")
            first = wide(module)
            undo()
            release()
            narrow_weights(module, prefix, self._rounded, self._storage)
            second = narrow(module)
        del module
        release()
        return first, second


class LiveParts:
    """Parts of a model in memory: fp64 on copies, fp32 on the very modules (on copies where they must be rounded or moved)."""

    def __init__(self, model: Flamingo, storage: StorageType) -> None:
        self.config = model.config
        self._model, self._storage = model, storage
        self._rounded = rounded_weights(self.config)

    def stage(self, prefix: str, wide: Callable[[Any], Wide], narrow: Callable[[Any], Narrow]) -> tuple[Wide, Narrow]:
        import torch

        module = self._model.get_submodule(prefix)
        if prefix == "language_model":
            module = copy.copy(module)
            module._modules = {name: child for name, child in module._modules.items() if name != "layers"}
        tensors = list(module.parameters())
        as_is = self._storage == "fp32" and all(tensor.dtype == torch.float32 and tensor.is_cpu for tensor in tensors)
        with torch.no_grad():
            first = wide(copy.deepcopy(module).cpu().double())
            if as_is:
                return first, narrow(module)
            module = copy.deepcopy(module).cpu().float()
            narrow_weights(module, prefix, self._rounded, self._storage)
            return first, narrow(module)


def _widen(module: nn.Module, *, at_use: bool) -> Callable[[], None]:
    """Parameters to fp64, in place; returns what ends it.

    at_use: a leaf's parameters are fp64 only while it runs. The vision encoder is one part of 435M parameters: 3.5 GB at once.
    """
    if not at_use:
        for parameter in module.parameters():
            parameter.data = parameter.data.double()
        return lambda: None

    def widen(leaf: nn.Module, _: Any) -> None:
        for parameter in leaf.parameters():
            parameter.data = parameter.data.double()

    def narrow(leaf: nn.Module, _: Any, __: Any) -> None:
        for parameter in leaf.parameters():
            parameter.data = parameter.data.float()

    handles = []
    for part in module.modules():
        if next(part.children(), None) is None:
            handles += [part.register_forward_pre_hook(widen), part.register_forward_hook(narrow)]
        else:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.double()

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def narrow_weights(module: nn.Module, prefix: str, rounded: Mapping[str, str | None], storage: StorageType) -> None:
    """Parameters to fp32, those that the bundle stores in 16 bits as they are there; in place."""
    parameters = {f"{prefix}.{name}" if prefix else name: parameter for name, parameter in module.named_parameters()}
    for name, parameter in parameters.items():
        data: Tensor = parameter.data
        if name in rounded:
            gate = rounded[name]
            data = as_stored(data, None if gate is None else parameters[gate].data, storage)
        parameter.data = data.float()
