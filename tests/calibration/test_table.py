"""The table's file: what is written is read, other weights and impossible numbers are refused."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from flamingo_export.errors import CalibrationError
from flamingo_export.weights.calibration_table import (
    SCHEMA_VERSION,
    CalibrationTable,
    Statistics,
    calibrated_tensors,
    check_fits,
    read_table,
    write_table,
)


@pytest.fixture
def table(relative, calibrated) -> CalibrationTable:
    return calibrated(relative)


def changed(table, name, **fields):
    statistics = msgspec.structs.replace(table.tensors[name], **fields)
    return msgspec.structs.replace(table, tensors={**table.tensors, name: statistics})


NAME = "decoder/layer.0/ffw_down"


def test_what_is_written_is_read(table, tmp_path):
    write_table(tmp_path / "calibration.json", table)
    found = read_table(tmp_path / "calibration.json")
    assert found == table
    assert found.tensors[NAME].channels().dtype == np.float16
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_equal_tables_make_equal_bytes(table, tmp_path):
    turned = msgspec.structs.replace(table, tensors=dict(reversed(table.tensors.items())))
    write_table(tmp_path / "a", table)
    write_table(tmp_path / "b", turned)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_threshold_is_the_methods(table):
    statistics = table.tensors[NAME]
    assert table.threshold(NAME) == statistics.amax
    for method in ("amax", "percentile", "mse", "entropy"):
        assert table.threshold(NAME, method) == getattr(statistics, method)
        assert msgspec.structs.replace(table, method=method).threshold(NAME) == getattr(statistics, method)
    with pytest.raises(CalibrationError, match=r"no tensor 'decoder/layer\.9/ffw_down'"):
        table.threshold("decoder/layer.9/ffw_down")


def test_threshold_of_zeros_is_positive(table, tmp_path):
    silent = changed(table, NAME, amax=0.0, percentile=0.0, mse=0.0, entropy=0.0, channel_rms="")
    write_table(tmp_path / "x", silent)
    assert read_table(tmp_path / "x").threshold(NAME) == 1.0


def test_other_weights_are_refused(table, relative):
    check_fits(table, relative, table.weights_sha256)
    with pytest.raises(CalibrationError, match=r"other weights .* Calibrate again: flamingo-export calibrate"):
        check_fits(table, relative, "0" * 64)
    with pytest.raises(CalibrationError, match="unknown"):
        check_fits(table, relative, None)


def test_missing_and_unknown_tensors_are_named(table, relative):
    tensors = dict(table.tensors)
    tensors["decoder/layer.7/ffw_up"] = tensors.pop(NAME)
    with pytest.raises(CalibrationError, match=rf"it lacks {NAME}; it has unknown decoder/layer\.7/ffw_up"):
        check_fits(msgspec.structs.replace(table, tensors=tensors), relative, table.weights_sha256)


def test_another_number_of_channels_is_refused(table, relative):
    other = changed(table, NAME, channel_rms=table.tensors["resampler/layer.0/ffw_down"].channel_rms)
    with pytest.raises(CalibrationError, match=f"channels of {NAME}, expected {calibrated_tensors(relative)[NAME]}"):
        check_fits(other, relative, table.weights_sha256)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"amax": -1.0}, "amax -1.0"),
        ({"mse": 0.0}, "mse 0.0"),
        ({"entropy": float("inf")}, "entropy inf"),
        ({"percentile": float("nan")}, "percentile nan"),
        ({"amax": 1e39}, "expected positive numbers within fp32's range"),
        ({"channel_rms": "AAA"}, "not base64"),
        ({"channel_rms": "AHw="}, "negative or not finite"),
    ],
)
def test_numbers_that_cannot_be_are_neither_written_nor_read(table, tmp_path, fields, message):
    bad = changed(table, NAME, **fields)
    with pytest.raises(CalibrationError, match=message):
        write_table(tmp_path / "x", bad)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").write_text(json.dumps(msgspec.to_builtins(bad)))
    with pytest.raises(CalibrationError, match=r"Calibrate again"):
        read_table(tmp_path / "x")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema_version", SCHEMA_VERSION + 1, "Update flamingo-export"),
        ("schema_version", 0, "schema_version is 0"),
        ("weights_sha256", "xyz", "64 hexadecimal digits"),
        ("method", "guess", "not a calibration table"),
        ("samples", 0, "samples is 0"),
        ("tokens", 10**30, "tokens is 10{30}, expected 1 to"),
        ("tensors", {}, "no tensors"),
        ("more", 1, "unknown field"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(table, tmp_path, field, value, message):
    (tmp_path / "x").write_text(json.dumps({**msgspec.to_builtins(table), field: value}))
    with pytest.raises(CalibrationError, match=message):
        read_table(tmp_path / "x")


NESTED = b'{"schema_version": 1, "more": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe", b'{"schema_version": "1"}', NESTED])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CalibrationError, match="not a calibration table"):
        read_table(tmp_path / "x")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_table(tmp_path / "missing")


def test_statistics_without_channels():
    assert len(Statistics(amax=1.0, percentile=1.0, mse=1.0, entropy=1.0).channels()) == 0


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_a_threshold_above_the_largest_number_is_refused(table, tmp_path, method):
    wrong = changed(table, NAME, **{method: table.tensors[NAME].amax * 1.5})
    with pytest.raises(CalibrationError, match=rf"{NAME} has .*; expected none above amax"):
        write_table(tmp_path / "calibration.json", wrong)


def test_channels_beside_a_range_of_zero_are_told_as_that(table, relative):
    """Two equal numbers on both sides say nothing: "has 512 channels, expected 512"."""
    wrong = changed(table, NAME, amax=0.0, percentile=0.0, mse=0.0, entropy=0.0)
    count = calibrated_tensors(relative)[NAME]
    with pytest.raises(
        CalibrationError, match=rf"{count} channels of {NAME}, of which it says that only zeros.*expected no channels"
    ):
        check_fits(wrong, relative, table.weights_sha256)
