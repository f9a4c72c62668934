"""Self-attention of an LM layer against its cache.

    normed -- qkv_proj -- [norms of q and k] -- heads --> q, k, v
                                                          |  [rotary: q and k turned by their position]
                                      past_k, past_v -- TensorScatter --> present_k, present_v
                                                          |
                    Attention(q / sqrt(D), present_k, present_v, mask), then out_proj

What attention knows of positions is in the keys (rotary), or in an additive mask (relative positions, ALiBi).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs import alibi, relative_positions
from flamingo_export.graphs.builder import GraphBuilder
from flamingo_export.weights import INPUT_SCALE
from flamingo_reference.config import AlibiPositions, LanguageModelConfig, RelativePositions, RotaryPositions

Shared = relative_positions.Shared | ir.Value
"""What all layers use: the parts of relative positions, or the mask itself."""


def shared(build: GraphBuilder, inputs: dict[str, ir.Value], lm: LanguageModelConfig) -> Shared:
    """What does not depend on the layer."""
    if isinstance(lm.positions, RelativePositions):
        return relative_positions.shared(build, inputs, lm)
    if isinstance(lm.positions, AlibiPositions):
        return alibi.additive_mask(build, inputs, lm, lm.positions)
    return inputs["mask"]


def self_attention(
    build: GraphBuilder,
    lm: LanguageModelConfig,
    normed: ir.Value,
    inputs: dict[str, ir.Value],
    outputs: dict[str, ir.Value],
    layer: int,
    shared: Shared,
) -> ir.Value:
    """What the layer adds to its input [B, S, W]; present_k and present_v of the layer are put into `outputs`."""
    weights = f"decoder/layer.{layer}/self_attention"
    q, k, v = _qkv(build, lm, normed, weights)
    if isinstance(lm.positions, RotaryPositions):
        q, k = (_turned(build, lm, lm.positions, x, inputs["positions"], name) for name, x in (("q", q), ("k", k)))
    present = {}
    for kind, new in (("k", k), ("v", v)):
        present[kind] = build.op(
            "TensorScatter",
            inputs[f"past_{kind}.{layer}"],
            new,
            inputs["write_index"],
            name=f"write_{kind}",
            axis=2,
            mode="linear",
        )
        outputs[f"present_{kind}.{layer}"] = present[kind]
    if isinstance(shared, relative_positions.Shared):
        mask = relative_positions.additive_mask(build, weights, q, shared)
        q = build.op("Add", q, build.weight(f"{weights}/content_bias"), name="content_query")
    else:
        mask = shared
    scale = lm.head_size**-0.5
    k, v = present["k"], present["v"]
    if build.holds(f"{weights}/q{INPUT_SCALE}"):
        q, k, v = (
            build.rounded_to_fp8(x, build.stored(f"{weights}/{name}{INPUT_SCALE}"), name=name)
            for name, x in zip("qkv", (q, k, v), strict=True)
        )
    else:
        # By a node of its own: a product with factor 1 has a kernel for single rows in ONNX Runtime, a quarter faster in greedy decoding.
        q = build.op("Mul", q, build.constant(scale, dtype=np.float32), name="scaled_query")
        scale = 1.0
    seen = build.op("Attention", q, k, v, mask, name="attention", scale=float(scale))
    seen = build.merge_heads(seen, lm.num_heads * lm.head_size)
    return build.linear(seen, f"{weights}/out_proj", name="out_proj", bias=lm.bias)


def _qkv(build: GraphBuilder, lm: LanguageModelConfig, normed: ir.Value, weights: str) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries [B, H, S, D], keys and values [B, G, S, D]."""
    qkv = build.linear(normed, f"{weights}/qkv_proj", name="qkv_proj", bias=lm.bias)
    counts = (lm.num_heads, lm.kv_heads, lm.kv_heads)
    if lm.qk_norm:
        sizes = build.constant([count * lm.head_size for count in counts])
        q, k, v = build.op("Split", qkv, sizes, name="split_qkv", outputs=3, axis=-1)
        q, k = (
            build.norm(x, f"{weights}/{name}_norm", name=f"{name}_norm", eps=lm.norm_eps, bias=False)
            for name, x in (("q", q), ("k", k))
        )
        named = zip("qkv", (q, k, v), counts, strict=True)
        q, k, v = (build.heads(x, count, lm.head_size, name=name) for name, x, count in named)
        return q, k, v
    qkv = build.heads(qkv, sum(counts), lm.head_size, name="qkv")
    if lm.kv_heads == lm.num_heads:
        q, k, v = build.op("Split", qkv, name="split_qkv", outputs=3, axis=1, num_outputs=3)
    else:
        q, k, v = build.op("Split", qkv, build.constant(list(counts)), name="split_qkv", outputs=3, axis=1)
    return q, k, v


def _turned(
    build: GraphBuilder, lm: LanguageModelConfig, positions: RotaryPositions, x: ir.Value, places: ir.Value, name: str
) -> ir.Value:
    partial: dict[str, Any] = {} if positions.size == lm.head_size else {"rotary_embedding_dim": positions.size}
    tables = build.weight("decoder/rotary_cos"), build.weight("decoder/rotary_sin")
    turned: ir.Value = build.op("RotaryEmbedding", x, *tables, places, name=f"rotary_{name}", **partial)
    return turned
