"""Recipes against fp64 formulas, and the layout of the files against the safetensors library."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from flamingo_export.precision import Precision, default_precision
from flamingo_export.sources import LiveSource
from flamingo_export.weights import (
    DISTANCE_BLOCK,
    GELU_GAIN,
    SQUEEZE_EXCITE_GAIN,
    STANDARDISATION_EPS,
    Weight,
    WeightIndex,
    bundle_weights,
    groups,
    layout,
)
from flamingo_reference.config import NANO, SIZES, ModelConfig
from flamingo_reference.model import Flamingo, vision_nfnet
from flamingo_reference.names import expected_tensors, parameter_counts


@pytest.fixture(scope="module")
def weights(tiny_config: ModelConfig) -> dict[str, Weight]:
    return {weight.name: weight for weight in bundle_weights(tiny_config)}


@pytest.fixture(scope="module")
def make(tiny_model: Flamingo, weights: dict[str, Weight]) -> Callable[[str], Any]:
    state = {name: tensor.detach().numpy() for name, tensor in tiny_model.state_dict().items()}
    return lambda name: weights[name].make([state[source] for source in weights[name].sources])


def parameter(model: Flamingo, name: str) -> Any:
    return model.get_parameter(name).detach().double().numpy()


@pytest.mark.parametrize("size", list(SIZES))
def test_every_tensor_of_a_checkpoint_is_used_once(size: str) -> None:
    config = SIZES[size]
    made = bundle_weights(config)
    used = [source for weight in made for source in weight.sources]
    assert sorted(set(used)) == sorted(expected_tensors(config))
    twice = {source for source in used if used.count(source) > 1} if len(used) > len(set(used)) else set()
    assert all(
        source.startswith("vision_encoder.") and source.endswith("gate") for source in twice
    )  # folded into two tensors each
    assert len({weight.name for weight in made}) == len(made)


def test_recipes_make_the_shapes_they_promise(weights: dict[str, Weight], make: Callable[[str], Any]) -> None:
    for name, weight in weights.items():
        assert make(name).shape == weight.shape, name


def test_recipes_that_only_move_commute_with_rounding(tiny_model: Flamingo, weights: dict[str, Weight]) -> None:
    state = {name: tensor.detach().numpy() for name, tensor in tiny_model.state_dict().items()}
    moved = [weight for weight in weights.values() if weight.moves_only]
    assert len(moved) > 20
    for weight in moved:
        sources = [state[source] for source in weight.sources]
        before = weight.make([source.astype(ml_dtypes.bfloat16) for source in sources])
        assert np.array_equal(before, weight.make(sources).astype(ml_dtypes.bfloat16)), weight.name


def test_queries_keys_and_values_stand_side_by_side(tiny_model: Flamingo, make: Callable[[str], Any]) -> None:
    fused = make("decoder/layer.1/self_attention/qkv_proj")
    x = np.random.default_rng(0).standard_normal(32)
    parts = [parameter(tiny_model, f"language_model.layers.1.{part}_proj.weight") @ x for part in "qkv"]
    assert np.allclose(x @ fused, np.concatenate(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, -0.3, 1e-6, 2.5])
def test_gates_are_folded_with_sign_and_zero(weights: dict[str, Weight], alpha: float) -> None:
    weight = weights["decoder/layer.2/cross_attention/out_proj"]
    projection = np.random.default_rng(1).standard_normal((weight.shape[1], weight.shape[0]), dtype=np.float32)
    folded = weight.make([projection, np.array(alpha, np.float32)])
    exact = projection.T.astype(np.float64) * math.tanh(float(np.float32(alpha)))
    assert np.abs(folded - exact).max() <= 2.0**-23 * np.abs(exact).max()
    assert folded.any() == (alpha != 0.0)
    assert np.abs(folded.astype(ml_dtypes.bfloat16).astype(np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()


def test_kernels_are_standardised_and_carry_the_gain_before_them(tiny_model: Flamingo, make: Callable[[str], Any]) -> None:
    # Second block of the second stage: the variance before it is 1 + alpha^2.
    for name, scale in (
        ("stem/0", 1.0),
        ("stem/3", GELU_GAIN),
        ("stages/1/1/conv1", GELU_GAIN / math.sqrt(1.0 + 0.2**2)),
        ("stages/1/0/downsample", GELU_GAIN / math.sqrt(1.0 + 0.2**2)),
        ("stages/1/1/conv2b", GELU_GAIN),
        ("final_conv", 1.0),
    ):
        source = f"vision_encoder.{name.replace('/', '.')}"
        kernel, gain = parameter(tiny_model, f"{source}.weight"), parameter(tiny_model, f"{source}.gain")
        exact = np.empty_like(kernel)
        for out, values in enumerate(kernel):
            fan_in = values.size
            variance = sum((float(v) - values.mean()) ** 2 for v in values.flat) / fan_in
            exact[out] = (values - values.mean()) * gain[out].item() * scale / math.sqrt(fan_in * (variance + 1e-5))
        assert np.abs(make(f"vision_encoder/{name}/weight") - exact).max() <= 1e-12, name


def test_constants_are_the_references() -> None:
    assert vision_nfnet.GELU_GAIN == GELU_GAIN
    assert vision_nfnet.SQUEEZE_EXCITE_GAIN == SQUEEZE_EXCITE_GAIN
    assert vision_nfnet.STANDARDISATION_EPS == STANDARDISATION_EPS


def test_distances_are_projected_sinusoids(tiny_config: ModelConfig, tiny_model: Flamingo, make: Callable[[str], Any]) -> None:
    lm = tiny_config.language_model
    table = make("decoder/layer.1/self_attention/distances")
    assert table.shape == (lm.num_heads, lm.head_size, 1, DISTANCE_BLOCK)
    projection = parameter(tiny_model, "language_model.layers.1.relative_proj.weight")
    for distance in (0, 1, 17, lm.max_positions - 1, DISTANCE_BLOCK - 1):
        known = min(distance, lm.max_positions - 1)
        angles = [known / 10000.0 ** (2 * pair / lm.width) for pair in range(lm.width // 2)]
        encoded = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        exact = (projection @ encoded).reshape(lm.num_heads, lm.head_size) / math.sqrt(lm.head_size)
        assert np.abs(table[:, :, 0, distance] - exact).max() <= 1e-6


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_files_are_read_by_the_safetensors_library(
    tiny_model: Flamingo, storage: Any, bundle_writer: Callable[..., Path], tmp_path: Path
) -> None:
    precision = Precision(storage=storage)
    bundle = bundle_writer(LiveSource(tiny_model), tmp_path / "b", precision=precision)
    planned = WeightIndex.planned(tiny_model.config, precision)
    written = WeightIndex.read(bundle)
    assert {name: written[name] for name in written} == {name: planned[name] for name in planned}
    seen = 0
    for path in (bundle / "weights").iterdir():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                ours = torch.from_numpy(np.asarray(written.read_tensor(bundle, name)).astype(np.float32))
                assert torch.equal(file.get_tensor(name).float(), ours), name
                seen += 1
    assert seen == len(list(planned))


@pytest.mark.parametrize("size", list(SIZES))
def test_groups_are_files_of_bearable_size(size: str) -> None:
    config = SIZES[size]
    precision = default_precision(sum(parameter_counts(config).values()))
    for group, members in groups(bundle_weights(config)).items():
        header, placed = layout(members, precision)
        assert len(header) % 8 == 0
        # A tensor is not parted: the 90B's embedding is as large as that by itself.
        largest = max(place.length for place in placed.values())
        assert sum(place.length for place in placed.values()) < max(2.1e9, 1.05 * largest), group
        last = len(header)
        for place in placed.values():
            assert place.offset == last
            last += place.length


def test_what_is_small_and_felt_stays_in_fp32() -> None:
    precise = {weight.name for weight in bundle_weights(NANO) if weight.full_precision}
    for weight in bundle_weights(NANO):
        vector = len([size for size in weight.shape if size > 1]) <= 1
        assert not vector or weight.name in precise, weight.name
    assert "decoder/layer.0/self_attention/position_bias" in precise
    assert "decoder/embedding" not in precise


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("rows", [1, 63, 64, 129])
def test_large_matrices_are_transposed_strip_by_strip(weights: dict[str, Weight], rows: int, dtype: Any) -> None:
    random = np.random.default_rng(rows)
    first = random.standard_normal((rows, 7)).astype(dtype)
    drawn_transposed = random.standard_normal((7, 5)).astype(dtype).T
    made = weights["resampler/layer.0/kv_proj"].make([first, drawn_transposed])
    assert made.dtype == first.dtype
    assert np.array_equal(made, np.concatenate([first.T, drawn_transposed.T], axis=1))
