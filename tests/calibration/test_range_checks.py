"""A table that cannot be of a build's weights is refused where parity, which finds it by what it costs, is not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from variations import drawn_model

from flamingo_export import api
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import CalibrationError
from flamingo_export.weights.calibration_table import CalibrationTable, write_table
from flamingo_export.weights.range_checks import check_ranges
from flamingo_reference.config import ModelConfig

Calibrated = Callable[[ModelConfig], CalibrationTable]


@pytest.fixture
def table(config: ModelConfig, calibrated: Calibrated) -> CalibrationTable:
    return calibrated(config)


def built(config: ModelConfig, table: CalibrationTable, folder: Path, policy: str = "fp8") -> tuple[Path, Manifest]:
    write_table(folder / "table.json", table)
    found = api.build(
        drawn_model(config),
        out=folder / "b.bundle",
        policy=policy,
        calibration=folder / "table.json",
        parity="skip",
        overwrite=True,
    )
    return found.path, found.manifest


def scaled(table: CalibrationTable, name: str, factor: float) -> CalibrationTable:
    old = table.tensors[name]
    new = msgspec.structs.replace(
        old, amax=old.amax * factor, percentile=old.percentile * factor, mse=old.mse * factor, entropy=old.entropy * factor
    )
    return msgspec.structs.replace(table, tensors={**table.tensors, name: new})


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fp8", "int4"])
def test_the_right_table_of_every_kind_of_model_is_taken_and_many_wrong_ones_are_not(
    config: ModelConfig, table: CalibrationTable, policy: str, tmp_path: Path
) -> None:
    bundle, manifest = built(config, table, tmp_path, policy)
    caught: dict[float, set[str]] = {}
    for factor in (1 / 64, 64.0):
        caught[factor] = set()
        for name in table.tensors:
            try:
                check_ranges(bundle, manifest.config, manifest.precision, scaled(table, name, factor))
            except CalibrationError:
                caught[factor].add(name)
    after_norms = {
        name for name in table.tensors if name.endswith(("decoder/head", "qkv_proj", "cross_attention/q_proj", "/ffw_up"))
    }
    if "vision_encoder/layer.0/qkv_proj" in table.tensors:  # a transformer
        seen = {name for name in table.tensors if name.startswith("vision") and "layer." in name}
        assert len(seen) >= 4
        assert seen <= caught[64.0]
    after_norms = {name for name in after_norms if not name.startswith("vision")}
    # A bias as large as what the norm gives leaves no lower bound.
    assert len(after_norms & caught[1 / 64]) >= 0.75 * len(after_norms)
    assert after_norms <= caught[64.0]
    assert {name for name in table.tensors if name.endswith("self_attention/out_proj")} <= caught[64.0]
    assert len(caught[64.0]) > 0.6 * len(table.tensors)


@pytest.mark.parametrize("factor", [1 / 64, 64.0])
def test_a_build_without_parity_refuses_it_and_leaves_nothing(
    relative: ModelConfig, calibrated: Calibrated, factor: float, tmp_path: Path
) -> None:
    name = "decoder/layer.0/self_attention/qkv_proj"
    with pytest.raises(CalibrationError, match=rf"cannot be of these weights: .*{name} has .*flamingo-export calibrate"):
        built(relative, scaled(calibrated(relative), name, factor), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_only_zeros_after_a_norm_are_refused(relative: ModelConfig, calibrated: Calibrated, tmp_path: Path) -> None:
    table = calibrated(relative)
    bundle, manifest = built(relative, table, tmp_path)
    name = "decoder/layer.1/ffw_up"
    zeros = msgspec.structs.replace(scaled(table, name, 0.0).tensors[name], channel_rms="")
    wrong = msgspec.structs.replace(table, tensors={**table.tensors, name: zeros})
    rms = relative.language_model.norm == "rms_norm"
    if rms:
        with pytest.raises(CalibrationError, match=rf"{name} has only zeros"):
            check_ranges(bundle, manifest.config, manifest.precision, wrong)
    else:  # a bias may cancel what the norm gives
        check_ranges(bundle, manifest.config, manifest.precision, wrong)
