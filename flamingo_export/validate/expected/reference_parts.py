"""The reference model one part at a time, first in fp64, then in PyTorch's fp32 (or 16 bits) with weights as the bundle stores them.

A part is read from the checkpoint once, in fp64 and then rounded in place, and dropped: memory is that of the largest part, whatever the model.
A live model's own modules are used, hooks and all, not modules made anew from its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flamingo_export.backends.host_memory import release
from flamingo_export.precision import StorageType
from flamingo_export.sources import LiveSource, WeightSource
from flamingo_export.validate.expected.rounding import StoredRounding
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from flamingo_reference.model import Flamingo

InFp64 = TypeVar("InFp64")
Rounded = TypeVar("Rounded")


class Parts(Protocol):
    """The parts of a reference model."""

    config: ModelConfig
    dtype: Any
    """torch.dtype that `rounded` computes in: its inputs must be of it."""

    def stage(self, prefix: str, fp64: Callable[[Any], InFp64], rounded: Callable[[Any], Rounded]) -> tuple[InFp64, Rounded]:
        """Results of `fp64` on the part in fp64 and of `rounded` on it in `dtype` with stored weights.

        prefix: vision_encoder, resampler, cross_attention.i, language_model.layers.j, or language_model (embedding and norm only).
        """


def parts_of(source: WeightSource, stored: StoredRounding, *, arithmetic: StorageType = "fp32") -> Parts:
    """The parts of a source: of the live model itself where it is one. arithmetic: what `rounded` computes in, on the weights as stored."""
    if isinstance(source, LiveSource):
        return LiveParts(source.model, stored, arithmetic)
    return SourceParts(source, stored, arithmetic)


class SourceParts:
    """Parts made from a source of weights, each read when its turn comes."""

    def __init__(self, source: WeightSource, stored: StoredRounding, arithmetic: StorageType = "fp32") -> None:
        self.config, self.dtype = source.config, torch_dtype(arithmetic)
        self._source, self._stored = source, stored
        self._names = list(source.names())

    def stage(self, prefix: str, fp64: Callable[[Any], InFp64], rounded: Callable[[Any], Rounded]) -> tuple[InFp64, Rounded]:
        import torch

        from flamingo_reference.model.modules import load_part

        module = load_part(self.config, prefix, self._source.read)
        with torch.no_grad():
            undo = _widen(module, at_use=prefix == "vision_encoder")
            first = fp64(module)
            undo()
            release()
            self._stored.apply(module, prefix)
            second = rounded(module.to(self.dtype))
        del module
        release()
        return first, second


class LiveParts:
    """Parts of a model in memory: fp64 on copies, fp32 on the very modules (on copies where they must be rounded or moved)."""

    def __init__(self, model: Flamingo, stored: StoredRounding, arithmetic: StorageType = "fp32") -> None:
        self.config, self.dtype = model.config, torch_dtype(arithmetic)
        self._model, self._stored = model, stored

    def stage(self, prefix: str, fp64: Callable[[Any], InFp64], rounded: Callable[[Any], Rounded]) -> tuple[InFp64, Rounded]:
        import torch

        module = self._model.get_submodule(prefix)
        if prefix == "language_model":
            module = copy.copy(module)
            module._modules = {name: child for name, child in module._modules.items() if name != "layers"}
        tensors = list(module.parameters())
        as_is = (
            self._stored.exact
            and self.dtype == torch.float32
            and all(tensor.dtype == torch.float32 and tensor.is_cpu for tensor in tensors)
        )
        with torch.no_grad():
            first = fp64(copy.deepcopy(module).cpu().double())
            if as_is:
                return first, rounded(module)
            module = copy.deepcopy(module).cpu().float()
            self._stored.apply(module, prefix)
            return first, rounded(module.to(self.dtype))


def torch_dtype(arithmetic: StorageType) -> Any:
    """The torch.dtype of that name."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[arithmetic]


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

    def restore(leaf: nn.Module, _: Any, __: Any) -> None:
        for parameter in leaf.parameters():
            parameter.data = parameter.data.float()

    handles = []
    for part in module.modules():
        if next(part.children(), None) is None:
            handles += [part.register_forward_pre_hook(widen), part.register_forward_hook(restore)]
        else:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.double()

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
