"""One tensor's statistics: independent of order and pieces, thresholds against plain loops, refusals."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from flamingo_calibration import thresholds
from flamingo_calibration.activation_statistics import Collector
from flamingo_export.errors import CalibrationError


def collected(*pieces, channels=True):
    collector = Collector("x", channels=channels)
    for piece in pieces:
        collector.add(np.asarray(piece, np.float32))
    return collector.finish()


def drawn(shape=(400, 24), seed=0, kind="normal"):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) if kind == "normal" else rng.standard_t(2, shape)
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_order_and_size_of_pieces_do_not_matter(kind):
    values = drawn(kind=kind)
    whole = collected(values)
    shuffled = np.random.default_rng(1).permutation(400)
    assert collected(*np.array_split(values, 7)) == whole
    assert collected(*values[shuffled][:, None]) == whole
    assert collected(*np.array_split(values[::-1], 13)) == whole


def test_small_pieces_before_large_ones_keep_their_resolution():
    """Where a range grows, what came first is told apart less and less; here bins are relative."""
    small, large = drawn((1000, 4)) * np.float32(1e-4), np.full((1, 4), 100.0, np.float32)
    found = collected(small, large, channels=False)
    assert found.amax == 100
    assert found == collected(large, small, channels=False)
    exact = np.sort(np.abs(np.concatenate([small, large]).reshape(-1)))
    assert found.percentile == pytest.approx(exact[math.ceil(0.9999 * len(exact)) - 1], rel=2**-7)


def test_zeros_do_not_count():
    values = drawn()
    with_zeros = np.concatenate([values, np.zeros_like(values)])
    one, other = collected(values, channels=False), collected(with_zeros, channels=False)
    assert one == other


def test_scales_with_powers_of_two():
    values = drawn(kind="heavy")
    one, other = collected(values), collected(values * 64)
    assert other.channel_rms == one.channel_rms
    for method in ("amax", "percentile", "mse", "entropy"):
        assert getattr(other, method) == pytest.approx(64 * getattr(one, method), rel=1e-12)


def test_e4m3_is_the_format_that_onnx_knows():
    """Against the format's own values, written out: sign, four bits of exponent, three of mantissa, 448 the largest."""
    grid = sorted(
        {m / 8 * 2.0**-6 for m in range(8)} | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} - {480.0}
    )
    values = np.abs(drawn((2000,), kind="heavy")).astype(np.float64)
    threshold = 5.0
    found = thresholds.e4m3(values, np.array(threshold))
    scaled = np.minimum(values / threshold * 448, 448)
    nearest = np.array(grid)[np.abs(np.array(grid) - scaled[:, None]).argmin(axis=1)] * threshold / 448
    np.testing.assert_allclose(found, nearest, rtol=1e-12)
    assert found.max() == pytest.approx(threshold)


def plain_entropy(values, counts, tried):
    """Migacz's search in plain loops."""
    best, least = None, math.inf
    for threshold in tried:
        inside = [i for i, value in enumerate(values) if value <= threshold]
        clipped = sum(counts[len(inside) :])
        if not inside or clipped > 0.1 * sum(counts):
            break
        given = [float(counts[i]) for i in inside]
        given[-1] += clipped
        scale = threshold / 448
        steps: dict[float, list[int]] = {}
        for i in inside:
            step = float(ml_dtypes.float8_e4m3fn(min(values[i] / scale, 448)))
            steps.setdefault(step, []).append(i)
        spread = [0.0] * len(inside)
        for members in steps.values():
            for i in members:
                spread[i] = sum(counts[m] for m in members) / len(members)
        total, other = sum(given), sum(spread)
        found = sum(p / total * math.log((p / total) / (q / other)) for p, q in zip(given, spread, strict=True))
        if found < least:
            best, least = threshold, found
    return best


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_entropy_is_that_of_plain_loops(kind):
    magnitudes = np.abs(drawn((3000,), kind=kind)).astype(np.float64)
    counts, edges = np.histogram(magnitudes, bins=300)
    filled = np.flatnonzero(counts)
    values, counts = ((edges[1:] + edges[:-1]) / 2)[filled], counts[filled]
    tried = thresholds.candidates(float(magnitudes.max()))[::8]
    assert thresholds.entropy(values, counts, tried) == pytest.approx(
        plain_entropy(values.tolist(), counts.tolist(), tried.tolist())
    )


def test_clipping_pays_for_an_outlier_in_entropy_and_not_in_amax():
    values = np.concatenate([drawn((20000,)), [50.0]]).astype(np.float32)
    found = collected(values, channels=False)
    assert found.amax == 50
    assert found.percentile < 6
    assert found.entropy < 50


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_name_the_tensor(bad):
    values = drawn()
    values[3, 5] = bad
    collector = Collector("decoder/layer.3/ffw_down", channels=True)
    with pytest.raises(CalibrationError, match=r"1 of 9600 numbers of decoder/layer\.3/ffw_down are NaN or infinite"):
        collector.add(values)


def test_constant_numbers_are_refused_zeros_are_not():
    with pytest.raises(CalibrationError, match="x is -2 in all 12 places"):
        collected(np.full((3, 4), -2.0))
    found = collected(np.zeros((3, 4)), np.full((3, 4), -0.0))
    assert (found.amax, found.percentile, found.mse, found.entropy, found.channel_rms) == (0, 0, 0, 0, "")
    with pytest.raises(CalibrationError, match="no sample reached x"):
        collected(np.zeros((0, 4)))


def test_a_single_number_and_the_smallest_ones():
    assert collected([[3.0]]).entropy == 3
    tiny = collected([[1e-41, 2e-41]])
    assert 0 < tiny.percentile <= tiny.amax == pytest.approx(2e-41, rel=1e-3)
