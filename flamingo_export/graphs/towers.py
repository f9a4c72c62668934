"""The contrastive encoder: what the vision encoder's graph adds for it (`pooled`), and the graphs `image_tower` and `text_tower`.

pooled [F,Ep] -- [norm] -- projection -- length 1 --> image_embedding [F,J]
token_ids [B,S] -- embedding -- + positions -- [norm] -- layers, masked by lengths -- [norm] -- pooling -- projection -- length 1
                                                                                              --> text_embedding [B,J]
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.resampler import perceiver
from flamingo_export.specs import IMAGE_TOWER, TEXT_TOWER, subgraph_specs
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import ClassToken, Readout, TextConfig
from flamingo_reference.names import readout_model

READOUT = "vision_encoder/readout"


def pooled(
    build: GraphBuilder, config: ModelConfig, features: ir.Value, *, tokens: ir.Value | None = None
) -> dict[str, ir.Value]:
    """The output `pooled` [F, Ep] of the vision encoder, nothing where there is no contrastive encoder.

    features: [F, P, E]. tokens: [F, K, E] of a ViT as they leave the last layer, the class token first.
    """
    contrastive = config.contrastive
    if contrastive is None:
        return {}
    if isinstance(contrastive.pooling, ClassToken):
        return {"pooled": build.op("Gather", tokens, build.constant(0), name="pooled", axis=1)}
    if isinstance(contrastive.pooling, Readout):
        with build.scope("readout"):
            frames = build.op("Unsqueeze", features, build.constant([1]), name="frames")
            latents = perceiver(build, readout_model(config, contrastive.pooling), READOUT, frames)
            return {"pooled": build.reshape(latents, [0, -1], name="pooled")}
    return {"pooled": build.op("ReduceMean", features, build.constant([1]), name="pooled", keepdims=0)}


def image_tower(config: ModelConfig, index: WeightIndex) -> ir.Model:
    """pooled [F, Ep] -> image_embedding [F, J]. The config must have a contrastive encoder."""
    contrastive, spec = config.contrastive, subgraph_specs(config)[IMAGE_TOWER]
    assert contrastive is not None
    build = GraphBuilder(index, prefix=IMAGE_TOWER)
    inputs = graph_inputs(spec)
    x = inputs["pooled"]
    if contrastive.image_norm:
        x = build.norm(x, f"{IMAGE_TOWER}/norm", name="norm", eps=contrastive.norm_eps)
    return build.model(spec, inputs, {"image_embedding": _embedding(build, x, IMAGE_TOWER)})


def text_tower(config: ModelConfig, index: WeightIndex) -> ir.Model:
    """token_ids [B, S], lengths [B] -> text_embedding [B, J]. The config must have a text tower."""
    spec = subgraph_specs(config)[TEXT_TOWER]
    assert config.contrastive is not None
    text = config.contrastive.text
    assert text is not None
    build = GraphBuilder(index, prefix=TEXT_TOWER)
    inputs = graph_inputs(spec)
    ids, lengths = inputs["token_ids"], inputs["lengths"]
    x = build.op("Gather", build.stored(f"{TEXT_TOWER}/embedding"), ids, name="embedding", axis=0)
    x = build.widened(x, f"{TEXT_TOWER}/embedding", name="embedding/fp32")
    size = build.op("Shape", ids, name="size", start=1, end=2)
    positions = build.op(
        "Slice",
        build.weight(f"{TEXT_TOWER}/position_embedding"),
        build.constant([0]),
        size,
        build.constant([0]),
        name="positions",
    )
    x = build.op("Add", x, positions, name="add_positions")
    if text.embedding_norm:
        x = build.norm(x, f"{TEXT_TOWER}/embedding_norm", name="embedding_norm", eps=text.norm_eps)
    real, mask = _masks(build, size, lengths, text)
    for layer in range(text.num_layers):
        with build.scope(f"layer.{layer}"):
            x = _layer(build, f"{TEXT_TOWER}/layer.{layer}", x, mask, text)
    if text.final_norm:
        x = build.norm(x, f"{TEXT_TOWER}/final_norm", name="final_norm", eps=text.norm_eps)
    x = _pooled_text(build, x, real, lengths, text)
    return build.model(spec, inputs, {"text_embedding": _embedding(build, x, TEXT_TOWER)})


def _masks(build: GraphBuilder, size: ir.Value, lengths: ir.Value, text: TextConfig) -> tuple[ir.Value, ir.Value]:
    """Which tokens are a text's own, bool [B, S], and which of them each sees, bool [B, 1, S, S]."""
    count = build.op("Squeeze", size, build.constant([0]), name="count")
    places = build.op("Range", build.constant(0), count, build.constant(1), name="places")
    ends = build.op("Unsqueeze", lengths, build.constant([1]), name="ends")
    real = build.op("Less", places, ends, name="real")
    keys = build.op("Unsqueeze", real, build.constant([1, 2]), name="keys")
    if text.causal:
        queries = build.op("Unsqueeze", places, build.constant([1]), name="queries")
        seen = build.op("LessOrEqual", places, queries, name="causal")
        return real, build.op("And", keys, seen, name="mask")
    one = build.constant([1])
    each = build.op("Concat", one, one, size, one, name="mask/shape", axis=0)
    return real, build.op("Expand", keys, each, name="mask")


def _layer(build: GraphBuilder, weights: str, x: ir.Value, mask: ir.Value, text: TextConfig) -> ir.Value:
    heads, head_size = text.num_heads, text.head_size

    def norm(value: ir.Value, name: str) -> ir.Value:
        return build.norm(value, f"{weights}/{name}", name=name, eps=text.norm_eps)

    read = x if text.post_norm else norm(x, "attention_norm")
    qkv = build.heads(build.linear(read, f"{weights}/qkv_proj", name="qkv_proj", bias=True), 3 * heads, head_size, name="qkv")
    q, k, v = build.op("Split", qkv, name="split_qkv", outputs=3, axis=1, num_outputs=3)
    seen = build.op("Attention", q, k, v, mask, name="attention", scale=float(head_size**-0.5))
    seen = build.linear(build.merge_heads(seen, text.width), f"{weights}/out_proj", name="out_proj", bias=True)
    x = build.op("Add", x, seen, name="residual")
    if text.post_norm:
        x = norm(x, "attention_norm")
    down = build.feed_forward(x if text.post_norm else norm(x, "ffw_norm"), weights, text.activation, bias=True)
    x = build.op("Add", x, down, name="ffw_residual")
    return norm(x, "ffw_norm") if text.post_norm else x


def _pooled_text(build: GraphBuilder, x: ir.Value, real: ir.Value, lengths: ir.Value, text: TextConfig) -> ir.Value:
    """[B, W] of a text's tokens [B, S, W]."""
    if text.pooling == "mean":
        kept = build.op("Unsqueeze", real, build.constant([2]), name="pooled/real")
        own = build.op("Where", kept, x, build.constant(0.0, dtype=np.float32), name="pooled/own")
        ends = build.op("Unsqueeze", lengths, build.constant([1]), name="pooled/lengths")
        count = build.op("Cast", ends, name="pooled/count", to=ir.DataType.FLOAT)
        # Divided before they are summed up, so that the sum of a long text is no larger than its tokens.
        shares = build.op(
            "Div", own, build.op("Unsqueeze", count, build.constant([2]), name="pooled/counts"), name="pooled/shares"
        )
        return build.op("ReduceSum", shares, build.constant([1]), name="pooled", keepdims=0)  # type: ignore[no-any-return]
    if text.pooling == "first":
        return build.op("Gather", x, build.constant(0), name="pooled", axis=1)  # type: ignore[no-any-return]
    last = build.op("Sub", lengths, build.constant(1), name="pooled/last")
    index = build.op("Unsqueeze", last, build.constant([1]), name="pooled/index")
    return build.op("GatherND", x, index, name="pooled", batch_dims=1)  # type: ignore[no-any-return]


def _embedding(build: GraphBuilder, x: ir.Value, tower: str) -> ir.Value:
    """x [N, W] in the joint space, of length 1: a root mean square of 1, over the root of the width. By a norm, since engines keep the
    statistics of norms in fp32."""
    projected = build.linear(x, f"{tower}/proj", name="proj")
    return build.op("RMSNormalization", projected, build.weight(f"{tower}/unit"), name="embedding", axis=-1, epsilon=1e-24)  # type: ignore[no-any-return]
