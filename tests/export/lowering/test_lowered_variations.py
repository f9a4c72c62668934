"""Every kind of model, lowered: linted, typed throughout, and in fp16 with the reference's numbers."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from variations import VARIATIONS, drawn_model

from flamingo_export.backends.tensorrt.lowering.lint import check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.precision import Precision, StorageType
from flamingo_export.sources import LiveSource
from flamingo_export.specs import SUBGRAPHS, subgraph_specs

from .conftest import CAPACITY, NONE, PLUGIN
from .test_lowered_graphs import assert_numbers, assert_types


@pytest.fixture(scope="module", params=VARIATIONS)
def drawn(request, bundle_writer, tmp_path_factory):
    """A model, and its bundle in each storage type."""
    model, folder = drawn_model(VARIATIONS[request.param]), tmp_path_factory.mktemp("varied")
    return model, {
        kind: bundle_writer(LiveSource(model), folder / f"{kind}.bundle", precision=Precision(storage=kind))
        for kind in ("fp16", "bf16", "fp32")
    }


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_lint_and_types(drawn, name):
    model, bundles = drawn
    spec = subgraph_specs(model.config)[name]
    wanted: tuple[tuple[StorageType, frozenset[str]], ...] = (("fp16", NONE), ("fp16", PLUGIN), ("bf16", NONE), ("fp32", NONE))
    for compute, native in wanted:
        graph = ir.load(bundles[compute] / f"{name}.onnx")
        lowered = lower(graph, compute=compute, capacity=CAPACITY, native_functions=native)
        expected = check_graph(lowered, spec, compute=compute, capacity=CAPACITY, native_functions=native)
        assert expected.cache_updates == len(spec.aliases)
        if not native:
            assert_types(lowered, compute)


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_numbers_in_fp16(drawn, name):
    model, bundles = drawn
    path = bundles["fp16"] / f"{name}.lowered.onnx"
    graph = ir.load(bundles["fp16"] / f"{name}.onnx")
    save_lowered(lower(graph, compute="fp16", capacity=CAPACITY, native_functions=NONE), path)
    assert_numbers(path, model.config, model, name)
