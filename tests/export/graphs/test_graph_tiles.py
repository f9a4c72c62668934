"""The vision transformer over tiles: attention in slices against numpy, the graph against the reference for every arrangement of tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from variations import LLAMA, drawn_model

from flamingo_export.graphs import build_graph
from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.functions import tile_attention
from flamingo_export.precision import Precision
from flamingo_export.sources import LiveSource
from flamingo_export.specs import SubgraphSpec, TensorSpec
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import SIZES
from flamingo_reference.model.subgraphs import subgraphs_of
from tests.export.graphs.conftest import Calls, Run, assert_as_exact, open_graph, reference

H, D = 2, 8


def sliced(num_tokens: int) -> Run:
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
    model = build.model(spec, inputs, {"y": y}, [tile_attention.tile_attention(num_tokens=num_tokens, head_size=D)])
    return open_graph(ir.serde.serialize_model(model).SerializeToString())


@pytest.mark.parametrize("num_tokens", [16, tile_attention.SLICE, tile_attention.SLICE + 8, 2 * tile_attention.SLICE + 72])
def test_slices_are_the_whole(num_tokens: int) -> None:
    """One slice, a full one, and several of which the last is shorter; queries and keys of padding in every slice."""
    rng = np.random.default_rng(num_tokens)
    q, k, v = rng.standard_normal((3, 2, H, num_tokens, D), dtype=np.float32)
    real = rng.random((2, num_tokens)) < 0.7
    found = sliced(num_tokens)({"q": q, "k": k, "v": v, "real": real})["y"]
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(D)
    seen = (real[:, :, None] | real[:, None, :])[:, None]  # only padding to padding is masked
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True)) * seen
    wanted = (shares / shares.sum(axis=-1, keepdims=True)) @ v
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_an_image_of_the_published_size_goes_in_slices() -> None:
    """6432 tokens in 13 slices of queries: the scores of a slice take 204 MB in fp32, all of them 2.6 GB."""
    config = SIZES["llama-3.2-11b-vision"]
    graph = build_graph(config, "vision_encoder", WeightIndex.planned(config, Precision(storage="bf16")))
    (function,) = graph.functions.values()
    attentions = [node for node in function if node.op_type == "Attention"]
    assert len(attentions) == 13
    assert sum(node.op_type == tile_attention.NAME for node in graph.graph) == 40
    assert 16 * -(-6432 // 13) * 6432 * 4 < 205e6


@pytest.fixture(scope="module")
def encoder(bundle_writer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Run]:
    model = drawn_model(LLAMA)
    bundle = bundle_writer(LiveSource(model), tmp_path_factory.mktemp("tiles") / "b")
    return model, open_graph(bundle / "vision_encoder.onnx")


@pytest.mark.parametrize("aspects", [[1], [2], [3], [4], [5], [6], [7], [8], [0], [6, 1, 7]], ids=str)
def test_every_arrangement(encoder: tuple[Any, Run], aspects: list[int]) -> None:
    model, run = encoder
    vision = model.config.tiled
    tiles = Calls(model.config).normal(len(aspects), vision.max_tiles, 3, vision.image_size, vision.image_size)
    for image, aspect in zip(tiles, aspects, strict=True):
        image[vision.num_tiles(aspect) :] = 0
    feeds = {"pixels": tiles, "aspect_ratio_ids": np.array(aspects)}
    eager = reference(subgraphs_of(model)["vision_encoder"], feeds, torch.float32)["features"]
    exact_model = drawn_model(LLAMA, dtype=torch.float64)
    exact = reference(subgraphs_of(exact_model)["vision_encoder"], feeds, torch.float64)["features"]
    found = run(feeds)["features"]
    for image, aspect in enumerate(aspects):
        real = slice(0, vision.num_tiles(aspect))
        if aspect:
            assert_as_exact("vision_encoder", exact[image, real], eager[image, real], found[image, real])
    assert np.isfinite(found).all() or 0 in aspects
