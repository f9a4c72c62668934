"""`flamingo::PhiRangeCrossAttention` without a plugin: the portable body replaced by one that TensorRT compiles.

The portable body multiplies rows of the bank where they lie, with as many positions as most see: a size that follows from numbers, which
TensorRT takes for shapes on the host only. Here the request's rows are taken and one attention, which TensorRT fuses, masks what is not seen.

    k, v [N,Hk,R,D]   media_rows [B,M]      first_media, phi [B,S]
          |___________________|                       |
     Gather rows, Transpose, Reshape       first <= m <= phi, each R times
          [B,Hk,M*R,D]                          [B,1,S,M*R]
                |__________________________________|
     q ---- Attention (grouped heads), then 0 where phi is 0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from flamingo_export.specs import FUNCTION_DOMAIN

NAME = "PhiRangeCrossAttention"
_OPSET = 24


def gather_rows(model: ir.Model) -> None:
    """Replaces the body, in place. A model that does not call the function, or whose bank is FP8, is left as it is."""
    calls = [node for node in model.graph if node.domain == FUNCTION_DOMAIN and node.op_type == NAME]
    if not calls or len(calls[0].inputs) > 6:
        return
    keys = calls[0].inputs[1]
    assert keys is not None
    assert keys.shape is not None
    num_keys, head_size = (int(size) for size in keys.shape[2:])  # type: ignore[arg-type]
    old = model.functions[calls[0].op_identifier()]
    model.functions[old.identifier()] = _function(num_keys, head_size, old.attributes.values())


class _Body:
    """The nodes of a function, each with a name."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value, name: str, **attributes: Any) -> ir.Value:
        full = f"{NAME}/{name}"
        self.nodes.append(ir.node(kind, inputs, attributes=attributes, outputs=[ir.Value(name=f"{full}:0")], name=full))
        return self.nodes[-1].outputs[0]

    def ints(self, *values: int) -> ir.Value:
        name = f"ints/{'_'.join(map(str, values))}/{len(self.nodes)}"
        return self.op("Constant", name=name, value=ir.tensor(np.array(values, np.int64), name=name))


def _function(num_keys: int, head_size: int, attributes: Any) -> ir.Function:
    body = _Body()
    names = ("q", "k", "v", "media_rows", "first_media", "phi")
    q, k, v, media_rows, first_media, phi = given = [ir.Value(name=name) for name in names]

    def taken(bank: ir.Value, name: str) -> ir.Value:
        rows = body.op("Gather", bank, media_rows, name=f"{name}/rows", axis=0)  # [B, M, Hk, R, D]
        rows = body.op("Transpose", rows, name=f"{name}/by_head", perm=[0, 2, 1, 3, 4])
        return body.op("Reshape", rows, body.ints(0, 0, -1, head_size), name=f"{name}/join")

    keys, values = taken(k, "keys"), taken(v, "values")
    shape = body.op("Shape", media_rows, name="mask/shape")
    one = body.op("Squeeze", body.ints(1), name="mask/one")
    count = body.op("Squeeze", body.op("Gather", shape, body.ints(1), name="mask/media", axis=0), name="mask/media/scalar")
    media = body.op("Range", one, body.op("Add", count, one, name="mask/stop"), one, name="mask/numbers")

    def column(x: ir.Value, name: str) -> ir.Value:
        return body.op("Unsqueeze", x, body.ints(2), name=name)

    begun = body.op("LessOrEqual", column(first_media, "mask/first"), media, name="mask/begun")
    here = body.op("And", begun, body.op("GreaterOrEqual", column(phi, "mask/phi"), media, name="mask/open"), name="mask/here")
    each = body.op(
        "Expand",
        body.op("Unsqueeze", here, body.ints(3), name="mask/here/key"),
        body.ints(1, 1, 1, num_keys),
        name="mask/each",
    )
    mask = body.op("Unsqueeze", body.op("Reshape", each, body.ints(0, 0, -1), name="mask/join"), body.ints(1), name="mask")
    queries = body.op("Transpose", q, name="queries", perm=[0, 2, 1, 3])
    seen = body.op("Attention", queries, keys, values, mask, name="attention", scale=float(head_size**-0.5))
    seen = body.op("Transpose", seen, name="merge", perm=[0, 2, 1, 3])
    some = body.op("Greater", phi, body.op("Squeeze", body.ints(0), name="none"), name="some_media")
    some = body.op("Unsqueeze", some, body.ints(2, 3), name="some_media/heads")
    zero = body.op("Constant", name="zero", value=ir.tensor(np.float32(0.0), name="zero"))
    y = body.op("Where", some, seen, body.op("CastLike", zero, seen, name="zero/like"), name="y")
    graph = ir.Graph(given, [y], nodes=body.nodes, opset_imports={"": _OPSET}, name=NAME)
    return ir.Function(FUNCTION_DOMAIN, NAME, "", graph=graph, attributes=list(attributes))
