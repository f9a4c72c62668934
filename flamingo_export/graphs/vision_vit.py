"""The `vision_encoder` graph: CLIP's vision transformer.

pixels -- convolution of patches -- a place for the class token in front -- + positions -- norm -- layers -- [norm] -- [class token off]

The class token is stored in the position embedding of its place, so that what stands there before is zero.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.towers import pooled
from flamingo_export.specs import subgraph_specs
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig, ViTConfig


def vision_encoder(config: ModelConfig, vision: ViTConfig, index: WeightIndex) -> ir.Model:
    """pixels [F, 3, I, I] -> features [F, P, E], and pooled [F, Ep] where there is a contrastive encoder."""
    spec = subgraph_specs(config)["vision_encoder"]
    build = GraphBuilder(index, prefix="vision_encoder")
    inputs = graph_inputs(spec)
    patch = [vision.patch_size, vision.patch_size]
    x = build.op(
        "Conv", inputs["pixels"], build.weight("vision_encoder/patch_embedding"), name="patch_embedding",
        kernel_shape=patch, strides=patch,
    )  # fmt: skip
    x = build.op("Transpose", build.reshape(x, [0, vision.width, -1], name="flatten"), name="patches", perm=[0, 2, 1])
    x = build.op("Pad", x, build.constant([0, 1, 0, 0, 0, 0]), build.constant(0.0, dtype=np.float32), name="class_token")
    x = build.op("Add", x, build.weight("vision_encoder/position_embedding"), name="add_positions")
    x = build.norm(x, "vision_encoder/pre_norm", name="pre_norm", eps=vision.norm_eps)
    for layer in range(vision.num_layers):
        with build.scope(f"layer.{layer}"):
            x = _layer(build, f"vision_encoder/layer.{layer}", x, vision)
    last = x
    if not vision.class_token:
        ends = build.constant([1]), build.constant([vision.grid_size + 1]), build.constant([1])
        x = build.op("Slice", x, *ends, name="without_class_token")
    if vision.final_norm:
        x = build.norm(x, "vision_encoder/final_norm", name="final_norm", eps=vision.norm_eps)
    return build.model(spec, inputs, {"features": x, **pooled(build, config, x, tokens=last)})


def _layer(build: GraphBuilder, weights: str, x: ir.Value, vision: ViTConfig) -> ir.Value:
    heads, head_size = vision.num_heads, vision.head_size
    normed = build.norm(x, f"{weights}/attention_norm", name="attention_norm", eps=vision.norm_eps)
    qkv = build.heads(build.linear(normed, f"{weights}/qkv_proj", name="qkv_proj", bias=True), 3 * heads, head_size, name="qkv")
    q, k, v = build.op("Split", qkv, name="split_qkv", outputs=3, axis=1, num_outputs=3)
    seen = build.merge_heads(build.op("Attention", q, k, v, name="attention", scale=float(head_size**-0.5)), vision.width)
    x = build.op("Add", x, build.linear(seen, f"{weights}/out_proj", name="out_proj", bias=True), name="residual")
    normed = build.norm(x, f"{weights}/ffw_norm", name="ffw_norm", eps=vision.norm_eps)
    down = build.feed_forward(normed, weights, vision.activation, bias=True)
    return build.op("Add", x, down, name="ffw_residual")  # type: ignore[no-any-return]
