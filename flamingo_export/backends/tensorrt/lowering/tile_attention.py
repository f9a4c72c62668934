"""`flamingo::TileAttention` in 16 bits: one attention over all tokens in place of slices of queries.

    q, k, v [F,H,L,D]       real [F,L]
          |                     |
          |       real query or real key [F,1,L,L]
          |_____________________|
              Attention (mask) --> y [F,H,L,D]

Slices bound the memory of the scores, which a fused attention does not keep. TensorRT for RTX 1.7.1 ends with a segmentation fault over the 13
slices of an image of 560 pixels in bf16; in fp16 it compiles 13 kernels per layer. In fp32 TensorRT has no fused attention: slices stay.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

NAME = "TileAttention"
_OPSET = 24


def join_slices(model: ir.Model) -> None:
    """Replaces the function's body, in place. A model without the function is left as it is."""
    for identifier, function in list(model.functions.items()):
        if function.name == NAME:
            (scale,) = {node.attributes["scale"].as_float() for node in function.graph if node.op_type == "Attention"}
            model.functions[identifier] = _function(function.domain, scale)


def _function(domain: str, scale: float) -> ir.Function:
    q, k, v, real = given = [ir.Value(name=name) for name in ("q", "k", "v", "real")]
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, name: str, **attributes: object) -> ir.Value:
        full = f"{NAME}/{name}"
        nodes.append(ir.node(kind, inputs, attributes=attributes, outputs=[ir.Value(name=f"{full}:0")], name=full))  # type: ignore[arg-type]
        return nodes[-1].outputs[0]

    def seen(name: str, *axes: int) -> ir.Value:
        where = op("Constant", name=f"{name}/axes", value=ir.tensor(np.array(axes, np.int64), name=f"{name}/axes"))
        return op("Unsqueeze", real, where, name=name)

    mask = op("Or", seen("real/queries", 1, 3), seen("real/keys", 1, 2), name="mask")
    y = op("Attention", q, k, v, mask, name="attention", scale=scale)
    graph = ir.Graph(given, [y], nodes=nodes, opset_imports={"": _OPSET}, name=NAME)
    return ir.Function(domain, NAME, "", graph=graph, attributes=[])
