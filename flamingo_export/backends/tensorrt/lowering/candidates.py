"""The best tokens after each position, worked out in the engine, so that in greedy and beam search no vocabulary leaves the device.

    logits [B,K,V] -> Cast fp32 -> Add (minus infinity at banned tokens) -> TopK ------------------------> top_values, top_ids [B,K,n]
                                                  |
                                                  +-> x - max -> Exp -> ReduceSum -> Log -> + max ---> log_sum_exp [B,K]

n is the beams of a request and the tokens that end a text: of a branch's n best tokens W others are left for W beams.
The logarithm is written out, for TensorRT's parser takes ReduceLogSumExp without subtracting the maximum, which overflows beyond 88.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from flamingo_export.specs import LOG_SUM_EXP, TOP_IDS, TOP_VALUES, SubgraphSpec, TensorSpec


def with_candidates(spec: SubgraphSpec, count: int) -> SubgraphSpec:
    """The contract of an engine that also gives the `count` best tokens; that of a subgraph without logits as it is."""
    logits = next((tensor for tensor in spec.outputs if tensor.name == "logits"), None)
    if logits is None:
        return spec
    leading, vocabulary = logits.shape[:-1], logits.shape[-1]
    assert isinstance(vocabulary, int)
    best = (*leading, min(count, vocabulary))
    added = (TensorSpec(TOP_VALUES, "fp32", best), TensorSpec(TOP_IDS, "int64", best), TensorSpec(LOG_SUM_EXP, "fp32", leading))
    return msgspec.structs.replace(spec, outputs=(*spec.outputs, *added))


def without_candidates(spec: SubgraphSpec) -> SubgraphSpec:
    """The contract of an engine whose candidates are not to be used: searches get the logits of the whole vocabulary."""
    added = (TOP_VALUES, TOP_IDS, LOG_SUM_EXP)
    return msgspec.structs.replace(spec, outputs=tuple(tensor for tensor in spec.outputs if tensor.name not in added))


def add_candidates(model: ir.Model, spec: SubgraphSpec, *, banned: Sequence[int]) -> ir.Model:
    """Adds the outputs that `spec` has beyond the graph's, if it has them, in place. banned: the tokens that are never generated."""
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    if TOP_IDS not in outputs:
        return model
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    vocabulary, count = outputs["logits"].shape[-1], outputs[TOP_IDS].shape[-1]
    assert isinstance(vocabulary, int)
    never = np.zeros(vocabulary, np.float32)
    never[list(banned)] = -np.inf

    def op(kind: str, *inputs: ir.Value, name: str, outputs: int = 1, **attributes: int) -> ir.Node:
        node = ir.node(kind, inputs, attributes=attributes, name=f"decoder/candidates/{name}", num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}:{index}"
        graph.append(node)
        return node

    def constant(name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        node = ir.node("Constant", [], attributes={"value": ir.tensor(value, name=name)}, name=f"decoder/candidates/{name}")
        node.outputs[0].name = f"{node.name}:0"
        graph.append(node)
        return node.outputs[0]

    last = constant("last_axis", np.array([-1]))
    wide = op("Cast", logits, name="fp32", to=ir.DataType.FLOAT).outputs[0]
    allowed = op("Add", wide, constant("never", never), name="allowed").outputs[0]
    values, ids = op("TopK", allowed, constant("count", np.array([count])), name="top", outputs=2, axis=-1).outputs
    highest = op("ReduceMax", allowed, last, name="max", keepdims=1).outputs[0]
    terms = op("Exp", op("Sub", allowed, highest, name="below_max").outputs[0], name="exp").outputs[0]
    total = op("Log", op("ReduceSum", terms, last, name="sum", keepdims=1).outputs[0], name="log").outputs[0]
    both = op("Add", total, highest, name="log_sum_exp").outputs[0]
    summed = op("Squeeze", both, last, name="squeeze").outputs[0]
    for tensor, value, dtype in (
        (outputs[TOP_VALUES], values, ir.DataType.FLOAT),
        (outputs[TOP_IDS], ids, ir.DataType.INT64),
        (outputs[LOG_SUM_EXP], summed, ir.DataType.FLOAT),
    ):
        value.name, value.shape, value.type = tensor.name, ir.Shape(list(tensor.shape)), ir.TensorType(dtype)
        graph.outputs.append(value)
    return model
