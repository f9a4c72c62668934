"""A lowered graph into TensorRT's network, and the check that the network is what the graph says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir

from flamingo_export.backends.tensorrt.lengths import count_lengths, supported
from flamingo_export.backends.tensorrt.log import BuilderMessages, meaning
from flamingo_export.backends.tensorrt.lowering.lint import Expected
from flamingo_export.errors import BuildError
from flamingo_export.specs import SubgraphSpec

_PLUGINS = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")
# Bytes compared at a time.
_BLOCK = 1 << 24


def parse(trt: ModuleType, network: Any, logger: Any, graph: Path, messages: BuilderMessages) -> Any:
    """Fills `network` from a file, whose weights TensorRT maps from beside it, and returns the parser: it owns what was mapped.

    Raises BuildError naming each node that was refused, and where it is in our graph.
    """
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        refused = [_refused(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(
            f"TensorRT {trt.__version__} does not take {graph.name}: {'; '.join(dict.fromkeys(refused)) or messages.explanation()}"
        )
    return parser


def _refused(error: Any) -> str:
    text = " ".join(error.desc().split())
    words = meaning(text)
    where = f"node {error.node_name()} ({error.node_operator()})" if error.node_name() else "the graph"
    if error.local_function_stack_size():
        where += f" in {' in '.join(error.local_function_stack())}"
    return f"{where}: {f'{words} ({text})' if words else text}"


def check_network(
    trt: ModuleType, network: Any, spec: SubgraphSpec, expected: Expected, messages: BuilderMessages, *, bundle: Path
) -> None:
    """Raises BuildError if parsing lost or changed anything: inputs, outputs, plugin layers, cache updates, attention, weights."""
    faults = [
        *_tensors(network, spec),
        *_counts(trt, network, expected),
        *_weights(trt, network, expected, bundle),
    ]
    _refuse(trt, spec, faults)


def check_warnings(trt: ModuleType, spec: SubgraphSpec, messages: BuilderMessages) -> None:
    """Raises BuildError if the compiler found an input that nothing reads, which it only warns of: the parser has dropped its reader."""
    _refuse(trt, spec, [" ".join(text.split()) for text in messages.warnings if "unused input" in text.lower()])


# What the bindings give as an object without its numbers, for want of a type in numpy.
_UNREADABLE = {"BF16": ir.DataType.BFLOAT16, "FP8": ir.DataType.FLOAT8E4M3FN, "INT4": ir.DataType.INT4}


def _refuse(trt: ModuleType, spec: SubgraphSpec, faults: list[str]) -> None:
    if faults:
        raise BuildError(
            f"TensorRT {trt.__version__} read {spec.name} otherwise than it is: {'; '.join(faults)}. "
            "An engine would give wrong results, so there is none; please report this."
        )


def _tensors(network: Any, spec: SubgraphSpec) -> Iterator[str]:
    found = ({network.get_input(index).name for index in range(network.num_inputs)},
             {network.get_output(index).name for index in range(network.num_outputs)})  # fmt: skip
    for what, names, tensors in zip(("input", "output"), found, (spec.inputs, spec.outputs), strict=True):
        wanted = {tensor.name for tensor in tensors}
        for name in sorted(names ^ wanted):
            yield f"{what} {name} was {'added' if name in names else 'lost'}"


def _counts(trt: ModuleType, network: Any, expected: Expected) -> Iterator[str]:
    counts = layer_counts(network)
    plugins = sum(counts[name] for name in _PLUGINS)
    if plugins != expected.plugin_layers:
        yield f"{plugins} plugin layers, expected {expected.plugin_layers}"
    if counts["KV_CACHE_UPDATE"] != expected.cache_updates:
        yield f"{counts['KV_CACHE_UPDATE']} cache updates in place, expected {expected.cache_updates}"
    if counts["ATTENTION_OUTPUT"] != expected.attentions:
        yield f"{counts['ATTENTION_OUTPUT']} attention layers, expected {expected.attentions}"
    wanted = expected.attentions_over_caches if supported(trt) else 0
    if (found := count_lengths(trt, network)) != wanted:
        yield f"{found} attentions with the lengths in use, expected {wanted}"


def layer_counts(network: Any) -> Counter[str]:
    """Layers of a network by the name of their type."""
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def _weights(trt: ModuleType, network: Any, expected: Expected, bundle: Path) -> Iterator[str]:
    """Every weight is there under its name, read, with its type, its size and its numbers (of types that numpy lacks: its type and size)."""
    held: dict[str, Any] = {}
    for layer in _needed(network):
        if layer.type == trt.LayerType.CONSTANT and layer.name in expected.weights:
            layer.__class__ = trt.IConstantLayer
            held[layer.name] = layer.weights
        elif layer.type == trt.LayerType.CONVOLUTION and layer.name in expected.kernels:
            layer.__class__ = trt.IConvolutionLayer
            kernel, bias = expected.kernels[layer.name]
            held[kernel] = layer.kernel
            if bias is not None and layer.bias.size:
                held[bias] = layer.bias
    for name, tensor in expected.weights.items():
        if name not in held:
            yield f"weight {name} was lost, is not read, or was merged with another"
        elif not _same(held[name], tensor, bundle):
            yield f"weight {name} has other numbers, or another type or size, than its file"


def _needed(network: Any) -> list[Any]:
    """Layers that the outputs depend on. Names within functions may come twice; layers of one name are then needed together."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for output in range(layer.num_outputs):
            made.setdefault(layer.get_output(output).name, []).append(index)
    found: set[int] = set()
    wanted = [network.get_output(index).name for index in range(network.num_outputs)]
    while wanted:
        for index in made.pop(wanted.pop(), ()):
            if index not in found:
                found.add(index)
                given = (layers[index].get_input(place) for place in range(layers[index].num_inputs))
                wanted += [tensor.name for tensor in given if tensor is not None]
    return [layers[index] for index in sorted(found)]


def _same(found: Any, tensor: ir.ExternalTensor, bundle: Path) -> bool:
    if found.size != tensor.size:
        return False
    if not isinstance(found, np.ndarray):  # with a type and a size, but not even a length in bytes that holds for int4
        return _UNREADABLE.get(found.dtype.name) == tensor.dtype
    if found.dtype != tensor.dtype.numpy():
        return False
    stored = np.memmap(bundle / tensor.location, mode="r", dtype=np.uint8, offset=tensor.offset or 0, shape=(tensor.nbytes,))
    numbers = found.reshape(-1).view(np.uint8)
    return all(
        np.array_equal(numbers[start : start + _BLOCK], stored[start : start + _BLOCK])
        for start in range(0, tensor.nbytes, _BLOCK)
    )
