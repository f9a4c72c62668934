"""The function PhiRangeCrossAttention on ONNX Runtime against a plain fp64 loop over positions, heads and keys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto
from onnxruntime import OrtValue

from flamingo_export.graphs.builder import GraphBuilder, graph_inputs
from flamingo_export.graphs.functions import phi_range_cross_attention
from flamingo_export.specs import MediaKind, SubgraphSpec, TensorSpec
from tests.export.graphs.conftest import Run, open_graph

H, HK, R, D, N = 6, 2, 5, 8, 7


def made(media: MediaKind = "float", kv_heads: int = HK) -> Run:
    return open_graph(serialised(media, kv_heads))


def serialised(media: MediaKind = "float", kv_heads: int = HK, *, calls: int = 1) -> bytes:
    """The function, called `calls` times after each other, as the layers of a decoder call it."""
    scales = [TensorSpec(f"{kind}_scale", "float", ()) for kind in "kv"] if media == "fp8" else []
    spec = SubgraphSpec(
        name="phi",
        inputs=(
            TensorSpec("q", "float", ("B", "S", H, D)),
            TensorSpec("k", media, ("N", kv_heads, R, D)),
            TensorSpec("v", media, ("N", kv_heads, R, D)),
            TensorSpec("media_rows", "int64", ("B", "M")),
            TensorSpec("first_media", "int64", ("B", "S")),
            TensorSpec("phi", "int64", ("B", "S")),
            *scales,
        ),
        outputs=(TensorSpec("y", "float", ("B", "S", H, D)),),
    )
    build = GraphBuilder()
    inputs = graph_inputs(spec)
    y, *rest = inputs.values()
    for _ in range(calls):
        y = phi_range_cross_attention.call(build, y, *rest)
    body = phi_range_cross_attention.phi_range_cross_attention(
        num_heads=H, num_kv_heads=kv_heads, head_size=D, fp8=media == "fp8"
    )
    model = build.model(spec, inputs, {"y": y}, [body])
    return ir.serde.serialize_model(model).SerializeToString()


@pytest.fixture(scope="module")
def function() -> Run:
    return made()


def plain(q: Any, k: Any, v: Any, media_rows: Any, first_media: Any, phi: Any) -> Any:
    """One position, head and key after the other, in fp64."""
    y = np.zeros(q.shape)
    group = q.shape[2] // k.shape[1]
    for b, s, h in np.ndindex(*q.shape[:3]):
        keys = [
            (row, r) for row in media_rows[b, max(first_media[b, s], 1) - 1 : phi[b, s]].tolist() for r in range(k.shape[2])
        ]
        if not keys:
            continue
        scores = [
            sum(float(a) * float(c) for a, c in zip(q[b, s, h], k[n, h // group, r], strict=True)) / math.sqrt(D)
            for n, r in keys
        ]
        shares = [math.exp(score - max(scores)) for score in scores]
        for (n, r), share in zip(keys, shares, strict=True):
            y[b, s, h] += share / sum(shares) * v[n, h // group, r].astype(np.float64)
    return y


def feeds(
    media_rows: list[list[int]], first: list[list[int]], phi: list[list[int]], *, kv_heads: int = HK, rows: int = N
) -> dict[str, Any]:
    random = np.random.default_rng(len(phi[0]))
    return {
        "q": 2 * random.standard_normal((len(phi), len(phi[0]), H, D), dtype=np.float32),
        "k": random.standard_normal((rows, kv_heads, R, D), dtype=np.float32),
        "v": random.standard_normal((rows, kv_heads, R, D), dtype=np.float32),
        "media_rows": np.array(media_rows),
        "first_media": np.array(first),
        "phi": np.array(phi),
    }


CASES = {
    "text before the first image, of two tiles": ([[4, 5]], [[0, 0, 1, 1]], [[0, 0, 2, 2]]),
    "no image": ([[0]], [[0, 0, 0]], [[0, 0, 0]]),
    "no image, first counted from 1": ([[0]], [[1, 1, 1]], [[0, 0, 0]]),
    "one to four tiles in turn": (
        [[6, 0, 2, 1, 3, 5, 4, 0, 1, 2]],
        [[1, 1, 2, 2, 4, 4, 7, 7]],
        [[1, 1, 3, 3, 6, 6, 10, 10]],
    ),
    "adjacent images: the first token sees its own, the next sees both": ([[3, 2, 6, 1]], [[1, 1, 1]], [[2, 4, 4]]),
    "one image shown twice in a range counts twice": ([[2, 6, 2]], [[1, 1, 1, 2, 3]], [[1, 2, 3, 3, 3]]),
    "requests that share rows": ([[1, 4], [4, 1]], [[1, 1, 2], [0, 1, 1]], [[1, 2, 2], [0, 1, 2]]),
    "decoding: two images, a row without any": ([[5, 6], [3, 0], [0, 0]], [[1], [1], [0]], [[2], [1], [0]]),
    "beams about one image of four tiles": ([[2, 3, 4, 5]], [[1, 1, 1]], [[4, 4, 4]]),
    "eight callers about one image": ([[2, 3, 4, 5]] * 8, [[1]] * 8, [[4]] * 8),
    "every row": ([[6, 5, 4, 3, 2, 1, 0]], [[1, 3]], [[7, 7]]),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_a_plain_loop(function: Run, case: str) -> None:
    call = feeds(*CASES[case])
    y, exact = function(call)["y"], plain(**call)
    assert np.abs(y - exact).max() <= 2e-6
    assert not y[call["phi"] == 0].any()


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_heads_share_keys_in_groups(kv_heads: int) -> None:
    call = feeds([[4, 2], [1, 0]], [[1, 2], [0, 1]], [[2, 2], [0, 1]], kv_heads=kv_heads)
    assert np.abs(made(kv_heads=kv_heads)(call)["y"] - plain(**call)).max() <= 2e-6


def test_random_ranges_match(function: Run) -> None:
    random = np.random.default_rng(5)
    for _ in range(40):
        batch, size, media, rows = (int(n) for n in random.integers(1, 6, 4))
        phi = random.integers(0, media + 1, (batch, size))
        first = np.minimum(random.integers(1, media + 1, (batch, size)), phi)
        call = feeds(random.integers(0, rows, (batch, media)).tolist(), first.tolist(), phi.tolist(), rows=rows)
        assert np.abs(function(call)["y"] - plain(**call)).max() <= 2e-6


def test_no_medium_gives_exactly_zero_whatever_lies_in_the_bank(function: Run) -> None:
    call = feeds([[3]], [[0, 1]], [[0, 1]])
    call["k"][:] = 1e20
    call["v"][3] = np.inf
    y = function(call)["y"]
    assert np.array_equal(y[0, 0], np.zeros((H, D)))


def test_rows_that_are_not_looked_at_do_not_matter(function: Run) -> None:
    call = feeds([[2, 5]], [[0, 1, 1]], [[0, 1, 2]])
    before = function(call)["y"]
    for bank in ("k", "v"):
        others = np.ones(N, bool)
        others[[2, 5]] = False
        call[bank][others] = np.nan
    assert np.array_equal(function(call)["y"], before)


def test_large_scores_of_one_medium_do_not_hide_the_others(function: Run) -> None:
    """Parts are joined by their greatest scores: without that, either overflows or all of one medium is lost."""
    call = feeds([[1, 2, 3]], [[1, 1]], [[3, 3]])
    call["k"][1] *= 60
    call["k"][3] *= 20
    assert np.abs(function(call)["y"] - plain(**call)).max() <= 2e-5


def test_seating_is_worked_out_once_for_all_layers(tmp_path: Path) -> None:
    """ONNX Runtime merges equal nodes after it has inlined the calls."""
    counts = []
    for calls in (1, 4):
        kinds = [node.op_type for node in optimised(calls, tmp_path).graph.node]
        counts.append((kinds.count("TopK"), kinds.count("CumSum"), kinds.count("Softmax")))
    assert counts == [(1, 1, 1), (1, 1, 4)]


def test_no_keys_are_copied(tmp_path: Path) -> None:
    """Nothing gathers, transposes or expands what has the size of a bank: the products read it where it lies."""
    nodes = optimised(1, tmp_path).graph.node
    readers = {(node.op_type, list(node.input).index(name)) for node in nodes for name in "kv" if name in node.input}
    assert readers == {("FusedMatMul", 1), ("MatMul", 1), ("Shape", 0)}


def optimised(calls: int, folder: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / f"optimised_{calls}.onnx")
    options.log_severity_level = 3  # it warns that the file is for this machine
    onnxruntime.InferenceSession(serialised(calls=calls), options)
    return onnx.load(options.optimized_model_filepath)


def test_a_bank_of_codes_is_read_with_the_scale_of_each() -> None:
    random = np.random.default_rng(3)
    call = feeds([[6, 2, 1]], [[0, 1, 1, 3, 3]], [[0, 1, 2, 3, 3]])
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
