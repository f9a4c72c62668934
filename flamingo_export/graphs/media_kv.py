"""The `media_kv` graph: what each gated layer keeps of a medium. Run once a medium; every decoder step reads its results."""

from __future__ import annotations

import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.specs import MediaKind, subgraph_specs
from flamingo_export.weights import INPUT_SCALE, WeightIndex
from flamingo_reference.config import ModelConfig


def media_kv(config: ModelConfig, index: WeightIndex) -> ir.Model:
    """latents [N, R, W] -> media_k.i, media_v.i [N, G, R, D] for each gated layer i, in E4M3 where there are scales for them."""
    block, spec = config.cross_attention, subgraph_specs(config, media=media_kind(index))["media_kv"]
    build = GraphBuilder(index, prefix="media_kv")
    inputs = graph_inputs(spec)
    outputs = {}
    for i in range(len(config.gated_layers)):
        with build.scope(f"layer.{i}"):
            for kind in "kv":
                projected = build.linear(inputs["latents"], f"media_kv/layer.{i}/{kind}_proj", name=f"{kind}_proj")
                value = build.heads(projected, block.kv_heads, block.head_size, name=kind)
                if kind == "k" and block.qk_norm:
                    value = build.norm(value, f"media_kv/layer.{i}/k_norm", name="k_norm", eps=block.norm_eps, kind="rms_norm")
                if build.holds(scale := media_scale(i, kind)):
                    value = build.to_fp8(value, build.stored(scale), name=f"{kind}/quantise")
                outputs[f"media_{kind}.{i}"] = value
    return build.model(spec, inputs, outputs)


def media_scale(i: int, kind: str) -> str:
    """Name of the scale of media_k.i or media_v.i, which a bundle has where its bank holds E4M3 codes."""
    return f"media_kv/layer.{i}/{kind}{INPUT_SCALE}"


def media_kind(index: WeightIndex) -> MediaKind:
    """What the bank of a bundle with these weights holds."""
    return "fp8" if media_scale(0, "k") in index else "float"
