"""The function `flamingo::PhiCrossAttention`: each position attends to the latents of its own medium.

    q [B,S,H,D]        k, v [N,H,R,D]     media_rows [B,M]        phi [B,S]
        |                   \\________________/                   /      \\
    Transpose             Gather rows, Transpose            == 1..M       \\
    [B,H,S,D]                 [B,H,M*R,D]                [B,1,S,M*R]       |
        \\____________________________|___________________________/         |
                            Attention (mask)                               |
                          Transpose [B,S,H,D]                              |
                                   \\______________  Where(phi > 0, ., 0) __/
                                                           |
                                                       y [B,S,H,D]

The request's rows are taken before anything is masked, so the cost follows the request's media and not the bank. A backend with a
kernel of its own (the TensorRT plugin of the same name) replaces the body.

A bank of E4M3 codes comes with k_scale and v_scale, fp32 []. ONNX's Gather takes no FP8, so the body widens the whole bank before it takes
the rows; the plugin reads the codes in place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder
from flamingo_export.specs import FUNCTION_DOMAIN

NAME = "PhiCrossAttention"
PLUGIN_VERSION = "1"
KV_SCALES = "kv_scales"
"""Field of the plugin: k and v are FP8, and two scales follow phi."""


def phi_cross_attention(*, num_latents: int, head_size: int, fp8: bool = False) -> ir.Function:
    """The function with its body of standard operators, for latents R and head size D. fp8: k and v are E4M3, and their scales follow."""
    build = GraphBuilder(prefix=NAME)
    q, k, v, media_rows, phi = given = [ir.Value(name=name) for name in ("q", "k", "v", "media_rows", "phi")]
    declared = [ir.AttrString("plugin_namespace", FUNCTION_DOMAIN), ir.AttrString("plugin_version", PLUGIN_VERSION)]
    if fp8:
        scales = [ir.Value(name=name) for name in ("k_scale", "v_scale")]
        k, v = (
            build.op("DequantizeLinear", bank, build.op("CastLike", scale, q, name=f"{name}/scale"), name=f"{name}/dequantise")
            for bank, scale, name in zip((k, v), scales, ("keys", "values"), strict=True)
        )
        given += scales
        declared.append(ir.AttrInt64(KV_SCALES, 1))
    keys, values = (_rows_of_request(build, bank, media_rows, head_size, name) for bank, name in ((k, "keys"), (v, "values")))
    mask = _mask(build, media_rows, phi, num_latents)
    queries = build.op("Transpose", q, name="queries", perm=[0, 2, 1, 3])
    seen = build.op("Attention", queries, keys, values, mask, name="attention", scale=float(head_size**-0.5))
    seen = build.op("Transpose", seen, name="merge", perm=[0, 2, 1, 3])
    some = build.op("Greater", phi, build.constant(0), name="some_medium")
    some = build.op("Unsqueeze", some, build.constant([2, 3]), name="some_medium/heads")
    zero = build.op("CastLike", build.constant(0.0, dtype=np.float32), seen, name="zero")
    y = build.op("Where", some, seen, zero, name="y")
    return build.function(NAME, given, [y], attributes=declared)


def call(
    build: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, media_rows: ir.Value, phi: ir.Value, *scales: ir.Value
) -> ir.Value:
    """A node that calls the function; its attributes name the plugin for TensorRT's parser. scales: of k and v, where these are E4M3."""
    fields = {KV_SCALES: 1} if scales else {}
    y: ir.Value = build.op(
        NAME, q, k, v, media_rows, phi, *scales, name="phi_attention", domain=FUNCTION_DOMAIN,
        plugin_namespace=FUNCTION_DOMAIN, plugin_version=PLUGIN_VERSION, **fields,
    )  # fmt: skip
    return y


def _rows_of_request(build: GraphBuilder, bank: ir.Value, media_rows: ir.Value, head_size: int, name: str) -> ir.Value:
    with build.scope(name):
        rows = build.op("Gather", bank, media_rows, name="rows", axis=0)  # [B, M, H, R, D]
        rows = build.op("Transpose", rows, name="by_head", perm=[0, 2, 1, 3, 4])
        return build.reshape(rows, [0, 0, -1, head_size], name="join")


def _mask(build: GraphBuilder, media_rows: ir.Value, phi: ir.Value, num_latents: int) -> ir.Value:
    """[B, 1, S, M * R]: key m * R + r belongs to medium m + 1."""
    with build.scope("mask"):
        num_media = build.op("Gather", build.op("Shape", media_rows, name="shape"), build.constant(1), name="num_media", axis=0)
        one = build.constant(1)
        media = build.op("Range", one, build.op("Add", num_media, one, name="stop"), one, name="media")
        here = build.op("Equal", build.op("Unsqueeze", phi, build.constant([2]), name="phi"), media, name="here")  # [B, S, M]
        each = build.op(
            "Expand",
            build.op("Unsqueeze", here, build.constant([3]), name="here/latent"),
            build.constant([1, 1, 1, num_latents]),
            name="each",
        )
        return build.op("Unsqueeze", build.reshape(each, [0, 0, -1], name="join"), build.constant([1]), name="mask")  # type: ignore[no-any-return]
