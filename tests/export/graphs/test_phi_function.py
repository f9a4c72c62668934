"""The function PhiCrossAttention on ONNX Runtime against a plain fp64 loop over positions, heads and latents."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnxruntime import OrtValue

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.functions import phi_cross_attention
from flamingo_export.specs import MediaKind, SubgraphSpec, TensorSpec
from tests.export.graphs.conftest import Run, open_graph

H, R, D = 3, 5, 8


@pytest.fixture(scope="module")
def function() -> Run:
    return made("float")


def made(media: MediaKind) -> Run:
    scales = [TensorSpec(f"{kind}_scale", "float", ()) for kind in "kv"] if media == "fp8" else []
    spec = SubgraphSpec(
        name="phi",
        inputs=(
            TensorSpec("q", "float", ("B", "S", H, D)),
            TensorSpec("k", media, ("N", H, R, D)),
            TensorSpec("v", media, ("N", H, R, D)),
            TensorSpec("media_rows", "int64", ("B", "M")),
            TensorSpec("phi", "int64", ("B", "S")),
            *scales,
        ),
        outputs=(TensorSpec("y", "float", ("B", "S", H, D)),),
    )
    build = GraphBuilder()
    inputs = graph_inputs(spec)
    y = phi_cross_attention.call(build, *inputs.values())
    body = phi_cross_attention.phi_cross_attention(num_latents=R, head_size=D, fp8=media == "fp8")
    model = build.model(spec, inputs, {"y": y}, [body])
    return open_graph(ir.serde.serialize_model(model).SerializeToString())


def plain(q: Any, k: Any, v: Any, media_rows: Any, phi: Any) -> Any:
    y = np.zeros(q.shape)
    for b, s, h in np.ndindex(*q.shape[:3]):
        if phi[b, s] == 0:
            continue
        row = media_rows[b, phi[b, s] - 1]
        scores = [
            sum(float(a) * float(c) for a, c in zip(q[b, s, h], k[row, h, r], strict=True)) / math.sqrt(D) for r in range(R)
        ]
        shares = [math.exp(score - max(scores)) for score in scores]
        for r in range(R):
            y[b, s, h] += shares[r] / sum(shares) * v[row, h, r].astype(np.float64)
    return y


def feeds(media_rows: list[list[int]], phi: list[list[int]]) -> dict[str, Any]:
    random = np.random.default_rng(len(phi[0]))
    return {
        "q": 2 * random.standard_normal((len(phi), len(phi[0]), H, D), dtype=np.float32),
        "k": random.standard_normal((7, H, R, D), dtype=np.float32),
        "v": random.standard_normal((7, H, R, D), dtype=np.float32),
        "media_rows": np.array(media_rows),
        "phi": np.array(phi),
    }


CASES = {
    "text before the first image": ([[4]], [[0, 0, 1, 1]]),
    "no image": ([[0]], [[0, 0, 0]]),
    "adjacent images": ([[6, 2, 1]], [[1, 2, 3, 3]]),
    "image last": ([[3, 5]], [[0, 1, 1, 2]]),
    "one image shown twice (A, B, A)": ([[2, 6, 2]], [[1, 1, 2, 3, 3]]),
    "requests that share a row of the bank": ([[1, 4], [4, 0]], [[1, 2, 2], [0, 1, 2]]),
    "decoding": ([[5], [3]], [[1], [0]]),
    "beams of one request": ([[5]], [[1, 1, 1]]),
    "32 images": ([[index % 7 for index in range(32)]], [[0, *range(1, 33)]]),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_a_plain_loop(function: Run, case: str) -> None:
    call = feeds(*CASES[case])
    y, exact = function(call)["y"], plain(**call)
    assert np.abs(y - exact).max() <= 2e-6
    assert not y[call["phi"] == 0].any()


def test_no_medium_gives_exactly_zero_whatever_lies_in_the_bank(function: Run) -> None:
    call = feeds([[3]], [[0, 1]])
    call["k"][:] = 1e20
    call["v"][3] = np.inf
    y = function(call)["y"]
    assert np.array_equal(y[0, 0], np.zeros((H, D)))


def test_rows_that_are_not_the_requests_do_not_matter(function: Run) -> None:
    call = feeds([[2, 5]], [[0, 1, 2]])
    before = function(call)["y"]
    for bank in ("k", "v"):
        others = np.ones(7, bool)
        others[[2, 5]] = False
        call[bank][others] = np.nan
    assert np.array_equal(function(call)["y"], before)


def test_a_bank_of_codes_is_read_with_the_scale_of_each() -> None:
    """Keys and values have scales of their own; which codes they are is of no account, so they are drawn as bytes."""
    random = np.random.default_rng(3)
    call = feeds([[6, 2, 1]], [[0, 1, 2, 3, 3]])
    scales = {"k": np.float32(2.0**-9), "v": np.float32(2.0**-7)}
    # 0x7F and 0xFF are NaN.
    codes = {kind: random.integers(0, 255, call[kind].shape, dtype=np.uint8) & 0xFE for kind in "kv"}
    held = {kind: codes[kind].view(ml_dtypes.float8_e4m3fn) for kind in "kv"}
    exact = plain(**{**call, **{kind: held[kind].astype(np.float64) * scales[kind] for kind in "kv"}})
    values = {
        **{name: OrtValue.ortvalue_from_numpy(value) for name, value in call.items()},
        **{name: OrtValue.ortvalue_from_numpy_with_onnx_type(value, TensorProto.FLOAT8E4M3FN) for name, value in held.items()},
        **{f"{name}_scale": OrtValue.ortvalue_from_numpy(np.asarray(scale)) for name, scale in scales.items()},
    }
    y = made("fp8")(values)["y"]
    assert np.abs(y - exact).max() <= 2e-6 * np.abs(exact).max()
