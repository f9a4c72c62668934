"""Shards and their index, of safetensors and of torch's format: all that can be wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.tensors import CheckpointError

NAMES = [f"layers.{index}.weight" for index in range(6)]


def array(name: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(NAMES.index(name)).standard_normal((3, 4)).astype(ml_dtypes.bfloat16)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three safetensors shards of two tensors each."""
    places = {name: f"model-{index // 2 + 1:05d}-of-00003.safetensors" for index, name in enumerate(NAMES)}
    for file in set(places.values()):
        save_file({name: array(name) for name in NAMES if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def test_shards_of_safetensors(shards: Path) -> None:
    reader = open_tensors(shards)
    assert reader.names() == NAMES
    assert [path.name for path in reader.files] == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    for name in NAMES:
        assert reader.read(name).tobytes() == array(name).tobytes()


def test_shards_of_torch(tmp_path: Path) -> None:
    places = {name: f"pytorch_model-{index % 2 + 1:05d}-of-00002.bin" for index, name in enumerate(NAMES)}
    for file in set(places.values()):
        content = {name: torch.from_numpy(array(name).astype(np.float32)) for name in NAMES if places[name] == file}
        torch.save(content, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    reader = open_tensors(tmp_path)
    for name in NAMES:
        np.testing.assert_array_equal(reader.read(name), array(name).astype(np.float32))


def test_safetensors_are_preferred(shards: Path) -> None:
    torch.save({"other": torch.zeros(1)}, shards / "pytorch_model.bin")
    assert open_tensors(shards).names() == NAMES


def test_a_whole_file_beside_shards(shards: Path) -> None:
    """transformers would read the whole file, and one of the two was left by an earlier save."""
    save_file({name: array(name) for name in NAMES}, shards / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds model\.safetensors and the index of 3 other files, .*: two checkpoints\. Remove"
    ):
        open_tensors(shards)


def test_an_index_of_one_whole_file(tmp_path: Path) -> None:
    """As MLX writes it."""
    save_file({name: array(name) for name in NAMES}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(NAMES, "model.safetensors")})
    )
    assert open_tensors(tmp_path).names() == NAMES


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor .*index\.json \(nor .*pytorch_model\.bin"):
        open_tensors(tmp_path)


def test_all_faults_are_named_at_once(shards: Path) -> None:
    """A shard cut short, one missing, one outside of the folder, a tensor in two shards, one that the index places elsewhere, one that it
    does not list."""
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, second, third = (shards / f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
    second.write_bytes(second.read_bytes()[:-3])
    save_file(load_file(third) | {"stray": np.zeros(2, np.float32), NAMES[0]: array(NAMES[0])}, third)
    content["weight_map"] |= {
        "lost": "model-00009-of-00003.safetensors",
        "out": "../outside.safetensors",
        "moved": first.name,
    }
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        open_tensors(shards)
    message = str(caught.value)
    for part in (
        f"{second} is cut short",
        "names files that are not there: model-00009-of-00003.safetensors",
        "names what are not files of its folder: '../outside.safetensors'",
        f"{NAMES[0]} in {first.name}, {third.name}",
        f"{first} does not hold moved, which the index places there",
        "the index does not list stray",
    ):
        assert part in message


@pytest.mark.parametrize("place", ["/etc/x.safetensors", "..", "a/b.safetensors", "..\\x.safetensors", "x\0.safetensors"])
def test_paths_that_leave_the_folder(shards: Path, place: str) -> None:
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NAMES[0]] = place
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="names what are not files of its folder"):
        open_tensors(shards)


def test_an_index_that_lists_a_tensor_twice(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    text = index.read_text().replace('"weight_map": {', f'"weight_map": {{"{NAMES[3]}": "model-00001-of-00003.safetensors", ')
    index.write_text(text)
    with pytest.raises(CheckpointError, match=f"lists {NAMES[3]} twice"):
        open_tensors(shards)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_that_is_none(shards: Path, text: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is malformed"):
        open_tensors(shards)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a" * 300, "\ud800", "a\0b", "a\\b"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="names what are not files of its folder"):
        open_tensors(tmp_path, may_be_absent=True)


@pytest.mark.slow
def test_very_many_files_that_are_not_there(tmp_path: Path) -> None:
    """In a moment, and in a message that can be read."""
    names = {f"x{index}": f"model-{index:05d}.safetensors" for index in range(30_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="and 29980 more") as caught:
        open_tensors(tmp_path)
    assert len(str(caught.value)) < 2000
    assert len(open_tensors(tmp_path, may_be_absent=True).absent) == 30_000
