"""inspect CHECKPOINT: what it is and what would be built, without reading a number; what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import flamingo_export
from flamingo_export.sources.choice import nano_checkpoint
from flamingo_reference.checkpoints.files.tensors import FileReader


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    shutil.copytree(nano_checkpoint(), tmp_path / "my-model")
    return tmp_path / "my-model"


def test_what_would_be_built_is_what_build_makes(cli, nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = flamingo_export.build(nano, out=tmp_path / "b.bundle", parity="skip").path
    monkeypatch.setattr(FileReader, "read", None)  # no number is looked at
    outcome = cli("inspect", nano)
    assert outcome.code == 0
    for part in (
        "flamingo-export's own format",
        "recognised by",
        "float",
        "would be built: nano",
        "language_model",
        "64x64, pad",
        "<EOC>",
    ):
        assert part in outcome.out
    found = json.loads(cli("inspect", nano, "--json").out)
    weights = sum(path.stat().st_size for path in (built / "weights").iterdir())
    assert found["build"]["weight_bytes"] == pytest.approx(weights, rel=0.01)  # the files' headers are not counted
    assert found["build"]["weight_bytes"] < found["build"]["disk_bytes"]
    tensors = load_file(nano / "model.safetensors") | load_file(nano / "contrastive.safetensors")
    assert found["tensors"] == sum(found["types"].values()) == len(tensors)
    assert (found["family"], found["fault"], found["ignored"]) == ("native", None, {})
    assert found["tokenizer"] == str(nano / "tokenizer" / "tokenizer.json")


def test_what_is_missing_is_named(cli, nano: Path) -> None:
    tensors = load_file(nano / "model.safetensors")
    tensors["resampler.latent"] = tensors.pop("resampler.latents")
    save_file(tensors, nano / "model.safetensors")
    outcome = cli("inspect", nano)
    assert outcome.code == 1
    assert "flamingo-export's own format" in outcome.out
    assert "cannot be built" in outcome.out
    assert "missing resampler.latents (16, 128)" in outcome.out
    assert "unknown resampler.latent (16, 128) (nearest: resampler.latents)" in outcome.out
    assert json.loads(cli("inspect", nano, "--json").out)["build"] is None


def test_a_tokenizer_of_another_size(cli, nano: Path, tmp_path: Path) -> None:
    config = json.loads((nano / "config.json").read_text())
    tokenizer = json.loads((nano / "tokenizer" / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != last]
    del tokenizer["model"]["vocab"][last]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = cli("inspect", nano, "--tokenizer", tmp_path / "tokenizer.json")
    assert outcome.code == 1
    size = config["language_model"]["vocab_size"]
    assert f"has {size - 1} tokens, the model's vocabulary has {size}" in outcome.out


def test_parts_that_are_missing(cli, tmp_path: Path) -> None:
    torch.save(
        {"perceiver.latents": torch.zeros(2, 3), "lang_encoder.gated_cross_attn_layers.0.x": torch.zeros(1)}, tmp_path / "c.pt"
    )
    outcome = cli("inspect", tmp_path / "c.pt")
    assert outcome.code == 1
    assert "OpenFlamingo" in outcome.out
    assert "leaves its language model and vision encoder to other files. Add --lm FOLDER --vision FOLDER" in outcome.out


def test_planned_from_config_and_index_alone(cli, nano: Path, tmp_path: Path) -> None:
    """Of shards that are not there, names are checked; the figures are those of the whole checkpoint."""
    whole = json.loads(cli("build", "--checkpoint", nano, "--plan", "--json").out)
    tensors = load_file(nano / "model.safetensors")
    shards = {name: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, name in enumerate(tensors)}
    (nano / "model.safetensors").unlink()
    save_file(
        {name: array for name, array in tensors.items() if shards[name].startswith("model-00002")},
        nano / "model-00002-of-00003.safetensors",
    )
    index = nano / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    outcome = cli("build", "--checkpoint", nano, "--plan")
    assert outcome.code == 0, outcome.err
    assert "2 of the files that a build needs are not in" in outcome.out
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors. Fetch them" in outcome.out
    planned = json.loads(cli("build", "--checkpoint", nano, "--plan", "--json").out)
    assert [Path(path).name[:11] for path in planned.pop("absent")] == ["model-00001", "model-00003"]
    del planned["machine"]  # what is free changes from moment to moment
    assert planned == {name: value for name, value in whole.items() if name not in ("absent", "machine")}
    seen = cli("inspect", nano)
    assert seen.code == 1
    assert "cannot be built: 2 of the files that a build needs are not in" in seen.out
    assert "would be built: nano" in seen.out
    found = json.loads(cli("inspect", nano, "--json").out)
    assert found["types"]["not there"] == sum("-00002-" not in file for file in shards.values())
    assert cli("build", "--checkpoint", nano, "--out", tmp_path / "b.bundle").code == 1
    del shards["resampler.latents"]
    index.write_text(json.dumps({"weight_map": shards | {"resampler.latent": "model-00003-of-00003.safetensors"}}))
    outcome = cli("build", "--checkpoint", nano, "--plan")
    assert outcome.code == 1
    assert "missing resampler.latents (16, 128)" in outcome.err
    assert "unknown resampler.latent" in outcome.err


def test_what_is_no_checkpoint(cli, tmp_path: Path) -> None:
    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors")
    outcome = cli("inspect", tmp_path)
    assert (outcome.code, outcome.out) == (1, "")
    assert "of no known family" in outcome.err
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert "is cut short" in cli("inspect", tmp_path).err
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for name in ("empty", "other"):
        error = cli("inspect", tmp_path / name).err
        assert "is neither a bundle (it has no manifest.json) nor a checkpoint" in error
        assert "flamingo-export build" not in error


def test_options_that_go_with_checkpoints_alone(cli, bundle: Path) -> None:
    outcome = cli("inspect", bundle, "--lm", bundle)
    assert outcome.code == 2
    assert "parts go with a checkpoint" in outcome.err
    assert cli("build", "--size", "nano", "--lora", bundle).code == 2
    assert cli("parity", bundle, "--vision", bundle).code == 2
