"""The gate: its rule, and that it fails closed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flamingo_export.precision import Policy, Precision, Rule
from flamingo_export.quantize.policies import preset
from flamingo_export.validate.checks.stored_codes import int8_rounding
from flamingo_export.validate.checks.tensor_checks import NUM_SAMPLES, expect, gate
from flamingo_export.validate.report.parity_report import Row
from flamingo_export.validate.tolerances import (
    FP32_ULP,
    RULE,
    TABLE,
    layer_tolerance,
    logits_tolerance,
    tie_margin,
    tolerance,
    trace_limit,
)

REFERENCE = np.linspace(-1.0, 1.0, 1001).reshape(7, 143)
RMS = np.sqrt(np.mean(REFERENCE**2))
OWN_ERROR = 1e-5


def check(actual: np.ndarray | None, *, torch_error: float = OWN_ERROR) -> Row:
    torch_output = REFERENCE.copy()
    torch_output[3, 4] += torch_error
    expected = expect(REFERENCE, torch_output)
    return gate(expected, actual, tolerance=RULE, level="phi", case="a case", subgraph="decoder", tensor="logits")


def test_limit_is_twice_pytorchs_error_plus_four_ulps_of_the_largest_number() -> None:
    limit = check(REFERENCE).limit
    assert limit == pytest.approx(2 * OWN_ERROR / RMS + 4 * FP32_ULP / RMS, rel=1e-9)


@pytest.mark.parametrize(("share", "passed"), [(1.9, True), (2.2, False)])
def test_an_error_passes_below_twice_pytorchs_and_fails_above(share: float, passed: bool) -> None:
    actual = REFERENCE.copy()
    actual[6, 142] -= share * OWN_ERROR
    row = check(actual)
    assert row.passed is passed
    assert row.error == pytest.approx(share * OWN_ERROR / RMS, rel=1e-6)
    assert ("worst at [6, 142]" in row.note) is not passed


def test_an_error_where_the_engine_is_exact_is_zero() -> None:
    row = check(REFERENCE)
    assert row.error == 0.0
    assert row.passed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_fail_even_where_no_sample_is_taken(bad: float) -> None:
    large = np.tile(REFERENCE.reshape(-1), 20)
    expected = expect(large, large)
    assert expected.stride > 1
    actual = large.copy()
    actual[1] = bad
    row = gate(expected, actual, tolerance=RULE, level="phi", case="c", subgraph="s", tensor="t")
    assert not row.passed
    assert row.error is None
    assert "1 of 20020 numbers are NaN or infinite" in row.note


def test_another_shape_fails_and_what_is_missing_is_not_measured() -> None:
    assert "no such output" in check(None).note
    assert "shape (143, 7), expected (7, 143)" in check(REFERENCE.T).note
    unknown = gate(None, REFERENCE, tolerance=RULE, level="phi", case="c", subgraph="s", tensor="t")
    for row, outcome in ((check(None), "not measured"), (check(REFERENCE.T), "failed"), (unknown, "not measured")):
        assert row.outcome == outcome
        assert not row.passed


def test_a_reference_that_is_not_finite_measures_nothing() -> None:
    broken = REFERENCE.copy()
    broken[0, 0] = np.nan
    row = gate(expect(REFERENCE, broken), REFERENCE, tolerance=RULE, level="phi", case="c", subgraph="s", tensor="t")
    assert not row.passed
    assert row.outcome == "not measured"
    assert "reference itself" in row.note


def test_samples_visit_every_channel_of_a_power_of_two_shape() -> None:
    large = np.arange(64 * 1024, dtype=np.float64).reshape(64, 1024)
    expected = expect(large, large)
    assert len(expected.values) <= NUM_SAMPLES
    assert set((expected.values % 1024).astype(int)) == set(range(1024))


def test_an_all_zero_reference_must_be_met_exactly() -> None:
    zeros = np.zeros((3, 4))
    expected = expect(zeros, zeros)
    near = np.full((3, 4), 1e-6)
    assert gate(expected, zeros, tolerance=RULE, level="phi", case="c", subgraph="s", tensor="t").passed
    assert not gate(expected, near, tolerance=RULE, level="phi", case="c", subgraph="s", tensor="t").passed


def test_every_row_of_the_table_has_a_reason_and_unknown_kinds_are_refused() -> None:
    assert all(len(row.reason) > 40 for row in TABLE.values())
    own = [name for name, row in TABLE.items() if row is not RULE and not name.startswith("quantised")]
    assert own == ["vision_encoder, 16-bit storage", "resampler of encoded frames, 16-bit storage"]
    assert tolerance("vision_encoder", Precision(storage="bf16")).factor > tolerance("vision_encoder").factor
    assert tolerance("decoder", Precision(storage="bf16")) is RULE
    with pytest.raises(KeyError):
        tolerance("head")


def test_a_policy_is_judged_by_its_coarsest_format_and_its_price_is_bounded() -> None:
    def judged(kind: str, *formats: Any) -> object:
        rules = tuple(Rule(weights="*", format=name, block=32 if name != "fp8" else 0) for name in formats)
        return tolerance(kind, Precision(storage="fp32", policy=Policy(name="mixed", rules=rules)))

    assert judged("decoder", "int8", "int4") is TABLE["quantised, int4"]
    assert judged("layer", "int8", "fp8") is TABLE["quantised layer, fp8"]
    assert judged("vision_encoder", "int8") is RULE
    for name in ("quantised layer, int8", "quantised, int8"):
        row = TABLE[name]
        assert row.limit(torch_error=row.most, peak=1.0) == row.most < row.factor * row.most


def test_layers_in_int8_are_judged_by_pytorchs_own_error_where_each_weight_was_checked() -> None:
    def precision(form: str) -> Precision:
        return Precision(storage="fp32", policy=Policy(name="all", rules=(Rule(weights="*", format=form, block=32),)))  # type: ignore[arg-type]

    row = TABLE["quantised layer, int8"]
    assert layer_tolerance(precision("int8"), weights_checked=False) is row
    found = layer_tolerance(precision("int8"), weights_checked=True)
    assert (found.factor, found.floor_ulps) == (row.factor, row.floor_ulps)
    assert found.limit(torch_error=0.2, peak=1.0) == pytest.approx(0.3, rel=1e-4)
    for form in ("int4", "fp8"):
        assert layer_tolerance(precision(form), weights_checked=True) is TABLE[f"quantised layer, {form}"]


def test_int8_rounding_by_hand() -> None:
    """Blocks of 2 channels: steps of 2 and 4, numbers off by half a step, by all of it, and exact."""
    matrix = np.array([[254.0, 508.0], [3.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    assert int8_rounding(matrix, np.array([[254.0, 508.0], [4.0, 4.0], [0.0, 0.0], [0.0, 0.0]]), 2) == 1.0
    assert int8_rounding(matrix, np.array([[254.0, 508.0], [4.0, 6.0], [0.0, 0.0], [0.0, 0.0]]), 2) == 2.0
    assert int8_rounding(matrix, matrix, 2) == 0.0


def test_logits_in_int4_may_err_as_far_as_what_arrives_at_the_head() -> None:
    policy = Policy(name="all", rules=(Rule(weights="*", format="int4", block=32),))
    precision = Precision(storage="fp32", policy=policy)
    row = TABLE["quantised, int4"]
    for arriving, most in ((0.2, row.most), (float("nan"), row.most), (2.0, 4.0)):
        limits = logits_tolerance(precision, arriving)
        assert limits.limit(torch_error=100.0, peak=1.0) == most
        assert limits.limit(torch_error=0.1, peak=1.0) == pytest.approx(0.15, rel=1e-4)
    assert logits_tolerance(Precision(storage="fp32"), 2.0) is RULE
    fp8 = Policy(name="all", rules=(Rule(weights="*", format="fp8"),))
    assert logits_tolerance(Precision(storage="fp32", policy=fp8), 2.0) is TABLE["quantised, fp8"]


def test_margins_of_ties_grow_with_the_square_root_of_the_steps() -> None:
    limit = trace_limit(torch_error=1e-6, peak=10.0)
    assert limit == pytest.approx(2e-6 + 80 * FP32_ULP)
    assert tie_margin(limit=limit, steps=1) == 2 * limit
    assert tie_margin(limit=limit, steps=16) == 8 * limit
    assert np.isnan(trace_limit(torch_error=float("nan"), peak=1.0))


def test_arithmetic_in_16_bits_changes_the_factor_of_quantised_rows_only() -> None:
    """And never their bounds, nor what is judged in fp32."""
    policy = preset("fp8")
    precision = Precision(storage="fp16", policy=policy)
    narrow, wide = tolerance("decoder", precision, "fp16"), tolerance("decoder", precision)
    assert (narrow.factor, narrow.most, narrow.floor_ulps) == (2.0, wide.most, wide.floor_ulps)
    assert wide.factor == 1.5
    assert tolerance("decoder", Precision(storage="fp16"), "fp16") is RULE
    assert tolerance("vision_encoder", precision, "fp16") is tolerance("vision_encoder", precision)
