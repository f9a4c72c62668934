"""How many slots of its cache each row has in use, given to the self-attentions, so that they need not read the whole capacity.

    write_index [B] ──────────────┐
    positions [B, S] -> Shape -> S ┴-> + -> Cast int32 -> key_value_lengths of every attention over a cache

ONNX has an input for it that the parser drops, so the lengths are set on the layers after parsing. The mask stays: only it says which of the
slots in use a position sees. Slots from `write_index + S` on hold nothing that a position may see: padded positions are written like others,
branches of a beam tree write side by side, and rows that are done keep their place (docs/tensorrt.md).

TensorRT for RTX 1.7 and TensorRT 11 have it; 10.x has not, and reads the capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from flamingo_export.specs import SubgraphSpec

ATTRIBUTE = "key_value_lengths"
NAME = "cache/lengths"


def supported(trt: ModuleType) -> bool:
    """Whether this TensorRT takes lengths."""
    return hasattr(getattr(trt, "IAttention", None), ATTRIBUTE)


def set_lengths(trt: ModuleType, network: Any, spec: SubgraphSpec) -> int:
    """Gives the lengths to every attention whose keys come from a cache, and returns how many these are; 0 where TensorRT has none."""
    if not spec.aliases or not supported(trt):
        return 0
    attentions = list(_over_caches(trt, network))
    if attentions:
        lengths = _lengths(trt, network)
        for attention in attentions:
            setattr(attention, ATTRIBUTE, lengths)
    return len(attentions)


def count_lengths(trt: ModuleType, network: Any) -> int:
    """Attentions of a network that have lengths."""
    if not supported(trt):
        return 0
    return sum(getattr(attention, ATTRIBUTE) is not None for _, attention in _attentions(trt, network))


def _lengths(trt: ModuleType, network: Any) -> Any:
    """int32 [B]: the slot after the last one that this call writes."""
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    shape = network.add_shape(inputs["positions"])
    count = network.add_slice(shape.get_output(0), (1,), (1,), (1,))
    total = network.add_elementwise(inputs["write_index"], count.get_output(0), trt.ElementWiseOperation.SUM)
    cast = network.add_cast(total.get_output(0), trt.DataType.INT32)
    for layer, what in ((shape, "shape"), (count, "positions"), (total, "int64"), (cast, "int32")):
        layer.name = f"{NAME}/{what}"
    return cast.get_output(0)


def _over_caches(trt: ModuleType, network: Any) -> Iterator[Any]:
    """Attentions whose keys are a cache: the parser may scale, cast or regroup them on the way."""
    passing = {getattr(trt.LayerType, name) for name in ("ELEMENTWISE", "CAST", "SHUFFLE", "IDENTITY")}
    made = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        made.update({layer.get_output(output).name: layer for output in range(layer.num_outputs)})
    for _, attention in _attentions(trt, network):
        layer = made.get(attention.get_input(1).name)
        while layer is not None and layer.type in passing:
            layer = made.get(layer.get_input(0).name)
        if layer is not None and layer.type == trt.LayerType.KV_CACHE_UPDATE:
            yield attention


def _attentions(trt: ModuleType, network: Any) -> Iterator[tuple[Any, Any]]:
    """(output layer, attention) of each attention."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            yield layer, layer.attention
