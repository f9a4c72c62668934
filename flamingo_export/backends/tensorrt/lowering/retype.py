"""A portable graph, which computes in fp32, in the type that an engine computes in.

TensorRT is strongly typed: it computes in the types that the graph says. Every float becomes the compute type, but for

- the statistics of LayerNormalization and RMSNormalization, with scale and bias: the square of a hidden state beyond 256 is not an fp16
  number. TensorRT fuses the two Casts around them into its kernel;
- weights stored in another type, which stay where they are behind a Cast that TensorRT applies when building;
- scales that a function at the seam is called with, which plugins take in fp32 and bodies cast by themselves.

Logits are of the compute type: a product that gives fp32 would want the vocabulary's matrix in fp32, twice the bytes of the largest
matrix that a step reads. What sums them up (log-sum-exp) does so in fp32, outside of the graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.precision import StorageType
from flamingo_export.specs import FUNCTION_DOMAIN

DTYPES: dict[StorageType, ir.DataType] = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NORMALISATIONS = frozenset({"LayerNormalization", "RMSNormalization"})


def retype(model: ir.Model, compute: StorageType) -> None:
    """Changes a model in place, so that its floats are of type `compute`."""
    dtype = DTYPES[compute]
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = dtype
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        _retype_casts(graph, dtype)
        if dtype != ir.DataType.FLOAT:
            _keep_statistics(graph, dtype)
            _retype_constants(graph, dtype)


def _retype_casts(graph: ir.Graph, dtype: ir.DataType) -> None:
    """A Cast to fp32 becomes one to the compute type, or goes where its input is of that type already."""
    stored = _types(graph)
    for node in list(graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.FLOAT:
            continue
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        if stored.get(source) == dtype:
            ir.convenience.replace_all_uses_with(result, source)
            graph.remove(node, safe=True)
        else:
            node.attributes["to"] = ir.AttrInt64("to", dtype)


def _types(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Types of what is stored, and of parts of it."""
    found = {value: value.dtype for value in graph.initializers.values() if value.dtype is not None}
    for node in graph:
        if node.op_type in ("Gather", "Slice") and node.inputs[0] in found:
            found[node.outputs[0]] = found[node.inputs[0]]
    return found


def _keep_statistics(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Casts the input of every normalisation to fp32 and its result back; scale and bias are read in fp32 as they are stored."""
    for node in list(graph):
        if node.op_type not in NORMALISATIONS:
            continue
        x, y = node.inputs[0], node.outputs[0]
        widened = ir.node("Cast", [x], attributes={"to": ir.DataType.FLOAT}, name=f"{node.name}/fp32")
        widened.outputs[0].name = f"{node.name}/fp32:0"
        narrowed = ir.node("Cast", [y], attributes={"to": dtype}, name=f"{node.name}/narrow")
        result = narrowed.outputs[0]
        # The result takes the place of y, which may be an output of the graph.
        result.name, result.shape, result.type = y.name, y.shape, y.type
        y.name, y.shape, y.type = f"{node.name}/fp32:1", None, None
        ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
        narrowed.replace_input_with(0, y)
        node.replace_input_with(0, widened.outputs[0])
        graph.insert_before(node, widened)
        graph.insert_after(node, narrowed)


def _retype_constants(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Small constants change their type where they stand; weights kept in fp32 stay, with a Cast before all but normalisations and functions."""
    for value in list(graph.initializers.values()):
        if value.dtype != ir.DataType.FLOAT:
            continue
        if not isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _narrowed(value.const_value, dtype)
            value.dtype = dtype
            continue
        uses = [use for use in value.uses() if use.node.op_type not in NORMALISATIONS and use.node.domain != FUNCTION_DOMAIN]
        if uses:
            cast = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{value.name}/cast")
            cast.outputs[0].name = f"{value.name}/narrow"
            for use in uses:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    for node in graph:
        constant = node.attributes.get("value") if node.op_type == "Constant" else None
        if constant is not None and constant.as_tensor().dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", _narrowed(constant.as_tensor(), dtype))


def _narrowed(tensor: ir.TensorProtocol | None, dtype: ir.DataType) -> ir.TensorProtocol:
    assert tensor is not None
    return ir.tensor(np.asarray(tensor.numpy()).astype(dtype.numpy()), dtype=dtype, name=tensor.name)
