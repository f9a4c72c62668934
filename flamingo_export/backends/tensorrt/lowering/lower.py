"""From a portable graph to the one that TensorRT's parser is given.

    portable, fp32, C by name                        lowered
    weights (bf16) -> Cast -> MatMul                 weights (bf16) -> MatMul              the Cast goes: no second copy of a weight
    x -> LayerNormalization -> y                     x -> Cast fp32 -> LayerNormalization -> Cast bf16 -> y
    past_k [B,H,C,D] -> TensorScatter                past_k [B,H,4096,D] -> TensorScatter  KV_CACHE_UPDATE, in place
    flamingo::PhiCrossAttention + its body           with the plugin: only the call, so that a missing plugin is an error
                                                     without: only the body, nothing left that names a plugin
    flamingo::PhiRangeCrossAttention                 the same; without, a body that TensorRT compiles, phi_range.py
    flamingo::TileAttention                          in 16 bits one attention in place of slices, tile_attention.py
    relative positions                               with no copies, relative_positions.py
    Attention in fp32                                with TRT_decomposable=1, without which TensorRT has no fp32 implementation

The lowered file lies beside the portable one at the bundle's root and points into the same weights.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from flamingo_export.backends.tensorrt.lowering import phi_range, tile_attention
from flamingo_export.backends.tensorrt.lowering.relative_positions import simplify
from flamingo_export.backends.tensorrt.lowering.retype import retype
from flamingo_export.backends.tensorrt.lowering.shapes import CAPACITY
from flamingo_export.files import write_atomically
from flamingo_export.precision import StorageType
from flamingo_export.specs import FUNCTION_DOMAIN

PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version")
KV_SCALES = "kv_scales"
"""A field of the plugin, where the bank is FP8."""


def lower(model: ir.Model, *, compute: StorageType, capacity: int, native_functions: frozenset[str]) -> ir.Model:
    """Lowers a portable model in place and returns it.

    compute: the type its floats become. capacity: the cache's C. native_functions: functions `flamingo::...` that the backend has a
    plugin for; the others keep their bodies.
    """
    simplify(model.graph, capacity)
    if phi_range.NAME not in native_functions:
        phi_range.gather_rows(model)
    if compute != "fp32":
        tile_attention.join_slices(model)
    retype(model, compute)
    _fix_capacity(model.graph, capacity)
    _settle_functions(model, native_functions)
    if compute == "fp32":
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            for node in graph:
                if node.op_type == "Attention":
                    node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
    return model


def save_lowered(model: ir.Model, path: Path) -> bytes:
    """Writes a lowered graph so that readers see all of it or nothing, and returns what was written. Its weights stay where they are."""
    data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    write_atomically(path, data)
    return data


def _fix_capacity(graph: ir.Graph, capacity: int) -> None:
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        dims = [getattr(dim, "value", dim) for dim in value.shape]
        value.shape = ir.Shape([capacity if dim == CAPACITY else dim for dim in dims])


def _settle_functions(model: ir.Model, native: frozenset[str]) -> None:
    for identifier, function in list(model.functions.items()):
        if function.domain == FUNCTION_DOMAIN and function.name in native:
            del model.functions[identifier]
            continue
        for name in (*PLUGIN_ATTRIBUTES, KV_SCALES):
            function.attributes.pop(name, None)
        for node in model.graph:
            if node.op_identifier() == identifier:
                for name in (*PLUGIN_ATTRIBUTES, KV_SCALES):
                    node.attributes.pop(name, None)
