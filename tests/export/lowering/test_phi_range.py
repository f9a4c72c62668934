"""The body that PhiRangeCrossAttention has for TensorRT without a plugin, on ONNX Runtime against the plain loop over positions and keys."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from flamingo_export.backends.tensorrt.lowering.lower import lower
from flamingo_export.backends.tensorrt.lowering.phi_range import gather_rows
from flamingo_export.backends.tensorrt.lowering.shapes import Bounds, profiles
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.specs import SubgraphSpec, TensorSpec
from tests.export.graphs.conftest import open_graph
from tests.export.graphs.test_phi_range_function import CASES, feeds, plain, serialised

from .conftest import NONE


def swapped(*, calls: int = 1) -> ir.Model:
    model = ir.serde.deserialize_model(onnx.load_model_from_string(serialised(calls=calls)))
    gather_rows(model)
    return model


@pytest.fixture(scope="module")
def function():
    return open_graph(ir.serde.serialize_model(swapped()).SerializeToString())


@pytest.mark.parametrize("case", CASES)
def test_matches_a_plain_loop(function, case: str) -> None:
    call = feeds(*CASES[case])
    y, exact = function(call)["y"], plain(**call)
    assert np.abs(y - exact).max() <= 2e-6
    assert not y[call["phi"] == 0].any()


def test_it_has_what_tensorrt_compiles_and_nothing_whose_size_follows_from_numbers() -> None:
    """TensorRT fuses Attention, and takes sizes that are computed from shapes but not from values of tensors."""
    (function,) = swapped(calls=3).functions.values()
    kinds = {node.op_type for node in function}
    assert "Attention" in kinds
    assert not kinds & {"TopK", "NonZero", "CumSum", "ReduceMax"}
    names = [node.name for node in function]
    assert len(set(names)) == len(names)


def test_lowering_swaps_it_unless_a_plugin_computes_it() -> None:
    def kinds(native: frozenset[str]) -> list[set[str]]:
        model = ir.serde.deserialize_model(onnx.load_model_from_string(serialised()))
        lowered = lower(model, compute="fp16", capacity=8, native_functions=native)
        return [{node.op_type for node in function} for function in lowered.functions.values()]

    (without,) = kinds(NONE)
    assert "Attention" in without
    assert kinds(frozenset({"PhiRangeCrossAttention"})) == []


def test_engines_see_as_many_tiles_as_the_limits_say() -> None:
    """In a step the tiles of the last images; in a chunk of a prompt no fewer than one position may see."""
    spec = SubgraphSpec(
        name="decoder",
        inputs=(TensorSpec("media_rows", "int64", ("B", "M")), TensorSpec("phi", "int64", ("B", "S"))),
        outputs=(),
        aliases={"present_k.0": "past_k.0"},
    )
    ranges = msgspec.structs.replace(spec, inputs=(*spec.inputs, TensorSpec("first_media", "int64", ("B", "S"))))

    def media(spec: SubgraphSpec, limits: ShapeLimits) -> list[Bounds]:
        return [profile.bounds["M"] for profile in profiles(spec, limits)][:2]

    few = ShapeLimits(max_length=64, chunk=16, chunk_media=2, max_tiles=8, batch=1)
    assert media(spec, few) == [Bounds(1, 1, 2), Bounds(1, 1, 1)]
    assert media(ranges, few) == [Bounds(1, 4, 8), Bounds(1, 4, 8)]
    assert media(ranges, ShapeLimits(max_length=64, chunk=16, batch=1)) == [Bounds(1, 4, 16), Bounds(1, 4, 4)]
