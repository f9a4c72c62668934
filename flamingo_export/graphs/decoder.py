"""The `decoder` graph, whole or in parts: prefill, chunked prefill, decoding, beams and scoring are all this graph.

    token_ids -> embedding -> [gated cross-attention] -> LM layer -> ... -> norm -> head -> logits
                                     |                      |
                      media_k.i, media_v.i (bank)   past_k.j, past_v.j (cache, TensorScatter in place)

Relative positions and ALiBi are an additive attention mask. Their distances, positions - key_positions, are worked out once and shared by
all layers; with relative positions each layer looks its scores up in a table of projected distances, which may be given cut to the cache in use.
Every position must be allowed at least one slot (a padded one: its own), as it is by the runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.functions import phi_cross_attention, phi_range_cross_attention
from flamingo_export.graphs.media_kv import media_kind, media_scale
from flamingo_export.graphs.self_attention import Shared, self_attention, shared
from flamingo_export.specs import decoder_spec, gated_in
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig


def decoder(config: ModelConfig, index: WeightIndex, *, layers: range | None = None, name: str = "decoder") -> ir.Model:
    """The decoder, or the part with these LM layers; inputs and outputs are those of `specs.decoder_spec`."""
    lm = config.language_model
    layers = range(lm.num_layers) if layers is None else layers
    spec = decoder_spec(config, layers, name=name, media=media_kind(index))
    build = GraphBuilder(index, prefix="decoder")
    inputs = graph_inputs(spec)
    gated = {layer: i for i, layer in gated_in(config, layers)}
    function = _media_function(config, fp8=media_kind(index) == "fp8")
    common = shared(build, inputs, lm)
    outputs: dict[str, ir.Value] = {}
    if layers.start == 0:
        hidden = build.op("Gather", build.stored("decoder/embedding"), inputs["token_ids"], name="embedding", axis=0)
        hidden = build.widened(hidden, "decoder/embedding", name="embedding/fp32")
    else:
        hidden = inputs["hidden"]
    for layer in layers:
        with build.scope(f"layer.{layer}"):
            if layer in gated:
                with build.scope("cross_attention"):
                    hidden = _gated_block(build, config, hidden, inputs, layer, gated[layer])
            hidden = _language_model_layer(build, config, hidden, inputs, outputs, layer, common)
    if layers.stop == lm.num_layers:
        outputs["logits"] = _head(build, config, hidden, inputs["logit_positions"])
    else:
        outputs["hidden_out"] = build.op("Identity", hidden, name="hidden_out")
    return build.model(spec, inputs, outputs, [function] if gated else [])


def _media_function(config: ModelConfig, *, fp8: bool) -> ir.Function:
    """What a token sees of its media."""
    block = config.cross_attention
    if config.sees_groups:
        return phi_range_cross_attention.phi_range_cross_attention(
            num_heads=block.num_heads, num_kv_heads=block.kv_heads, head_size=block.head_size, fp8=fp8
        )
    return phi_cross_attention.phi_cross_attention(num_latents=config.resampler.num_latents, head_size=block.head_size, fp8=fp8)


def _gated_block(
    build: GraphBuilder, config: ModelConfig, hidden: ir.Value, inputs: dict[str, ir.Value], layer: int, i: int
) -> ir.Value:
    block, weights = config.cross_attention, f"decoder/layer.{layer}/cross_attention"

    def norm(x: ir.Value, name: str) -> ir.Value:
        return build.norm(x, f"{weights}/{name}", name=name, eps=block.norm_eps, kind=block.norm)

    q = build.linear(norm(hidden, "norm"), f"{weights}/q_proj", name="q_proj")
    q = build.reshape(q, [0, 0, block.num_heads, block.head_size], name="q")
    if block.qk_norm:
        q = build.norm(q, f"{weights}/q_norm", name="q_norm", eps=block.norm_eps, kind="rms_norm")
    bank = (inputs[f"media_k.{i}"], inputs[f"media_v.{i}"])
    scales = [build.stored(media_scale(i, kind)) for kind in "kv" if build.holds(media_scale(i, kind))]
    if config.sees_groups:
        bounds = inputs["first_media"], inputs["phi"]
        seen = phi_range_cross_attention.call(build, q, *bank, inputs["media_rows"], *bounds, *scales)
    else:
        seen = phi_cross_attention.call(build, q, *bank, inputs["media_rows"], inputs["phi"], *scales)
    seen = build.reshape(seen, [0, 0, block.num_heads * block.head_size], name="merge_heads")
    hidden = build.op("Add", hidden, build.linear(seen, f"{weights}/out_proj", name="out_proj"), name="residual")
    down = build.feed_forward(norm(hidden, "ffw_norm"), weights, block.feed_forward)
    if block.without_media == "nothing":
        some = build.op("Greater", inputs["phi"], build.constant(0), name="some_medium")
        some = build.op("Unsqueeze", some, build.constant([2]), name="some_medium/channels")
        down = build.op("Where", some, down, build.constant(0.0, dtype=np.float32), name="ffw_where_seen")
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

    def norm(x: ir.Value, name: str) -> ir.Value:
        return build.norm(x, f"{weights}/{name}", name=name, eps=lm.norm_eps, kind=lm.norm, bias=lm.norm_bias)

    normed = norm(hidden, "attention_norm")
    with build.scope("self_attention"):
        seen = self_attention(build, lm, normed, inputs, outputs, layer, shared)
    summed = build.op("Add", hidden, seen, name="residual")
    normed = norm(hidden if lm.parallel else summed, "ffw_norm")
    down = build.feed_forward(normed, weights, lm.feed_forward, bias=lm.bias)
    return build.op("Add", summed, down, name="ffw_residual")  # type: ignore[no-any-return]


def _head(build: GraphBuilder, config: ModelConfig, hidden: ir.Value, logit_positions: ir.Value) -> ir.Value:
    """Final norm and output of the wanted positions only: [B, K, V]."""
    wanted = build.op(
        "GatherND",
        hidden,
        build.op("Unsqueeze", logit_positions, build.constant([2]), name="logit_index"),
        name="wanted",
        batch_dims=1,
    )
    lm = config.language_model
    normed = build.norm(wanted, "decoder/norm", name="norm", eps=lm.norm_eps, kind=lm.norm, bias=lm.norm_bias)
    if not lm.tied_head or build.holds("decoder/head"):
        return build.linear(normed, "decoder/head", name="head")
    head = build.op("Transpose", build.weight("decoder/embedding"), name="head/transpose", perm=[1, 0])
    return build.op("MatMul", normed, head, name="head")  # type: ignore[no-any-return]
