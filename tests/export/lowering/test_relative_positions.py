"""Relative positions, lowered: the numbers of the portable graph, and nothing that a compiler would copy or keep for every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import flamingo_export
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.sources.choice import source_for_size

from .conftest import NONE
from .test_lowered_graphs import feeds_of

CAPACITY = 200
"""Two blocks of nano's four."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lowered") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=out, parity="skip")
    return out


def lowered(bundle: Path) -> ir.Model:
    return lower(ir.load(bundle / "decoder.onnx"), compute="fp32", capacity=CAPACITY, native_functions=NONE)


def test_the_numbers_of_the_portable_graph_over_a_part_of_the_table(bundle: Path) -> None:
    """Rows of the batch stand at places far from each other, some beyond the first block; both graphs run in ONNX Runtime."""
    config = read_manifest(bundle).config
    rng = np.random.default_rng(0)
    feeds = feeds_of("decoder", config, rng)
    starts = np.array([3, 190])
    places = starts[:, None] + np.arange(5)
    slots = np.arange(CAPACITY)
    feeds |= {
        "positions": places,
        "write_index": starts,
        "logit_positions": np.tile(np.arange(5), (2, 1)),
        "mask": slots <= places[:, None, :, None],
        "key_positions": np.tile(slots, (2, 1)),
    }
    for name in feeds:
        if name.startswith("past_"):
            feeds[name] = rng.standard_normal((2, *feeds[name].shape[1:2], CAPACITY, feeds[name].shape[3]), dtype=np.float32)
    model = lowered(bundle)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph:
            node.attributes.pop("TRT_decomposable", None)
    save_lowered(model, bundle / "decoder.lowered.onnx")
    results = [
        onnxruntime.InferenceSession(bundle / file, providers=["CPUExecutionProvider"]).run(["logits"], feeds)[0]
        for file in ("decoder.onnx", "decoder.lowered.onnx")
    ]
    assert np.abs(results[0]).max() > 1
    np.testing.assert_allclose(results[1], results[0], atol=2e-5)


def test_the_table_is_a_constant_that_all_rows_share(bundle: Path) -> None:
    found: Any = list(lowered(bundle).graph)
    lookups = [node for node in found if node.op_type == "GatherElements"]
    assert len(lookups) == 6
    for layer, lookup in enumerate(lookups):
        scores, distances = (value.producer() for value in lookup.inputs)
        assert (scores.op_type, scores.name) == ("Transpose", f"decoder/layer.{layer}/self_attention/position_bias/scores")
        product = scores.inputs[0].producer().inputs[0].producer()
        table = product.inputs[1].producer().inputs[0].producer()
        assert (product.op_type, table.op_type) == ("MatMul", "Slice")
        assert table.inputs[0].is_initializer()
        bounds = [value.producer().attributes["value_ints"].as_ints() for value in table.inputs[1:]]
        assert [list(bound) for bound in bounds] == [[0], [2], [2]]
        assert distances.op_type == "Expand"
        assert len(distances.outputs[0].uses()) == 1  # its own, widened where it is looked up
    assert not any(node.op_type == "Range" for node in found)


def test_graphs_without_relative_positions_stay_as_they_are(bundle: Path) -> None:
    before, after = (ir.load(bundle / "media_kv.onnx") for _ in range(2))
    lower(after, compute="fp32", capacity=CAPACITY, native_functions=NONE)
    assert [node.name for node in after.graph] == [node.name for node in before.graph]
