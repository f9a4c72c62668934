"""`python -m flamingo_export.validate.record`: golden values of a checkpoint, which ONNX Runtime then meets, and what is added to old ones."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from flamingo_export import api
from flamingo_export.validate import check_bundle
from flamingo_export.validate.expected.golden import Goldens, load_goldens, save_goldens
from flamingo_export.validate.record import main
from flamingo_reference.model import Flamingo


def read(checkpoint: Path) -> Goldens:
    found = load_goldens(checkpoint / "golden", checkpoint)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def recorded(tiny_model: Flamingo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("recorded") / "tiny"
    tiny_model.save(checkpoint)
    assert main([str(checkpoint)]) == 0
    return checkpoint


@pytest.fixture(scope="module")
def other(tiny_model: Flamingo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose embedding differs by a thousandth, without golden values."""
    checkpoint, model = tmp_path_factory.mktemp("other") / "tiny", copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.language_model.embedding.weight[5:] *= 1.001
    model.save(checkpoint)
    return checkpoint


@pytest.mark.slow
def test_a_bundle_meets_what_was_recorded_and_other_weights_do_not(recorded: Path, other: Path, tmp_path: Path) -> None:
    bundle = api.build(recorded, out=tmp_path / "a.bundle", parity="skip").path
    assert check_bundle(bundle, against="golden").verdict == "passed"
    digest = api.build(other, out=tmp_path / "none.bundle", parity="skip").manifest.source.sha256
    assert digest is not None
    checkpoint = Path(shutil.copytree(other, tmp_path / "other"))
    save_goldens(checkpoint / "golden", msgspec.structs.replace(read(recorded), weights_sha256=digest))
    bundle = api.build(checkpoint, out=tmp_path / "b.bundle", parity="skip").path
    assert check_bundle(bundle, against="golden").verdict == "failed"


def test_cases_that_are_lacking_are_added_and_the_rest_stays(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = read(recorded)
    lacking = {key for key in whole.expected if key.startswith("image last|")}
    assert lacking
    fewer = {key: value for key, value in whole.expected.items() if key not in lacking}
    save_goldens(recorded / "golden", msgspec.structs.replace(whole, expected=fewer))
    before = (recorded / "golden" / "tensors.safetensors").read_bytes()
    assert read(recorded).expected.keys() == fewer.keys()
    capsys.readouterr()
    assert main([str(recorded), "--add"]) == 0
    assert f"{len(whole.expected)} tensors, {len(whole.traces)} traces" in capsys.readouterr().out
    assert (recorded / "golden" / "tensors.safetensors").read_bytes() == before
    found = read(recorded)
    assert found.expected.keys() == whole.expected.keys()
    for key in lacking:
        np.testing.assert_array_equal(found.expected[key].values, whole.expected[key].values)


def test_values_of_other_weights_are_not_added_to(
    recorded: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(other), "--add"]) == 1
    checkpoint = Path(shutil.copytree(other, tmp_path / "other"))
    save_goldens(checkpoint / "golden", read(recorded))
    capsys.readouterr()
    assert main([str(checkpoint), "--add"]) == 1
    assert "holds no golden values of these weights to add to. Leave out --add." in capsys.readouterr().err


def test_what_is_no_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("record: ")
