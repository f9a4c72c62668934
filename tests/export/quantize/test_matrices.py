"""Quantised matrices against definitions written out number by number, and their edge cases."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from flamingo_export.precision import E4M3_LARGEST, Quantisation, dividing_block
from flamingo_export.quantize.matrices import (
    SMALLEST_SCALE,
    code_shape,
    dequantised,
    packed,
    quantised,
    range_scale,
    scale_shape,
    unpacked,
)

FP8 = Quantisation(element="fp8")
INT8 = Quantisation(element="int8", block=16)
INT4 = Quantisation(element="int4", block=16)
EVERY = pytest.mark.parametrize("how", [FP8, INT8, INT4], ids=lambda how: how.element)


def matrix(rows: int = 64, columns: int = 12, seed: int = 0) -> np.ndarray:
    """Numbers with outliers in some channels, as trained weights have."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((rows, columns)) * 0.02
    numbers[rng.integers(rows, size=4)] *= 20
    return numbers.astype(np.float32)


def nearest_e4m3(value: float) -> float:
    """By its definition: 3 bits of mantissa, exponents from -6, at most 448, ties to even."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, E4M3_LARGEST), value)


def test_fp8_is_the_nearest_number_of_the_format_under_a_power_of_two_of_each_output() -> None:
    given = matrix()
    codes, scales = quantised(given, FP8)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    for column in range(given.shape[1]):
        peak = float(np.abs(given[:, column]).max())
        scale = float(scales[column])
        assert math.log2(scale).is_integer()
        assert scale * E4M3_LARGEST >= peak > scale * E4M3_LARGEST / 2
        for row in range(given.shape[0]):
            assert float(codes[row, column]) == nearest_e4m3(float(given[row, column]) / scale)


def test_int8_is_the_nearest_of_255_levels_of_each_block() -> None:
    given = matrix()
    codes, scales = quantised(given, INT8)
    for block in range(4):
        part = given[16 * block : 16 * (block + 1)].astype(np.float64)
        peak = np.abs(part).max(axis=0)
        np.testing.assert_allclose(scales[block], peak / 127, rtol=1e-6)
        rest = np.abs(part - codes[16 * block : 16 * (block + 1)] * scales[block].astype(np.float64))
        assert (rest <= scales[block] * 0.5001).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_int4_takes_the_best_of_the_scales_it_tries(weighted: bool) -> None:
    """Against brute force over the same shares, in fp64, by the error that was asked for."""
    given = matrix(seed=3)
    importance = np.random.default_rng(1).uniform(0.01, 9.0, len(given)) if weighted else None
    codes, scales = quantised(given, INT4, importance)
    whole = unpacked(codes)
    for block in range(4):
        inside = slice(16 * block, 16 * (block + 1))
        part = given[inside].astype(np.float64)
        weight = np.ones((16, 1)) if importance is None else importance[inside, None]
        peak = np.abs(part).max(axis=0)
        errors = []
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
            scale = peak / 7 * share
            rounded = np.clip(np.rint(part / scale), -8, 7) * scale
            errors.append((weight * (rounded - part) ** 2).sum(axis=0))
        found = (weight * (whole[inside] * scales[block].astype(np.float64) - part) ** 2).sum(axis=0)
        np.testing.assert_allclose(found, np.min(errors, axis=0), rtol=2e-3)


def test_importance_moves_the_error_away_from_the_channels_that_matter() -> None:
    given = matrix(seed=5)
    importance = np.full(64, 1e-6)
    importance[::16] = 1.0

    def error(weights: np.ndarray | None) -> float:
        kept = dequantised(*quantised(given, INT4, weights), INT4)
        return float((importance[:, None] * (kept - given) ** 2).sum())

    assert error(importance) < error(None)


@EVERY
def test_a_matrix_comes_back_within_its_rounding(how: Quantisation) -> None:
    given = matrix()
    codes, scales = quantised(given, how)
    assert codes.shape == code_shape(given.shape, how)
    assert scales.shape == scale_shape(given.shape, how)
    assert (scales > 0).all()
    found = dequantised(codes, scales, how)
    relative = np.sqrt(((found - given) ** 2).mean() / (given**2).mean())
    assert relative < {"fp8": 0.04, "int8": 0.01, "int4": 0.13}[how.element]


@EVERY
@pytest.mark.parametrize("alpha", [0.0, -0.3, 1e-6])
def test_gates_are_folded_before_and_every_scale_is_positive(how: Quantisation, alpha: float) -> None:
    """Zero stays exactly zero, a negative gate turns signs, a gate near zero stays harmless."""
    given = matrix() * np.float32(np.tanh(alpha))
    codes, scales = quantised(given, how)
    assert (scales >= SMALLEST_SCALE).all()
    assert np.isfinite(scales.astype(np.float16)).all()
    assert (scales.astype(np.float16) > 0).all()
    found = dequantised(codes, scales, how)
    if alpha == 0:
        assert not found.any()
    else:
        assert np.abs(found - given).max() <= max(0.15 * np.abs(given).max(), SMALLEST_SCALE)
        big = np.abs(given) > 0.5 * np.abs(given).max()
        assert alpha == 1e-6 or (np.sign(found[big]) == np.sign(given[big])).all()


def test_a_column_of_zeros_has_scale_one() -> None:
    given = matrix()
    given[:, 3] = 0
    for how in (FP8, INT8, INT4):
        codes, scales = quantised(given, how)
        assert (scales[..., 3] == 1).all()
        assert not dequantised(codes, scales, how)[:, 3].any()


def test_nothing_overflows_at_the_edge_of_the_format() -> None:
    """E4M3 has no infinity: what is beyond 448 would become NaN."""
    for peak in (448.0, np.nextafter(np.float32(448), np.float32(np.inf)), 1e37, 1e-38):
        given = np.full((16, 2), peak, np.float32)
        codes, scales = quantised(given, FP8)
        assert np.isfinite(dequantised(codes, scales, FP8)).all()


def test_packing_keeps_every_code_and_its_place() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    pairs = packed(codes)
    assert pairs.dtype == np.uint8
    assert pairs[0, 0] == (0x8 | 0x9 << 4)  # -8 in the low half, -7 in the high
    np.testing.assert_array_equal(unpacked(pairs), codes)


def test_ranges_become_powers_of_two_that_hold_them() -> None:
    for threshold in (5e-324, 1e-30, 1e-3, 1.0, 447.9, 448.0, 448.1, 1e6):
        scale = range_scale(threshold)
        assert math.log2(scale).is_integer()
        assert scale * E4M3_LARGEST >= threshold
        assert scale == SMALLEST_SCALE or scale * E4M3_LARGEST / 2 < threshold
    assert range_scale(0.0) == 1.0


def test_blocks_are_the_largest_power_of_two_that_divides() -> None:
    assert [dividing_block(size, 128) for size in (4096, 96, 48, 24, 100)] == [128, 32, 16, 0, 0]
    with pytest.raises(ValueError, match="do not divide into blocks of 16"):
        quantised(matrix(rows=24), INT8)
    with pytest.raises(ValueError, match="do not pair up"):
        quantised(matrix(columns=3), INT4)
