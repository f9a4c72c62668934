"""Every kind of model, built and compared with the reference case by case: what a user's own build does."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from variations import VARIATIONS, drawn_model

import flamingo_export
from flamingo_export.manifest import read_manifest
from flamingo_export.validate.cases import phi_cases
from flamingo_export.validate.report import read_report
from flamingo_reference.checkpoints.names import expected_tensors
from flamingo_reference.config import ModelConfig


@pytest.mark.parametrize("config", VARIATIONS.values(), ids=VARIATIONS)
def test_names_and_json(config: ModelConfig) -> None:
    config.validate()
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config
    shapes = {name: tuple(tensor.shape) for name, tensor in drawn_model(config).state_dict().items()}
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize("config", VARIATIONS.values(), ids=VARIATIONS)
def test_built_engines_are_the_reference(config: ModelConfig, tmp_path: Path) -> None:
    out = tmp_path / "v.bundle"
    flamingo_export.build(drawn_model(config), out=out)
    report = read_report(out)
    failed = [(row.case, row.subgraph, row.tensor, row.error, row.limit, row.note) for row in report.rows if not row.passed]
    assert not failed, failed
    assert set(phi_cases(config)) <= {row.case for row in report.rows}
    assert {trace.num_beams for trace in report.traces} == {1, 3}
    assert read_manifest(out).parity.state == "passed"
