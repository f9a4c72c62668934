"""The `resampler` graph: Perceiver Resampler, or a projector in its place.

features [N,T,P,E] -- [input_proj] -- [+ time embeddings] -- join frames --> media [N,T*P,W]
latents [R,W] expanded; each layer: attention(latents, concat(media, latents)), then feed-forward, both residual; final norm
"""

from __future__ import annotations

import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.specs import subgraph_specs
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig


def resampler(config: ModelConfig, index: WeightIndex) -> ir.Model:
    """features [N, T, P, E], time_weights [T, 8] (where frames have time embeddings) -> latents [N, R, W]."""
    spec = subgraph_specs(config)["resampler"]
    build = GraphBuilder(index, prefix="resampler")
    inputs = graph_inputs(spec)
    if config.resampler.kind == "projector":
        features = build.op("Squeeze", inputs["features"], build.constant([1]), name="one_frame")
        latents = build.linear(features, "resampler/input_proj", name="input_proj", bias=True)
        return build.model(spec, inputs, {"latents": latents})
    latents = perceiver(build, config, "resampler", inputs["features"], inputs.get("time_weights"))
    return build.model(spec, inputs, {"latents": latents})


def perceiver(
    build: GraphBuilder, config: ModelConfig, weights: str, features: ir.Value, time_weights: ir.Value | None = None
) -> ir.Value:
    """Latents [N, R, W] of features [N, T, P, E] by the config's resampler, whose weights lie below `weights`."""
    sizes, media = config.resampler, features
    if sizes.input_proj:
        media = build.linear(media, f"{weights}/input_proj", name="input_proj")
    if sizes.num_time_embeddings:
        times = build.op("MatMul", time_weights, build.weight(f"{weights}/time_embeddings"), name="time_embeddings")
        times = build.op("Unsqueeze", times, build.constant([1]), name="time_embeddings/patches")
        media = build.op("Add", media, times, name="add_time")
    media = build.reshape(media, [0, -1, sizes.width], name="join_frames")
    count = build.op("Shape", features, name="count", start=0, end=1)
    shape = build.op("Concat", count, build.constant([sizes.num_latents, sizes.width]), name="latents/shape", axis=0)
    latents = build.op("Expand", build.weight(f"{weights}/latents"), shape, name="latents/expand")
    for layer in range(sizes.num_layers):
        with build.scope(f"layer.{layer}"):
            latents = _layer(build, f"{weights}/layer.{layer}", latents, media, config)
    return build.norm(latents, f"{weights}/norm", name="norm")


def _layer(build: GraphBuilder, weights: str, latents: ir.Value, media: ir.Value, config: ModelConfig) -> ir.Value:
    heads, head_size = config.resampler.num_heads, config.resampler.head_size
    normed = build.norm(latents, f"{weights}/latent_norm", name="latent_norm")
    keys = build.op("Concat", build.norm(media, f"{weights}/media_norm", name="media_norm"), normed, name="keys", axis=1)
    q = build.heads(build.linear(normed, f"{weights}/q_proj", name="q_proj"), heads, head_size, name="q")
    k, v = build.op(
        "Split", build.linear(keys, f"{weights}/kv_proj", name="kv_proj"), name="kv", outputs=2, axis=-1, num_outputs=2
    )
    k, v = build.heads(k, heads, head_size, name="k"), build.heads(v, heads, head_size, name="v")
    if config.resampler.qk_norm:
        q, k = (build.norm(x, f"{weights}/{name}_norm", name=f"{name}_norm") for name, x in (("q", q), ("k", k)))
    seen = build.op("Attention", q, k, v, name="attention", scale=float(head_size**-0.5))
    seen = build.linear(build.merge_heads(seen, heads * head_size), f"{weights}/out_proj", name="out_proj")
    latents = build.op("Add", latents, seen, name="residual")
    normed = build.norm(latents, f"{weights}/ffw_norm", name="ffw_norm")
    hidden = build.feed_forward(normed, weights, config.resampler.activation)
    return build.op("Add", latents, hidden, name="ffw_residual")  # type: ignore[no-any-return]
