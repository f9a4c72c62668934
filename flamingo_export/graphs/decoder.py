"""The `decoder` graph, whole or in parts: prefill, chunked prefill, decoding, beams and scoring are all this graph.

    token_ids -> embedding -> [gated cross-attention] -> LM layer -> ... -> norm -> tied head -> logits
                                     |                      |
                      media_k.i, media_v.i (bank)   past_k.j, past_v.j (cache, TensorScatter in place)

Relative positions are an additive attention mask. Their distances, positions - key_positions, are worked out once and shared by all
layers; each layer looks its scores up in a table of projected distances, read only as far as the cache in use. Every position must be
allowed at least one slot (a padded one: its own), as it is by the runtime.
"""

from __future__ import annotations

import onnx_ir as ir

from flamingo_export.graphs import relative_positions
from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.functions import phi_cross_attention
from flamingo_export.graphs.relative_positions import Shared
from flamingo_export.specs import decoder_spec, gated_in
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig


def decoder(config: ModelConfig, index: WeightIndex, *, layers: range | None = None, name: str = "decoder") -> ir.Model:
    """The decoder, or the part with these LM layers; inputs and outputs are those of `specs.decoder_spec`."""
    lm, block = config.language_model, config.cross_attention
    layers = range(lm.num_layers) if layers is None else layers
    spec = decoder_spec(config, layers, name=name)
    build = GraphBuilder(index, prefix="decoder")
    inputs = graph_inputs(spec)
    gated = {layer: i for i, layer in gated_in(config, layers)}
    function = phi_cross_attention.phi_cross_attention(num_latents=config.resampler.num_latents, head_size=block.head_size)
    shared = relative_positions.shared(build, inputs, lm)
    outputs: dict[str, ir.Value] = {}
    if layers.start == 0:
        hidden = build.op("Gather", build.stored("decoder/embedding"), inputs["token_ids"], name="embedding", axis=0)
        if build.stored("decoder/embedding").dtype != ir.DataType.FLOAT:
            hidden = build.op("Cast", hidden, name="embedding/fp32", to=ir.DataType.FLOAT)
    else:
        hidden = inputs["hidden"]
    for layer in layers:
        with build.scope(f"layer.{layer}"):
            if layer in gated:
                with build.scope("cross_attention"):
                    hidden = _gated_block(build, config, hidden, inputs, layer, gated[layer])
            hidden = _language_model_layer(build, config, hidden, inputs, outputs, layer, shared)
    if layers.stop == lm.num_layers:
        outputs["logits"] = _head(build, config, hidden, inputs["logit_positions"])
    else:
        outputs["hidden_out"] = build.op("Identity", hidden, name="hidden_out")
    return build.model(spec, inputs, outputs, [function] if gated else [])


def _gated_block(
    build: GraphBuilder, config: ModelConfig, hidden: ir.Value, inputs: dict[str, ir.Value], layer: int, i: int
) -> ir.Value:
    block, weights = config.cross_attention, f"decoder/layer.{layer}/cross_attention"
    q = build.linear(build.layer_norm(hidden, f"{weights}/norm", name="norm"), f"{weights}/q_proj", name="q_proj")
    q = build.reshape(q, [0, 0, block.num_heads, block.head_size], name="q")
    bank = (inputs[f"media_k.{i}"], inputs[f"media_v.{i}"])
    seen = phi_cross_attention.call(build, q, *bank, inputs["media_rows"], inputs["phi"])
    seen = build.reshape(seen, [0, 0, block.num_heads * block.head_size], name="merge_heads")
    hidden = build.op("Add", hidden, build.linear(seen, f"{weights}/out_proj", name="out_proj"), name="residual")
    up = build.linear(build.layer_norm(hidden, f"{weights}/ffw_norm", name="ffw_norm"), f"{weights}/ffw_up", name="ffw_up")
    down = build.linear(build.squared_relu(up), f"{weights}/ffw_down", name="ffw_down")
    return build.op("Add", hidden, down, name="ffw_residual")  # type: ignore[no-any-return]


def _language_model_layer(
    build: GraphBuilder,
    config: ModelConfig,
    hidden: ir.Value,
    inputs: dict[str, ir.Value],
    outputs: dict[str, ir.Value],
    layer: int,
    shared: Shared,
) -> ir.Value:
    lm, weights = config.language_model, f"decoder/layer.{layer}"
    inner = lm.num_heads * lm.head_size
    normed = build.rms_norm(hidden, f"{weights}/attention_norm", name="attention_norm", eps=lm.norm_eps)
    with build.scope("self_attention"):
        qkv = build.linear(normed, f"{weights}/self_attention/qkv_proj", name="qkv_proj")
        qkv = build.heads(qkv, 3 * lm.num_heads, lm.head_size, name="qkv")
        q, k, v = build.op("Split", qkv, name="split_qkv", outputs=3, axis=1, num_outputs=3)
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
        mask = relative_positions.additive_mask(build, f"{weights}/self_attention", q, shared)
        query = build.op("Add", q, build.weight(f"{weights}/self_attention/content_bias"), name="content_query")
        seen = build.op("Attention", query, present["k"], present["v"], mask, name="attention", scale=float(lm.head_size**-0.5))
        seen = build.linear(build.merge_heads(seen, inner), f"{weights}/self_attention/out_proj", name="out_proj")
    hidden = build.op("Add", hidden, seen, name="residual")
    up = build.linear(
        build.rms_norm(hidden, f"{weights}/ffw_norm", name="ffw_norm", eps=lm.norm_eps), f"{weights}/ffw_up", name="ffw_up"
    )
    down = build.linear(build.op("Gelu", up, name="gelu"), f"{weights}/ffw_down", name="ffw_down")
    return build.op("Add", hidden, down, name="ffw_residual")  # type: ignore[no-any-return]


def _head(build: GraphBuilder, config: ModelConfig, hidden: ir.Value, logit_positions: ir.Value) -> ir.Value:
    """Final norm and tied output of the wanted positions only: [B, K, V]."""
    wanted = build.op(
        "GatherND",
        hidden,
        build.op("Unsqueeze", logit_positions, build.constant([2]), name="logit_index"),
        name="wanted",
        batch_dims=1,
    )
    normed = build.rms_norm(wanted, "decoder/norm", name="norm", eps=config.language_model.norm_eps)
    head = build.op("Transpose", build.weight("decoder/embedding"), name="head/transpose", perm=[1, 0])
    return build.op("MatMul", normed, head, name="head")  # type: ignore[no-any-return]
