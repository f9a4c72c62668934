"""The function `flamingo::PhiRangeCrossAttention`: each position attends to the keys of a range of media, first_media .. phi.

    q [B,S,H,D]          k, v [N,Hk,R,D]          media_rows [B,M]   first_media, phi [B,S]
        |                     |                            \\______________/
        |                     |                          here [B,S,M]: m in first .. phi
        |                     |                          seats [N,P]: positions that see row n
    Gather(seats)             |                          places [B,S,M]: where the m-th part of a position is computed
    [N,Hk,P*H/Hk,D] ----- MatMul, Softmax, MatMul
                              |
             parts [N*P,H,D], their greatest score and sum [N*P,H]
                              |
                       Gather(places), weighed with exp(greatest - greatest of all) * sum
                              |
                          y [B,S,H,D], 0 where phi is 0

A medium has many keys (a tile of an image: 1601), so none is copied: every row of the bank that is given is multiplied where it lies, with
the positions that see it, whichever request they are of. Hence callers of one image share one product, and whoever runs the graph gives it
no more rows than are looked at: the cost follows N. The softmax over several media is joined from those over each.

What depends on media_rows, first_media and phi only is computed once: equal nodes of several calls become one in ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder
from flamingo_export.graphs.functions.phi_cross_attention import KV_SCALES
from flamingo_export.specs import FUNCTION_DOMAIN

NAME = "PhiRangeCrossAttention"
PLUGIN_VERSION = "1"


def phi_range_cross_attention(*, num_heads: int, num_kv_heads: int, head_size: int, fp8: bool = False) -> ir.Function:
    """The function with its body of standard operators: H heads of size D over Hk heads of keys. fp8: k and v are E4M3, scales follow."""
    build = GraphBuilder(prefix=NAME)
    names = ("q", "k", "v", "media_rows", "first_media", "phi")
    q, k, v, media_rows, first_media, phi = given = [ir.Value(name=name) for name in names]
    declared = [ir.AttrString("plugin_namespace", FUNCTION_DOMAIN), ir.AttrString("plugin_version", PLUGIN_VERSION)]
    if fp8:
        scales = [ir.Value(name=name) for name in ("k_scale", "v_scale")]
        k, v = (
            build.op("DequantizeLinear", bank, build.op("CastLike", scale, q, name=f"{name}/scale"), name=f"{name}/dequantise")
            for bank, scale, name in zip((k, v), scales, ("keys", "values"), strict=True)
        )
        given += scales
        declared.append(ir.AttrInt64(KV_SCALES, 1))
    here, seats, places = _seating(build, k, media_rows, first_media, phi)
    group = num_heads // num_kv_heads

    flat = build.reshape(q, [-1, num_heads, head_size], name="queries")
    scale = build.op("CastLike", build.constant(head_size**-0.5, dtype=np.float32), q, name="scale")
    flat = build.op("Mul", flat, scale, name="queries/scaled")
    seated = build.op("Gather", flat, seats, name="queries/seated", axis=0)  # [N, P, H, D]
    seated = build.reshape(seated, [0, 0, num_kv_heads, group, head_size], name="queries/groups")
    seated = build.op("Transpose", seated, name="queries/by_head", perm=[0, 2, 1, 3, 4])
    seated = build.reshape(seated, [0, 0, -1, head_size], name="queries/folded")  # [N, Hk, P * H / Hk, D]

    keys = build.op("Transpose", k, name="keys", perm=[0, 1, 3, 2])  # of the product, not of the memory
    scores = build.op("MatMul", seated, keys, name="scores")  # [N, Hk, P * H / Hk, R]
    probs = build.op("Softmax", scores, name="probs", axis=-1)
    parts = build.op("MatMul", probs, v, name="parts")
    last = build.constant([-1])
    top = build.op("ReduceMax", scores, last, name="top", keepdims=1)
    # The greatest probability is 1 / the sum of exp(score - top).
    share = build.op("ReduceMax", probs, last, name="share", keepdims=1)

    def by_place(x: ir.Value, size: int, name: str) -> ir.Value:
        """[N, Hk, P * H / Hk, size] -> of each position's media [B, S, M, H, size]."""
        with build.scope(name):
            x = build.reshape(x, [0, 0, -1, group, size], name="groups")
            x = build.op("Transpose", x, name="by_seat", perm=[0, 2, 1, 3, 4])
            x = build.reshape(x, [-1, num_heads, size], name="seats")
            return build.op("Gather", x, places, name="places", axis=0)  # type: ignore[no-any-return]

    parts, top, share = by_place(parts, head_size, "parts"), by_place(top, 1, "top"), by_place(share, 1, "share")
    here = build.op("Unsqueeze", here, build.constant([3, 4]), name="here/heads")  # [B, S, M, 1, 1]
    zero, one, least = (
        build.op("CastLike", build.constant(value, dtype=np.float32), q, name=name)
        for value, name in ((0.0, "zero"), (1.0, "one"), (-np.inf, "least"))
    )
    media = build.constant([2])
    top = build.op("Where", here, top, least, name="top/here")
    greatest = build.op("ReduceMax", top, media, name="greatest", keepdims=1)
    weight = build.op("Exp", build.op("Sub", top, greatest, name="below"), name="weight")
    weight = build.op("Div", weight, share, name="weight/sum")
    weight = build.op("Where", here, weight, zero, name="weight/here")  # [B, S, M, H, 1]
    parts = build.op("Where", here, parts, zero, name="parts/here")  # elsewhere anything may stand, infinities too
    total = build.op("ReduceSum", weight, media, name="total", keepdims=0)
    total = build.op("Where", build.op("Greater", total, zero, name="some"), total, one, name="total/some")
    summed = build.op("ReduceSum", build.op("Mul", parts, weight, name="weighed"), media, name="summed", keepdims=0)
    y = build.op("Div", summed, total, name="y")
    return build.function(NAME, given, [y], attributes=declared)


def call(
    build: GraphBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    media_rows: ir.Value,
    first_media: ir.Value,
    phi: ir.Value,
    *scales: ir.Value,
) -> ir.Value:
    """A node that calls the function; its attributes name the plugin for TensorRT's parser. scales: of k and v, where these are E4M3."""
    fields = {KV_SCALES: 1} if scales else {}
    y: ir.Value = build.op(
        NAME, q, k, v, media_rows, first_media, phi, *scales, name="phi_attention", domain=FUNCTION_DOMAIN,
        plugin_namespace=FUNCTION_DOMAIN, plugin_version=PLUGIN_VERSION, **fields,
    )  # fmt: skip
    return y


def _seating(
    build: GraphBuilder, k: ir.Value, media_rows: ir.Value, first_media: ir.Value, phi: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(here, seats, places).

    here, bool [B, S, M]: whether a position sees the m-th medium. seats, int64 [N, P]: positions, of all B * S, that see row n, in order;
    P as many as most see, and some other positions where fewer do. places, int64 [B, S, M]: n * P + p for which seats[n, p] is the position
    and n its m-th medium's row; any where it does not see that.
    """
    with build.scope("seating"):
        zero, one = build.constant(0), build.constant(1)
        size_media = build.op("Shape", media_rows, name="media", start=1, end=2)
        size_rows = build.op("Shape", k, name="rows", start=0, end=1)
        media = build.op(
            "Range", one, _scalar(build, build.op("Add", size_media, one, name="stop"), "stop"), one, name="numbers"
        )
        rows = build.op("Range", zero, _scalar(build, size_rows, "rows"), one, name="row_numbers")

        def each(x: ir.Value, name: str) -> ir.Value:
            return build.op("Unsqueeze", x, build.constant([2]), name=name)  # type: ignore[no-any-return]

        begun = build.op("LessOrEqual", each(first_media, "first"), media, name="begun")
        here = build.op("And", begun, build.op("GreaterOrEqual", each(phi, "phi"), media, name="open"), name="here")
        is_row = build.op("Equal", each(media_rows, "media_rows"), rows, name="is_row")  # [B, M, N]
        counted = build.op(
            "MatMul",
            build.op("Cast", here, name="here/float", to=ir.DataType.FLOAT),
            build.op("Cast", is_row, name="is_row/float", to=ir.DataType.FLOAT),
            name="counted",
        )
        sees = build.op("Greater", counted, build.constant(0.0, dtype=np.float32), name="sees/some")  # [B, S, N]
        sees = build.op("Cast", sees, name="sees/int", to=ir.DataType.INT64)
        sees = build.op(
            "Reshape", sees, build.op("Concat", build.constant([-1]), size_rows, name="flat", axis=0), name="sees"
        )  # [Q, N]
        through = build.op("CumSum", sees, zero, name="through")
        before = build.op("Sub", through, one, name="before")
        most = build.op("ReduceMax", through, name="most", keepdims=0)
        most = build.reshape(build.op("Max", most, one, name="most/some"), [1], name="seats_of_row")
        # The first positions that see a row have the largest numbers.
        size = build.op("Shape", sees, name="positions", start=0, end=1)
        down = build.op("Range", _scalar(build, size, "positions"), zero, build.constant(-1), name="down")
        numbered = build.op("Mul", sees, build.op("Unsqueeze", down, build.constant([1]), name="down/column"), name="numbered")
        _, seats = build.op("TopK", numbered, most, name="seats", outputs=2, axis=0, largest=1, sorted=1)  # [P, N]
        seats = build.op("Transpose", seats, name="seats/by_row", perm=[1, 0])

        shape = build.op("Concat", build.op("Shape", phi, name="shape"), size_rows, name="before/shape", axis=0)
        before = build.op("Reshape", before, shape, name="before/rows")  # [B, S, N]
        wanted = build.op("Unsqueeze", media_rows, build.constant([1]), name="wanted")  # [B, 1, M]
        wanted = build.op("Expand", wanted, build.op("Shape", here, name="here/shape"), name="wanted/each")
        seat = build.op("GatherElements", before, wanted, name="seat", axis=2)
        places = build.op("Add", build.op("Mul", wanted, most, name="begin"), seat, name="place")
        places = build.op("Where", here, places, zero, name="places")
        return here, seats, places


def _scalar(build: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    return build.op("Squeeze", x, name=f"{name}/scalar")  # type: ignore[no-any-return]
