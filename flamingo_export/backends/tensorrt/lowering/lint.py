"""What TensorRT would get wrong without a word, found in a lowered graph before it is parsed.

Each rule stands for a wrong result that was measured (facts in docs/tensorrt.md): the parser takes the graph, the engine builds, the
numbers are others. A graph that passes comes with what the parsed network must then hold (`Expected`), for the check after parsing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import msgspec
import onnx
import onnx_ir as ir

from flamingo_export.backends.tensorrt.lowering import phi_range
from flamingo_export.backends.tensorrt.lowering.lower import KV_SCALES, PLUGIN_ATTRIBUTES
from flamingo_export.backends.tensorrt.lowering.retype import DTYPES
from flamingo_export.backends.tensorrt.lowering.shapes import CAPACITY
from flamingo_export.errors import BuildError
from flamingo_export.precision import StorageType
from flamingo_export.specs import FUNCTION_DOMAIN, KIND_DTYPES, SubgraphSpec, TensorSpec

# Attention's inputs beyond q, k, v and mask, and attributes that TensorRT drops, reads otherwise or rejects.
_ATTENTION_INPUTS = {4: "past_key", 5: "past_value", 6: "nonpad_kv_seqlen"}
_ATTENTION_ATTRIBUTES = ("is_causal", "softcap", "softmax_precision", "qk_matmul_output_mode")


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What the network must hold once the graph is parsed."""

    plugin_layers: int
    cache_updates: int
    attentions: int
    attentions_over_caches: int = 0
    """Those whose keys come from a cache: they are given the lengths in use where TensorRT takes them."""
    quantised: int = 0
    """Products of a quantised matrix."""
    weights: Mapping[str, ir.ExternalTensor]
    """Weights that nodes read, by name."""
    kernels: Mapping[str, tuple[str, str | None]]
    """Convolution -> its kernel and bias. TensorRT keeps the kernel, and in fp32 the bias, in the layer and not as a constant of its own."""


def check_graph(
    model: ir.Model, spec: SubgraphSpec, *, compute: StorageType, capacity: int, native_functions: frozenset[str] = frozenset()
) -> Expected:
    """Raises BuildError naming every fault of a lowered graph, with the node it is at; returns what parsing must give."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    faults = [
        *_contract(model.graph, spec, compute, capacity),
        *_unused(model),
        *_functions(model, native_functions),
        *(fault for graph in graphs for node in graph for fault in _attention(node, compute)),
        *_caches(model.graph, spec, capacity),
        *_weights(model.graph),
    ]
    if faults:
        raise BuildError(
            f"the lowered graph of {spec.name} is not one that TensorRT would get right: {'; '.join(faults)}. "
            "Nothing was compiled; please report this with the graph."
        )
    calls = Counter(node.op_identifier() for node in model.graph)
    attentions = calls[("", "Attention", "")] + sum(
        calls[identifier] * sum(node.op_type == "Attention" for node in function)
        for identifier, function in model.functions.items()
    )
    used = {value.name: value.const_value for value in model.graph.initializers.values() if value.uses()}
    return Expected(
        plugin_layers=sum(node.domain == FUNCTION_DOMAIN and node.op_type in native_functions for node in model.graph),
        cache_updates=calls[("", "TensorScatter", "")],
        attentions=attentions,
        attentions_over_caches=sum(_is_over_a_cache(node) for node in model.graph),
        quantised=sum(_is_quantised_product(node) for node in model.graph),
        weights={name: value for name, value in used.items() if name and isinstance(value, ir.ExternalTensor)},
        kernels={
            node.name or "": (_initializer(node, 1) or "", _initializer(node, 2))
            for node in model.graph
            if node.op_type == "Conv" and _initializer(node, 1)
        },
    )


def _is_over_a_cache(node: ir.Node) -> bool:
    """Whether an attention's keys are what a TensorScatter gives."""
    if node.op_type != "Attention" or node.inputs[1] is None:
        return False
    made = node.inputs[1].producer()
    return made is not None and made.op_type == "TensorScatter"


def _is_quantised_product(node: ir.Node) -> bool:
    matrix = node.inputs[1] if node.op_type == "MatMul" else None
    made = matrix.producer() if matrix is not None else None
    codes = made.inputs[0] if made is not None and made.op_type == "DequantizeLinear" else None
    return codes is not None and codes.is_initializer()


def _initializer(node: ir.Node, index: int) -> str | None:
    """Name of the weight that is an input of a node."""
    value = node.inputs[index] if len(node.inputs) > index else None
    return value.name if value is not None and value.is_initializer() else None


def _contract(graph: ir.Graph, spec: SubgraphSpec, compute: StorageType, capacity: int) -> Iterator[str]:
    """Inputs and outputs are those of the contract, floats in the compute type, the capacity a number."""
    for what, values, tensors in (("input", graph.inputs, spec.inputs), ("output", graph.outputs, spec.outputs)):
        found, wanted = {value.name: value for value in values}, {tensor.name: tensor for tensor in tensors}
        for name in found.keys() ^ wanted.keys():
            yield f"{what} {name} is {'not in the contract' if name in found else 'missing'}"
        for name, tensor in wanted.items():
            if name in found:
                yield from _as_agreed(f"{what} {name}", found[name], tensor, compute, capacity)


def _as_agreed(where: str, value: ir.Value, tensor: TensorSpec, compute: StorageType, capacity: int) -> Iterator[str]:
    dtype = DTYPES[compute] if tensor.kind == "float" else ir.DataType.from_numpy(KIND_DTYPES[tensor.kind])
    if value.dtype != dtype:
        yield f"{where} is {value.dtype}, expected {dtype}"
    shape = None if value.shape is None else tuple(getattr(dim, "value", dim) for dim in value.shape)
    wanted = tuple(capacity if dim == CAPACITY else dim for dim in tensor.shape)
    if shape != wanted:
        yield f"{where} has shape {shape}, expected {wanted}"


def _unused(model: ir.Model) -> Iterator[str]:
    for graph, where in (
        (model.graph, ""),
        *((function.graph, f" of {function.name}") for function in model.functions.values()),
    ):
        for value in graph.inputs:
            if not value.uses() and not value.is_graph_output():
                yield f"input {value.name}{where} is not used"


def _functions(model: ir.Model, native: frozenset[str]) -> Iterator[str]:
    names = Counter(function.name for function in model.functions.values())
    for name, count in names.items():
        if count > 1:
            yield f"{count} functions are called {name}: TensorRT takes the first for all"
        if onnx.defs.has(name):
            yield f"function {name} has the name of a built-in operator, which would win"
    called = {function.identifier(): function for function in model.functions.values()}
    for function in called.values():
        for node in function:
            forwarded = [name for name, attribute in node.attributes.items() if attribute.is_ref()]
            if forwarded:
                yield f"{function.name} forwards {', '.join(forwarded)} to {node.name}: it would arrive as 0"
        if function.domain == FUNCTION_DOMAIN and function.name in native:
            yield f"function {function.name} still has a body beside its plugin: without the plugin it would be run silently"
    for node in chain(model.graph, *called.values()):
        target = called.get(node.op_identifier())
        if target is not None:
            yield from _call(node, target)
        elif node.domain == FUNCTION_DOMAIN and node.op_type in native:
            absent = [name for name in PLUGIN_ATTRIBUTES if name not in node.attributes]
            if absent:
                yield f"{node.name} does not name its plugin: {', '.join(absent)} missing"
            yield from _scales(node)
        elif node.domain not in ("", "ai.onnx"):
            yield f"{node.name} is a {node.domain}::{node.op_type}, which has neither body nor plugin here"


def _call(node: ir.Node, function: ir.Function) -> Iterator[str]:
    if len(node.inputs) != len(function.inputs) or any(value is None for value in node.inputs):
        yield f"{node.name} leaves inputs of {function.name} out"
    for name in function.attributes:
        if name not in node.attributes:
            yield f"{node.name} does not pass {name}, which {function.name} declares: it would be 0"
    coded = [value.name for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT8E4M3FN]
    if coded:
        yield f"{node.name} reads {', '.join(map(str, coded))} in FP8, which TensorRT takes only in a plugin: build with media in storage"
    plugin = [name for name in PLUGIN_ATTRIBUTES if name in node.attributes or name in function.attributes]
    if plugin:
        yield f"{node.name} names a plugin ({', '.join(plugin)}) that this backend does not have"


def _scales(node: ir.Node) -> Iterator[str]:
    """A plugin's call whose bank is E4M3 has both scales, in fp32, and says so; another has none."""
    bank, scales = node.inputs[1:3], node.inputs[6 if node.op_type == phi_range.NAME else 5 :]
    coded = sum(value is not None and value.dtype == ir.DataType.FLOAT8E4M3FN for value in bank)
    scaled = KV_SCALES in node.attributes and node.attributes[KV_SCALES].as_int() == 1
    if not coded and not scaled and not scales:
        return
    given = [None if value is None or value.dtype is None else str(value.dtype) for value in scales]
    if coded != 2 or not scaled or [value.dtype for value in scales if value is not None] != [ir.DataType.FLOAT] * 2:
        yield (
            f"{node.name} has {coded} inputs of the bank in FP8, scales {given} and {KV_SCALES} {int(scaled)}, "
            "expected both in FP8 with two scales in fp32, or none of it"
        )


def _attention(node: ir.Node, compute: StorageType) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx") or node.op_type != "Attention":
        return
    for index, name in _ATTENTION_INPUTS.items():
        if len(node.inputs) > index and node.inputs[index] is not None:
            yield f"{node.name} has {name}, which TensorRT drops or rejects: keep caches and lengths in the mask"
    for name in _ATTENTION_ATTRIBUTES:
        if name in node.attributes and node.attributes[name].value:
            yield f"{node.name} sets {name}, which TensorRT reads otherwise: use an explicit mask"
    if compute == "fp32" and "TRT_decomposable" not in node.attributes:
        yield f"{node.name} computes in fp32 without TRT_decomposable: no kernel has it"


def _caches(graph: ir.Graph, spec: SubgraphSpec, capacity: int) -> Iterator[str]:
    """Each cache goes from a graph input through one TensorScatter to the output that shares its buffer."""
    outputs = {value.name: value for value in graph.outputs}
    for output, source in spec.aliases.items():
        node = outputs[output].producer() if output in outputs else None
        if node is None or node.op_type != "TensorScatter":
            yield f"{output} does not come straight from a TensorScatter"
            continue
        cache = node.inputs[0]
        if cache is None or cache.name != source or not cache.is_graph_input():
            yield f"{node.name} updates {cache.name if cache is not None else 'nothing'}, expected the input {source}"
            continue
        shape = cache.shape
        axis, mode = node.attributes.get("axis"), node.attributes.get("mode")
        if shape is None or len(shape) != 4 or shape[2] != capacity:
            yield f"{node.name}: {source} has shape {shape}, expected 4 dimensions with {capacity} slots"
        if axis is None or axis.as_int() != 2 or (mode is not None and mode.as_string() != "linear"):
            yield f"{node.name} does not write linearly along axis 2"
        readers = [use.node.name or "" for use in cache.uses() if use.node is not node]
        if readers:
            yield f"{source} is read by {', '.join(readers)} beside its update: it is overwritten in place"
    written = len(spec.aliases)
    scatters = sum(node.op_type == "TensorScatter" for node in graph)
    if scatters != written:
        yield f"{scatters} TensorScatter nodes for {written} caches"


def _weights(graph: ir.Graph) -> Iterator[str]:
    """Every weight lies where nothing else lies, in a file below the bundle, and is as long as its type and shape say."""
    placed: dict[str, list[tuple[int, int, str]]] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = Path(str(tensor.location))
        if location.is_absolute() or ".." in location.parts:
            yield f"weight {name} lies outside of the bundle ({location})"
        start, length = tensor.offset or 0, tensor.length or 0
        if length != tensor.nbytes:
            yield f"weight {name} has {length} bytes in its file, expected {tensor.nbytes} for {tensor.dtype} {tensor.shape}"
        placed.setdefault(str(location), []).append((start, start + length, name))
    for spans in placed.values():
        yield from _overlaps(sorted(spans))


def _overlaps(spans: Iterable[tuple[int, int, str]]) -> Iterator[str]:
    last_stop, last = 0, ""
    for start, stop, name in spans:
        if start < last_stop:
            yield f"weights {last} and {name} share bytes of a file"
        last_stop, last = stop, name
