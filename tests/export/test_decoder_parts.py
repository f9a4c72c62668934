"""Where a decoder is cut, against all the ways there are; and that the bytes of a part are those of the weights that its graph reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from variations import VARIATIONS

from flamingo_export.bundle.manifest import GraphRecord, Manifest, ShapeLimits, SourceRecord, read_manifest
from flamingo_export.errors import BuildError, BundleError
from flamingo_export.graphs import build_graph
from flamingo_export.precision import Precision
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.decoder_cuts import check_parts, cut, fewest_parts, graph_bytes, graph_records
from flamingo_reference.config import SIZES, ModelConfig

NANO = SIZES["nano"]
CONFIGS = {**VARIATIONS, "nano": NANO}


def sized(config: ModelConfig, seed: int) -> dict[str, int]:
    """Weights of random sizes; names as a bundle's are, with what belongs to a weight behind another slash."""
    rng = np.random.default_rng(seed)
    sizes = {
        f"decoder/layer.{layer}/ffw_up/weight": int(rng.integers(1, 50)) for layer in range(config.language_model.num_layers)
    }
    sizes |= {f"decoder/layer.{layer}/cross_attention/q_proj/scale": int(rng.integers(1, 50)) for layer in config.gated_layers}
    others = ("embedding", "embedding/scale", "norm/weight", "rotary_cos", "head", "head/scale")
    return sizes | {f"decoder/{name}": int(rng.integers(1, 80)) for name in others} | {"resampler/latents": 10_000}


def of_layers(config: ModelConfig, sizes: dict[str, int], layers: range) -> int:
    return graph_bytes(config, sizes, GraphRecord(name="p", file="", layers=(layers.start, layers.stop)))


def every_cut(count: int, parts: int) -> Iterator[tuple[range, ...]]:
    for inner in itertools.combinations(range(1, count), parts - 1):
        yield tuple(range(start, stop) for start, stop in itertools.pairwise((0, *inner, count)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_cut_has_a_smaller_largest_part(tied: bool, seed: int) -> None:
    lm = msgspec.structs.replace(NANO.language_model, num_layers=8, tied_head=tied)
    config = msgspec.structs.replace(NANO, language_model=lm)
    sizes = sized(config, seed)
    for parts in range(1, 9):
        found = cut(config, sizes, parts)
        assert len(found) == parts
        assert [layer for layers in found for layer in layers] == list(range(8))
        best = min(max(of_layers(config, sizes, layers) for layers in other) for other in every_cut(8, parts))
        assert max(of_layers(config, sizes, layers) for layers in found) == best
        fewest = fewest_parts(config, sizes, best)
        assert fewest is not None
        assert fewest <= parts
        if parts > 1:
            assert fewest_parts(config, sizes, best - 1) in (None, *range(parts + 1, 9))
    one = max(of_layers(config, sizes, range(layer, layer + 1)) for layer in range(8))
    assert fewest_parts(config, sizes, one - 1) is None
    assert fewest_parts(config, sizes, sum(sizes.values())) == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_part_has_the_bytes_of_the_weights_its_graph_reads(config: ModelConfig) -> None:
    index = WeightIndex.planned(config, Precision(storage="bf16"))
    sizes = index.sizes()
    for parts in (1, 2, config.language_model.num_layers):
        for record in graph_records(config, sizes, parts):
            layers = range(*record.layers) if record.layers else None
            graph = build_graph(config, record.name, index, layers=layers).graph
            read = [value.const_value for value in graph.initializers.values() if value.name in sizes]
            assert sum(tensor.nbytes for tensor in read if tensor is not None) == graph_bytes(config, sizes, record), (
                record.name
            )


def test_sizes_of_the_paper_are_cut_evenly() -> None:
    for name, parts in (("3b", 4), ("9b", 2), ("9b", 4), ("80b", 8)):
        config = SIZES[name]
        sizes = WeightIndex.planned(config, Precision(storage="bf16")).sizes()
        bytes_ = [of_layers(config, sizes, layers) for layers in cut(config, sizes, parts)]
        assert max(bytes_) < 1.15 * sum(bytes_) / parts, (name, parts, bytes_)


def test_names_of_the_graphs() -> None:
    sizes = sized(NANO, 0)
    assert [record.name for record in graph_records(NANO, sizes, 1)] == ["vision_encoder", "resampler", "media_kv", "decoder"]
    three = graph_records(NANO, sizes, 3)
    assert [(record.name, record.file) for record in three[3:]] == [(f"decoder.{k}", f"decoder.{k}.onnx") for k in range(3)]
    assert [record.layers for record in three[:3]] == [None] * 3


@pytest.mark.parametrize("parts", [-1, 0, 7])
def test_so_many_parts_there_cannot_be(parts: int) -> None:
    message = rf"cannot be cut into {parts} parts: .* nano has 6 of them\. Choose --parts from 1 to 6\."
    with pytest.raises(BuildError, match=message):
        check_parts(NANO, parts)
    with pytest.raises(BuildError, match=message):
        cut(NANO, {}, parts)


@pytest.mark.parametrize("layers", [[(0, 2)], [(0, 2), (3, 6)], [(0, 4), (3, 6)], [(1, 6)]])
def test_a_manifest_whose_parts_are_not_the_decoder_is_refused(layers: list[tuple[int, int]]) -> None:
    graphs = tuple(GraphRecord(name=f"decoder.{k}", file="x.onnx", layers=each) for k, each in enumerate(layers))
    manifest = Manifest(
        config=NANO,
        precision=Precision(storage="fp32"),
        limits=ShapeLimits(max_length=64),
        source=SourceRecord(kind="random", seed=0),
        graphs=graphs,
        files=(),
    )
    with pytest.raises(BundleError, match=r"cover LM layers .* expected 0 to 5"):
        manifest.decoder_graphs()


def test_parts_are_in_order_whatever_the_manifest_lists_first(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    graphs = (GraphRecord(name="b", file="", layers=(1, 3)), GraphRecord(name="a", file="", layers=(0, 1)))
    found = msgspec.structs.replace(manifest, graphs=graphs).decoder_graphs()
    assert [(graph.name, layers) for graph, layers in found] == [("a", range(1)), ("b", range(1, 3))]
    assert [layers for _, layers in manifest.decoder_graphs()] == [range(3)]
