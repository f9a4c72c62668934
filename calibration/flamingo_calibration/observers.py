"""Who sees what in a part of the reference: hooks that hand the operands of its products to collectors, under the table's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flamingo_calibration.activation_statistics import Collector
from flamingo_export.weights import bundle_weights
from flamingo_export.weights.calibration_table import Statistics, calibrated_tensors
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


class Watch:
    """The collectors of one part, and what feeds them: the part is changed until `finish`."""

    def __init__(self, config: ModelConfig, prefix: str, module: nn.Module) -> None:
        self._channels = calibrated_tensors(config)
        self._collectors: dict[str, Collector] = {}
        self._undo: list[Callable[[], None]] = []
        for name, path in products(config, prefix).items():
            handle = module.get_submodule(path).register_forward_pre_hook(self._input_of(name))
            self._undo.append(handle.remove)
        if prefix.startswith("language_model.layers."):
            self._watch_attention(module, f"decoder/layer.{prefix.rsplit('.', 1)[1]}/self_attention")
        elif prefix.startswith("cross_attention."):
            self._watch_media(module, f"media_kv/layer.{prefix.rsplit('.', 1)[1]}")
        elif prefix == "language_model":
            norm = module.get_submodule("norm")
            self._undo.append(norm.register_forward_hook(lambda _, __, normed: self.see("decoder/head", normed)).remove)

    def see(self, name: str, tensor: Tensor) -> None:
        """Counts a piece of a tensor."""
        if name not in self._collectors:
            self._collectors[name] = Collector(name, channels=self._channels[name] > 0)
        self._collectors[name].add(tensor.numpy())

    def finish(self) -> dict[str, Statistics]:
        """Statistics of all that was seen. The part is let go of: it and its hooks would else keep each other in memory."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        return {name: collector.finish() for name, collector in self._collectors.items()}

    def _input_of(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_: Any, arguments: tuple[Any, ...]) -> None:
            self.see(name, arguments[0])

        return hook

    def _watch_media(self, block: Any, name: str) -> None:
        """Keys and values [N, H, R, D] of media as the bank keeps them."""
        self._watch(block.media, f"{name}/k", f"{name}/v")

    def _watch_attention(self, layer: Any, name: str) -> None:
        """Queries, keys and values on their way into attention: after norms and rotation, queries with their bias for contents."""
        self._watch(layer.operands, f"{name}/q", f"{name}/k", f"{name}/v")

    def _watch(self, point: nn.Module, *names: str) -> None:
        """What passes a hook point of the reference, under these names."""

        def seen(_: Any, __: Any, tensors: tuple[Tensor, ...]) -> None:
            for name, tensor in zip(names, tensors, strict=True):
                self.see(name, tensor)

        self._undo.append(point.register_forward_hook(seen).remove)


def products(config: ModelConfig, prefix: str) -> dict[str, str]:
    """The products of a part, and the module within it that has each one's input. Matrices that lie side by side have the same one.

    Without the head, which is not a module of its own where it is the embedding.
    """
    if prefix == "language_model":  # its layers are parts of their own
        return {}
    named = calibrated_tensors(config)
    return {
        weight.name: weight.sources[0].removeprefix(f"{prefix}.").removesuffix(".weight")
        for weight in bundle_weights(config)
        if weight.name in named and weight.sources[0].startswith(f"{prefix}.")
    }
