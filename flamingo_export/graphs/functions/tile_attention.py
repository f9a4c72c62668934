"""The function `flamingo::TileAttention`: attention among the tokens of an image's tiles, in slices of queries.

    q, k, v [F,H,L,D]                    real [F,L]
        |                                    |
    q in slices of queries      real query or real key [F,1,slice,L]
        |____________________________________|
               Attention (mask), a slice
                        |
              slices side by side --> y [F,H,L,D]

Only padding to padding is masked. A slice bounds the memory of the scores, which take H * L * L numbers at once: 2.6 GB for an image of
560 pixels, a slice's 204 MB. A backend with an attention that keeps no scores may replace the body.
"""

from __future__ import annotations

import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder
from flamingo_export.specs import FUNCTION_DOMAIN

NAME = "TileAttention"
SLICE = 512
"""Most queries of a slice."""


def tile_attention(*, num_tokens: int, head_size: int) -> ir.Function:
    """The function with its body of standard operators, for L tokens and head size D."""
    build = GraphBuilder(prefix=NAME)
    q, k, v, real = given = [ir.Value(name=name) for name in ("q", "k", "v", "real")]
    keys = build.op("Unsqueeze", real, build.constant([1, 2]), name="real/keys")
    queries = build.op("Unsqueeze", real, build.constant([1, 3]), name="real/queries")
    count = -(-num_tokens // SLICE)
    size = -(-num_tokens // count)
    seen = []
    for index in range(count):
        with build.scope(f"slice.{index}"):
            ends = build.constant([index * size]), build.constant([min(num_tokens, (index + 1) * size)]), build.constant([2])
            mask = build.op("Or", build.op("Slice", queries, *ends, name="real"), keys, name="mask")
            some = build.op("Slice", q, *ends, name="queries")
            seen.append(build.op("Attention", some, k, v, mask, name="attention", scale=float(head_size**-0.5)))
    y = build.op("Concat", *seen, name="y", axis=2)
    return build.function(NAME, given, [y], attributes=[])


def call(build: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value, real: ir.Value) -> ir.Value:
    """A node that calls the function."""
    y: ir.Value = build.op(NAME, q, k, v, real, name="tile_attention", domain=FUNCTION_DOMAIN)
    return y
