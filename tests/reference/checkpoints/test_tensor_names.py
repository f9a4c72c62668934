"""Names as training wrappers leave them, and tensors under two names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import TINY, tiny_model

from flamingo_reference.checkpoints.families import native
from flamingo_reference.checkpoints.files.tensors import CheckpointError, plain_tensor_name
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from flamingo_reference.model import numpy_from_torch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = ((name, numpy_from_torch(tensor)) for name, tensor in tiny_model().state_dict().items())
    native.save_native(tmp_path / "tiny", TINY, tensors)
    return tmp_path / "tiny"


def rewritten(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way round": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module.", name),
    "FSDP with recomputation": lambda name: re.sub(
        r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name
    ),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_names_as_training_wrappers_leave_them(folder: Path, kind: str) -> None:
    plain = load(CheckpointFiles(path=folder))
    wanted = {name: np.array(plain.reader.read(name)) for name in plain.reader.names()}
    rewritten(folder, lambda tensors: {WRAPPERS[kind](name): array for name, array in tensors.items()})
    assert not set(load_file(folder / "model.safetensors")) <= set(wanted)
    found = load(CheckpointFiles(path=folder)).reader
    assert set(found.names()) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found.read(name), array)


@pytest.mark.parametrize(
    "name", ["perceiver_module.x", "a.module.weight", "x_orig_mod.weight", "orig_mod.weight", "not_fsdp_wrapped_module.x"]
)
def test_names_that_only_look_alike_are_kept(name: str) -> None:
    assert plain_tensor_name(name) == name


def test_a_name_with_and_without_a_wrapper(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors | {"_orig_mod.resampler.latents": tensors["resampler.latents"]})
    with pytest.raises(CheckpointError, match=r"resampler\.latents is there with and without the names of training wrappers"):
        load(CheckpointFiles(path=folder))


def test_the_same_in_files_of_torch(folder: Path, tmp_path: Path) -> None:
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save({"model_state_dict": tensors}, folder / "pytorch_model.bin")
    assert load(CheckpointFiles(path=folder)).config == TINY


HEAD, EMBEDDING = "language_model.head.weight", "language_model.embedding.weight"


def test_an_output_that_is_the_embedding_saved_by_its_own_name_too(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].copy()})
    found = load(CheckpointFiles(path=folder))
    assert found.config.language_model.tied_head
    assert found.ignored == {HEAD: f"the output is the embedding: second name of {EMBEDDING}"}
    assert EMBEDDING in found.reader.names()
    found.reader.read(EMBEDDING)


def test_two_names_with_different_numbers(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors | {HEAD: tensors[EMBEDDING] + np.float32(1e-3)})
    found = load(CheckpointFiles(path=folder))
    with pytest.raises(
        CheckpointError, match=rf"{EMBEDDING} and {HEAD} are two names of one tensor, and hold different numbers"
    ):
        found.reader.read(EMBEDDING)
