"""Attention among the tokens of an image's tiles as engines in 16 bits get it: one node, the numbers of the slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from flamingo_export.backends.tensorrt.lowering import tile_attention as lowered
from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.functions import tile_attention
from flamingo_export.specs import SubgraphSpec, TensorSpec

H, D = 2, 8


def graph(num_tokens: int) -> ir.Model:
    spec = SubgraphSpec(
        name="tiles",
        inputs=(
            *(TensorSpec(name, "float", ("F", H, num_tokens, D)) for name in "qkv"),
            TensorSpec("real", "bool", ("F", num_tokens)),
        ),
        outputs=(TensorSpec("y", "float", ("F", H, num_tokens, D)),),
    )
    build = GraphBuilder()
    inputs = graph_inputs(spec)
    y = tile_attention.call(build, *inputs.values())
    return build.model(spec, inputs, {"y": y}, [tile_attention.tile_attention(num_tokens=num_tokens, head_size=D)])


def run(model: ir.Model, feeds: dict[str, Any]) -> Any:
    data = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("num_tokens", [16, 2 * tile_attention.SLICE + 72])
def test_one_attention_has_the_numbers_of_the_slices(num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    q, k, v = rng.standard_normal((3, 2, H, num_tokens, D), dtype=np.float32)
    feeds = {"q": q, "k": k, "v": v, "real": rng.random((2, num_tokens)) < 0.7}
    model = graph(num_tokens)
    wanted = run(model, feeds)
    lowered.join_slices(model)
    (function,) = (each for each in model.functions.values() if each.name == "TileAttention")
    assert [node.op_type for node in function.graph].count("Attention") == 1
    np.testing.assert_allclose(run(model, feeds), wanted, atol=2e-6)
