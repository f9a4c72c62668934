"""The table's numbers against the whole model in fp64 with all activations in memory, and its names against the graphs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from flamingo_export.graphs import build_graph
from flamingo_export.precision import Precision
from flamingo_export.specs import SUBGRAPHS
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.calibration_table import calibrated_tensors, check_fits

FP32_DRIFT = 2e-5
"""Of an activation of the fp32 reference from fp64's, after a few layers, relative to the tensor's largest; measured 5e-7."""
BIN = 2**-7
"""Width of a histogram's bin, relative to its numbers."""


def error_of_e4m3(values, threshold):
    """Squared error of all numbers clipped to a threshold and rounded to E4M3, which stands at 448."""
    scale = threshold / 448
    kept = np.clip(values / scale, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return float(((kept.astype(np.float64) * scale - values) ** 2).sum())


def test_names_are_those_of_the_graphs_products(config):
    index = WeightIndex.planned(config, Precision(storage="fp32"))
    products = set()
    for name in SUBGRAPHS:
        for node in build_graph(config, name, index).graph:
            if node.op_type == "MatMul":
                names = [value.name or "" for value in node.inputs if value is not None]
                products |= set(names) & set(index)
                products |= {"decoder/head"} if "head/transpose" in names[1] else set()
    expected = {name for name, channels in calibrated_tensors(config).items() if channels}
    assert products - {"resampler/time_embeddings"} == expected


@pytest.mark.slow
def test_every_tensor_is_in_the_table(config, calibrated, seen_whole):
    table = calibrated(config)
    assert set(table.tensors) == set(calibrated_tensors(config)) == set(seen_whole(config))
    check_fits(table, config, table.weights_sha256)


@pytest.mark.slow
def test_amax_is_the_largest_magnitude(config, calibrated, seen_whole):
    table, seen = calibrated(config), seen_whole(config)
    for name, values in seen.items():
        assert table.tensors[name].amax == pytest.approx(np.abs(values).max(), rel=FP32_DRIFT), name


@pytest.mark.slow
def test_percentile_is_the_order_statistic_but_for_the_bin(config, calibrated, seen_whole):
    table, seen = calibrated(config), seen_whole(config)
    for name, values in seen.items():
        magnitudes = np.sort(np.abs(values[values != 0]))
        exact = magnitudes[int(np.ceil(0.9999 * len(magnitudes))) - 1]
        found = table.tensors[name].percentile
        assert exact * (1 - FP32_DRIFT) <= found <= exact * (1 + 2 * BIN), name


@pytest.mark.slow
def test_mse_is_the_least_error_there_is(config, calibrated, seen_whole):
    table, seen = calibrated(config), seen_whole(config)
    for name, values in seen.items():
        amax = np.abs(values).max()
        least = min(error_of_e4m3(values, amax * 2 ** (-step / 64)) for step in range(2 * 64))
        # The search takes every second of these thresholds, and centres of bins for numbers: most where there are few (192 latents, 4 %).
        assert error_of_e4m3(values, table.tensors[name].mse) <= 1.05 * least, name


def test_channels_are_relative_root_mean_squares(config, calibrated, seen_whole):
    table, seen = calibrated(config), seen_whole(config)
    for name, channels in calibrated_tensors(config).items():
        found = table.tensors[name].channels()
        if not channels:
            assert len(found) == 0
            continue
        relative = np.sqrt((seen[name] ** 2).mean(axis=0) / (seen[name] ** 2).mean())
        np.testing.assert_allclose(found, relative, rtol=2**-10, atol=1e-4, err_msg=name)


def test_all_thresholds_lie_between_zero_and_amax(config, calibrated):
    for name, found in calibrated(config).tensors.items():
        for value in (found.percentile, found.mse, found.entropy):
            assert 0 < value <= found.amax, name
