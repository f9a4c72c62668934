"""The `vision_encoder` graph: Llama 3.2 Vision's transformer over the tiles of an image.

pixels -- convolution of patches -- + the tile's own embedding -- a place for the class token in front -- + positions -- norm
-- tokens up to a multiple of 8 -- layers -- norm -- + the tile's own embedding -- global layers -- padding tokens off
-- [final state | inputs of chosen layers] side by side

Gates are folded into the embeddings and the global layers' output projections; the class token is stored in the position embedding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.functions import tile_attention
from flamingo_export.specs import subgraph_specs
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig, TiledViTConfig


def vision_encoder(config: ModelConfig, vision: TiledViTConfig, index: WeightIndex) -> ir.Model:
    """pixels [F, T, 3, I, I], aspect_ratio_ids [F] -> features [F, T, P, E]; those of padding tiles mean nothing."""
    spec = subgraph_specs(config)["vision_encoder"]
    build = GraphBuilder(index, prefix="vision_encoder")
    inputs = graph_inputs(spec)
    ids = inputs["aspect_ratio_ids"]
    x = _embedded(build, vision, inputs["pixels"], ids)
    padding = [0, 0, 0, 0, 0, 0, vision.padded_patches - vision.num_patches, 0]
    x = build.op("Pad", x, build.constant(padding), build.constant(0.0, dtype=np.float32), name="pad_tokens")
    num_tokens = vision.max_tiles * vision.padded_patches
    x = build.reshape(x, [0, num_tokens, vision.width], name="join_tiles")
    real = _real_tokens(build, vision, ids)
    kept: dict[int, ir.Value] = {}
    for layer in range(vision.num_layers):
        if layer in vision.feature_layers:
            kept[layer] = x
        with build.scope(f"layer.{layer}"):
            x = _layer(build, f"vision_encoder/layer.{layer}", x, real, vision)
    x = build.norm(x, "vision_encoder/post_norm", name="post_norm", eps=vision.norm_eps)
    tiles = [0, vision.max_tiles, vision.padded_patches, vision.width]
    x = build.reshape(x, tiles, name="post_tile/split")
    x = build.op("Add", x, _of_tile(build, vision, "post_tile", ids), name="add_post_tile")
    x = build.reshape(x, [0, num_tokens, vision.width], name="post_tile/join")
    for layer in range(vision.num_global_layers):
        with build.scope(f"global_layer.{layer}"):
            x = _layer(build, f"vision_encoder/global_layer.{layer}", x, real, vision)
    states = [x, *(kept[layer] for layer in vision.feature_layers)]
    features = build.op("Concat", *states, name="side_by_side", axis=-1)
    features = build.reshape(features, [*tiles[:3], vision.feature_width], name="split_tiles")
    ends = build.constant([0]), build.constant([vision.num_patches]), build.constant([2])
    features = build.op("Slice", features, *ends, name="without_padding")
    function = tile_attention.tile_attention(num_tokens=num_tokens, head_size=vision.head_size)
    return build.model(spec, inputs, {"features": features}, [function])


def _embedded(build: GraphBuilder, vision: TiledViTConfig, pixels: ir.Value, ids: ir.Value) -> ir.Value:
    """What enters the first layer, before padding: [F, T, P, W]."""
    side, patch = vision.image_size, [vision.patch_size, vision.patch_size]
    x = build.reshape(pixels, [-1, 3, side, side], name="tiles")
    x = build.op(
        "Conv", x, build.weight("vision_encoder/patch_embedding"), name="patch_embedding", kernel_shape=patch, strides=patch
    )
    x = build.reshape(x, [-1, vision.max_tiles, vision.width, vision.grid_size], name="flatten")
    x = build.op("Transpose", x, name="patches", perm=[0, 1, 3, 2])
    x = build.op("Add", x, _of_tile(build, vision, "pre_tile", ids), name="add_pre_tile")
    first = build.constant([0, 0, 1, 0, 0, 0, 0, 0])
    x = build.op("Pad", x, first, build.constant(0.0, dtype=np.float32), name="class_token")
    x = build.op("Add", x, build.weight("vision_encoder/position_embedding"), name="add_positions")
    own = "vision_encoder/tile_position_embedding"
    positions = build.op("Gather", build.stored(own), ids, name="tile_positions", axis=0)
    positions = build.widened(positions, own, name="tile_positions/fp32")
    shape = [0, vision.max_tiles, vision.num_patches, vision.width]
    x = build.op("Add", x, build.reshape(positions, shape, name="tile_positions/split"), name="add_tile_positions")
    return build.norm(x, "vision_encoder/pre_norm", name="pre_norm", eps=vision.norm_eps)


def _of_tile(build: GraphBuilder, vision: TiledViTConfig, place: str, ids: ir.Value) -> ir.Value:
    """A tile's own embedding [F, T, 1, W]."""
    own = build.op("Gather", build.weight(f"vision_encoder/{place}_embedding"), ids, name=place, axis=0)
    return build.reshape(own, [0, vision.max_tiles, 1, vision.width], name=f"{place}/split")


def _real_tokens(build: GraphBuilder, vision: TiledViTConfig, ids: ir.Value) -> ir.Value:
    """Which tokens are not padding: bool [F, L]."""
    with build.scope("real"):
        counts = build.constant([vision.num_tiles(i) for i in range(len(vision.aspect_ratios) + 1)])
        count = build.op("Unsqueeze", build.op("Gather", counts, ids, name="count", axis=0), build.constant([1]), name="counts")
        tile = build.op("Less", build.constant(list(range(vision.max_tiles))), count, name="tile")
        places = build.op("Range", build.constant(0), build.constant(vision.padded_patches), build.constant(1), name="places")
        token = build.op("Less", places, build.constant(vision.num_patches), name="token")
        both = build.op("And", build.op("Unsqueeze", tile, build.constant([2]), name="tile/tokens"), token, name="both")
        return build.reshape(both, [0, vision.max_tiles * vision.padded_patches], name="join")


def _layer(build: GraphBuilder, weights: str, x: ir.Value, real: ir.Value, vision: TiledViTConfig) -> ir.Value:
    heads, head_size = vision.num_heads, vision.head_size
    normed = build.norm(x, f"{weights}/attention_norm", name="attention_norm", eps=vision.norm_eps)
    qkv = build.heads(build.linear(normed, f"{weights}/qkv_proj", name="qkv_proj"), 3 * heads, head_size, name="qkv")
    q, k, v = build.op("Split", qkv, name="split_qkv", outputs=3, axis=1, num_outputs=3)
    seen = build.merge_heads(tile_attention.call(build, q, k, v, real), vision.width)
    x = build.op("Add", x, build.linear(seen, f"{weights}/out_proj", name="out_proj"), name="residual")
    normed = build.norm(x, f"{weights}/ffw_norm", name="ffw_norm", eps=vision.norm_eps)
    down = build.feed_forward(normed, weights, vision.activation, bias=True)
    return build.op("Add", x, down, name="ffw_residual")  # type: ignore[no-any-return]
