"""Thresholds against nvidia-modelopt's on the same modules and numbers."""

from __future__ import annotations

import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest

from flamingo_calibration import thresholds
from flamingo_calibration.activation_statistics import Collector
from tests.calibration import modelopt_oracle as oracle

RECORDED = json.loads(oracle.RECORDED.read_text())
OTHER_MACHINE = 1e-5
"""Of fp32 sums in another order, as another processor's matrix products have them. On the machine that recorded them they are equal."""


def test_amax_is_modelopts(config, calibrated):
    expected = RECORDED["amax"][config.name]
    assert len(expected) > 20
    table = calibrated(config)
    for name, amax in expected.items():
        assert table.tensors[name].amax == pytest.approx(amax, rel=OTHER_MACHINE), name


def collected(kind):
    collector = Collector(kind, channels=False)
    collector.add(oracle.drawn(kind))
    return collector.finish()


@pytest.mark.parametrize("kind", oracle.DRAWN)
def test_percentile_is_modelopts_but_for_the_bins(kind):
    """Theirs is the lower edge of one of 2048 equal bins, ours the upper edge of a bin of 1/128 of its numbers."""
    expected, width = RECORDED["methods"][kind]["percentile"], np.abs(oracle.drawn(kind)).max() / oracle.BINS
    found = collected(kind).percentile
    assert expected <= found <= (expected + width) * (1 + 2**-7)


@pytest.mark.parametrize("kind", oracle.DRAWN)
def test_mse_errs_no_more_than_modelopts(kind):
    """The error over thresholds is nearly flat with a dip in each step of E4M3, so thresholds differ where errors do not."""

    def error(threshold):
        values = oracle.drawn(kind).astype(np.float64)
        scale = threshold / 448
        kept = np.clip(values / scale, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        return ((kept.astype(np.float64) * scale - values) ** 2).sum()

    assert error(collected(kind).mse) <= 1.005 * error(RECORDED["methods"][kind]["mse"])


@pytest.mark.parametrize("kind", oracle.DRAWN)
def test_entropy_is_modelopts_with_its_bins_and_steps(kind):
    """modelopt knows entropy for integers alone: our search on its histogram, its 128 even steps and its thresholds finds the same.

    Its thresholds are those whose last bin is not empty: there it puts what is clipped, and divergence from nothing is infinite. Ours
    go into the last bin that is not empty.
    """
    magnitudes = np.abs(oracle.drawn(kind)).reshape(-1)
    counts, edges = np.histogram(magnitudes, bins=oracle.BINS, range=(0, magnitudes.max()))
    counts[0] = counts[1]
    filled = np.flatnonzero(counts)

    def even(bins, threshold):
        return np.digitize(np.floor(bins), np.linspace(0, threshold, 129))

    tried = [stop for stop in range(oracle.BINS, oracle.FIRST - 1, -oracle.STRIDE) if counts[stop - 1] or stop == oracle.BINS]
    found = thresholds.entropy((filled + 0.5).astype(np.float64), counts[filled], np.array(tried, np.float64), even)
    assert edges[int(found)] == pytest.approx(RECORDED["methods"][kind]["entropy"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed; its figures are recorded"
)
def test_what_was_recorded_is_what_modelopt_finds():
    found = oracle.figures()
    assert found["methods"] == RECORDED["methods"]
    for name, amax in RECORDED["amax"].items():
        assert found["amax"][name] == pytest.approx(amax, rel=OTHER_MACHINE)
