"""Lowered graphs: their types throughout, nothing stored twice, and in fp16 their numbers, run by ONNX Runtime against the reference in fp64."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from flamingo_export.backends.tensorrt.lowering.lower import save_lowered
from flamingo_export.specs import SUBGRAPHS
from flamingo_reference.model.subgraphs import subgraphs_of

from .conftest import CAPACITY, PLUGIN

ELEMENTS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def nodes(model):
    return [node for graph in (model.graph, *model.functions.values()) for node in graph]


@pytest.mark.parametrize("compute", ELEMENTS)
@pytest.mark.parametrize("name", SUBGRAPHS)
def test_types_agree_at_every_node(lowered, bundles, name, compute):
    assert_types(lowered(name, compute), compute)


def assert_types(model, compute):
    """onnx's own type inference, strict, over the whole graph: every operator gets operands of one type."""
    proto = ir.serde.serialize_model(model)
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        for attribute in list(node.attribute):
            if attribute.name == "TRT_decomposable":
                node.attribute.remove(attribute)
    stored = {value.name for value in proto.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info if value.name not in stored}
    statistics = {
        name
        for node in proto.graph.node
        if node.op_type in ("LayerNormalization", "RMSNormalization")
        for name in (node.input[0], node.output[0])
    }
    for value, element in types.items():
        floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if element in floats and value not in statistics:
            assert element == ELEMENTS[compute], value


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_weights_are_neither_copied_nor_cast(lowered, bundles, name, tmp_path):
    portable = ir.load(bundles["fp16"] / f"{name}.onnx")
    model = lowered(name)
    places = [
        {
            (key, value.const_value.location, value.const_value.offset)
            for key, value in graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        for graph in (portable.graph, model.graph)
    ]
    assert places[0] == places[1]
    assert len(save_lowered(model, tmp_path / "x.onnx")) == (tmp_path / "x.onnx").stat().st_size < 300_000
    for node in model.graph:
        if node.op_type == "Cast":
            assert node.inputs[0].dtype != ir.DataType.FLOAT16, node.name


def test_normalisations_keep_their_statistics_in_fp32(lowered):
    for name in ("decoder", "resampler"):
        found = [node for node in lowered(name).graph if node.op_type in ("LayerNormalization", "RMSNormalization")]
        assert found
        for node in found:
            assert node.inputs[0].producer().attributes["to"].as_int() == ir.DataType.FLOAT
            assert all(scale.dtype == ir.DataType.FLOAT for scale in node.inputs[1:])
            (use,) = node.outputs[0].uses()
            assert (use.node.op_type, use.node.attributes["to"].as_int()) == ("Cast", ir.DataType.FLOAT16)


def test_the_plugin_takes_the_place_of_the_body(lowered):
    plugin, body = lowered("decoder", native=PLUGIN), lowered("decoder")
    calls = [node for node in plugin.graph if node.op_type == "PhiCrossAttention"]
    assert len(calls) == 2
    assert not plugin.functions
    assert {call.attributes["plugin_namespace"].as_string() for call in calls} == {"flamingo"}
    assert len(body.functions) == 1
    assert not any("plugin_namespace" in node.attributes for node in nodes(body))


def test_only_fp32_asks_for_decomposed_attention(lowered):
    for compute in ELEMENTS:
        marked = [
            "TRT_decomposable" in node.attributes for node in nodes(lowered("decoder", compute)) if node.op_type == "Attention"
        ]
        assert marked == [compute == "fp32"] * 4


def test_another_compute_type_than_the_stored_keeps_the_casts(lowered, lint):
    model = lowered("decoder", "fp16", storage="bf16")
    targets = {
        node.attributes["to"].as_int()
        for node in model.graph
        if node.op_type == "Cast" and node.inputs[0].dtype == ir.DataType.BFLOAT16
    }
    assert targets == {ir.DataType.FLOAT16}
    lint(model)


def feeds_of(name, config, rng):
    """Random inputs in fp32."""

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    vision, resampler, lm, block = config.vision, config.resampler, config.language_model, config.cross_attention
    if name == "vision_encoder" and config.tiled is not None:
        tiles = normal(2, config.tiled.max_tiles, 3, vision.image_size, vision.image_size)
        return {"pixels": tiles, "aspect_ratio_ids": np.array([8, 6])}  # all places are tiles
    if name == "vision_encoder":
        return {"pixels": normal(2, 3, vision.image_size, vision.image_size)}
    if name == "resampler":
        frames = 1 if resampler.kind == "projector" else 3
        features = {"features": normal(2, frames, vision.num_patches, vision.feature_width)}
        times = {"time_weights": np.eye(resampler.num_time_embeddings, dtype=np.float32)[:3]}
        return features | times if resampler.num_time_embeddings else features
    if name == "media_kv":
        return {"latents": normal(2, resampler.num_latents, resampler.width)}
    batch, length = 2, 5
    places = np.tile(np.arange(length), (batch, 1))
    slots = np.arange(CAPACITY)
    feeds = {
        "token_ids": rng.integers(4, lm.vocab_size, (batch, length)),
        "positions": places,
        "media_rows": np.array([[2, 0], [1, 1]]),
        "phi": np.array([[0, 1, 1, 2, 2], [0, 0, 1, 1, 2]]),
        "write_index": np.zeros(batch, np.int64),
        "mask": slots <= places[:, None, :, None],
        "logit_positions": places,
    }
    if config.sees_groups:
        feeds["first_media"] = np.array([[0, 1, 1, 1, 2], [0, 0, 1, 1, 1]])
    if lm.uses_distances:
        feeds["key_positions"] = np.tile(slots, (batch, 1))
    for i in range(len(config.gated_layers)):
        for kind in "kv":
            feeds[f"media_{kind}.{i}"] = normal(3, block.kv_heads, resampler.num_latents, block.head_size)
    cache = np.zeros((batch, lm.kv_heads, CAPACITY, lm.head_size), np.float32)
    return feeds | {f"past_{kind}.{j}": cache for j in range(lm.num_layers) for kind in "kv"}


def reference(model, name, feeds, dtype):
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in feeds.items()}
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    with torch.no_grad():
        found = subgraphs_of(copy.deepcopy(model).to(dtype))[name](tensors)
    return {key: value.double().numpy() for key, value in found.items()}


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_numbers_in_fp16_against_fp64(lowered, bundles, tiny_config, tiny_model, name, tmp_path):
    """At most twice the error of PyTorch computing in fp16, or 4 units in the last place of fp16."""
    path = bundles["fp16"] / f"{name}.lowered.onnx"
    save_lowered(lowered(name), path)
    assert_numbers(path, tiny_config, tiny_model, name)


def assert_numbers(path, config, model, name):
    """A lowered graph in fp16 against the reference in fp64: twice the error of PyTorch in fp16, or 4 of its units in the last place."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = feeds_of(name, config, np.random.default_rng(3))
    narrow = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in feeds.items()}
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(outputs, narrow), strict=True))
    exact = reference(model, name, feeds, torch.float64)
    eager = reference(model, name, feeds, torch.float16)
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        assert found[key].dtype == np.float16
        scale = float(np.abs(value).max()) or 1.0
        error = float(np.abs(found[key].astype(np.float64) - value).max()) / scale
        own = float(np.abs(eager[key] - value).max()) / scale
        assert error <= max(2 * own, 4 * 2.0**-11), (key, error, own)
