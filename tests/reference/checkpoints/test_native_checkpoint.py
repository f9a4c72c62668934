"""Our own checkpoint format: names, reading piece by piece, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import TINY, tiny_model

from flamingo_reference.checkpoints.families.native import load_native, save_native
from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.config import SIZES, ModelConfig
from flamingo_reference.model import Flamingo, numpy_from_torch
from flamingo_reference.names import expected_tensors, parameter_counts

SMALL = msgspec.structs.replace(TINY, name="small")
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return {name: numpy_from_torch(tensor.float()) for name, tensor in tiny_model(SMALL).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path, arrays: Arrays) -> Path:
    save_native(tmp_path / "checkpoint", SMALL, arrays.items())
    return tmp_path / "checkpoint"


@pytest.fixture
def shards(tmp_path: Path, arrays: Arrays) -> Path:
    save_native(tmp_path / "shards", SMALL, arrays.items(), max_file_bytes=60_000)
    return tmp_path / "shards"


@pytest.mark.parametrize("config", [SMALL, *SIZES.values()], ids=lambda config: config.name)
def test_names_are_the_models_parameters(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Flamingo(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == expected_tensors(config)
    for component, count in parameter_counts(config).items():
        assert count == sum(parameter.numel() for parameter in model.get_submodule(component).parameters())


def test_counts_computed_from_the_papers_shapes() -> None:
    """facts/paper.md: what its table of shapes comes to, in billions."""
    counts = {name: parameter_counts(SIZES[name]) for name in ("3b", "9b", "80b")}
    assert list(counts["3b"]) == ["vision_encoder", "resampler", "cross_attention", "language_model"]
    assert [round(counts[name]["language_model"] / 1e9, 2) for name in counts] == [1.37, 8.86, 70.06]
    assert [round(counts[name]["cross_attention"] / 1e9, 2) for name in counts] == [1.16, 1.80, 8.36]
    assert {counts[name]["vision_encoder"] for name in counts} == {435_286_116}
    # 174.7M without the projection from 3072 to 1536 (ours), which is 4.7M of these.
    assert {round(counts[name]["resampler"] / 1e6, 1) for name in counts} == {174.8}
    assert [len(SIZES[name].gated_layers) for name in counts] == [24, 10, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_saved_model_is_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(SMALL).to(dtype)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    model.save(tmp_path / "saved", tokenizer=tokenizer)
    again = Flamingo.from_checkpoint(tmp_path / "saved")
    assert again.config == SMALL
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert theirs.dtype == dtype
        assert torch.equal(ours, theirs), name
    assert (tmp_path / "saved" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_files_are_what_safetensors_itself_reads(folder: Path, shards: Path, arrays: Arrays) -> None:
    single = load_file(folder / "model.safetensors")
    many: Arrays = {}
    for path in sorted(shards.glob("model-*.safetensors")):
        assert path.stat().st_size < 60_000 + 200 * len(arrays)
        many |= load_file(path)
    assert len(list(shards.glob("*.safetensors"))) > 2
    for found in (single, many):
        assert list(found) == list(arrays) or set(found) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(arrays)


def test_reader_reads_what_safetensors_wrote(tmp_path: Path, arrays: Arrays) -> None:
    """Names, shapes and types without the numbers; numbers one tensor at a time, from files at any offset."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    mixed = {
        name: array.astype([np.float32, np.float16, ml_dtypes.bfloat16][n % 3])
        for n, (name, array) in enumerate(arrays.items())
    }
    save_file(
        {name: array.astype(np.float16) for name, array in arrays.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_bytes(msgspec.json.encode(SMALL))
    config, reader = load_native(folder)
    assert config == SMALL
    assert set(reader.names()) == set(arrays)
    for name, array in arrays.items():
        assert reader.shape(name) == array.shape
        assert reader.dtype(name) == np.float16
        np.testing.assert_array_equal(reader.read(name), array.astype(np.float16))
    save_native(folder, SMALL, mixed.items())
    _, reader = load_native(folder)
    for name, array in mixed.items():
        assert reader.dtype(name) == array.dtype
        np.testing.assert_array_equal(reader.read(name).astype(np.float32), array.astype(np.float32))
    assert not reader.read("resampler.latents").flags.writeable


def test_saving_takes_one_tensor_at_a_time(tmp_path: Path, arrays: Arrays) -> None:
    alive = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def one_by_one() -> Any:
        nonlocal alive
        for name, array in arrays.items():
            alive += 1
            assert alive <= 2
            yield name, array.copy().view(Counted)

    save_native(tmp_path / "streamed", SMALL, one_by_one(), max_file_bytes=100_000)
    _, reader = load_native(tmp_path / "streamed")
    np.testing.assert_array_equal(reader.read("resampler.latents"), arrays["resampler.latents"])


def test_saving_again_replaces_shards_and_index(shards: Path, arrays: Arrays) -> None:
    changed = {name: array + 1 for name, array in arrays.items()}
    save_native(shards, SMALL, changed.items())
    assert [path.name for path in sorted(shards.iterdir())] == ["config.json", "model.safetensors"]
    _, reader = load_native(shards)
    np.testing.assert_array_equal(reader.read("language_model.norm.weight"), changed["language_model.norm.weight"])


def misfits(arrays: Arrays) -> Arrays:
    bad = dict(arrays)
    bad["resampler.latent"] = bad.pop("resampler.latents")
    del bad["language_model.layers.3.q_proj.weight"]
    bad["language_model.norm.weight"] = np.zeros((5, 2), np.float32)
    return bad


ALL_MISFITS = (
    "missing resampler.latents (7, 20)",
    "missing language_model.layers.3.q_proj.weight (32, 24)",
    "unknown resampler.latent (7, 20) (nearest: resampler.latents)",
    "language_model.norm.weight has shape (5, 2), expected (24,)",
    "4 tensors do not fit model 'small'",
)


def test_tensors_that_do_not_fit_are_all_named_when_read(folder: Path, arrays: Arrays) -> None:
    save_file(misfits(arrays), folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_native(folder)
    for part in ALL_MISFITS:
        assert part in str(caught.value)


def test_tensors_that_do_not_fit_are_all_named_when_saved_and_nothing_is_lost(folder: Path, arrays: Arrays) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        save_native(folder, SMALL, misfits(arrays).items())
    for part in ALL_MISFITS:
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r"resampler\.latents was given twice"):
        save_native(folder, SMALL, [("resampler.latents", arrays["resampler.latents"])] * 2)
    with pytest.raises(ValueError, match=r"resampler\.latents has element type int8"):
        save_native(folder, SMALL, [("resampler.latents", arrays["resampler.latents"].astype(np.int8))])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_leaves_the_old_checkpoint(folder: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flamingo_reference.checkpoints.files.writer._File.finish", full)
    with pytest.raises(OSError, match="No space left"):
        save_native(folder, SMALL, arrays.items())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def shift(header: dict[str, Any]) -> None:
    entry = next(iter(header.values()))
    entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


def retype(header: dict[str, Any]) -> None:
    next(iter(header.values()))["dtype"] = "F4"


def reshape(header: dict[str, Any]) -> None:
    next(iter(header.values()))["shape"] = [1, 2, 3]


def negative(header: dict[str, Any]) -> None:
    entry = next(iter(header.values()))
    entry["data_offsets"] = [-offset for offset in entry["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shift, "tensors overlap or leave gaps"),
        (retype, "has element type F4, expected one of F64, F32, F16, BF16"),
        (reshape, r"bytes for shape \(1, 2, 3\)"),
        (negative, "bytes for shape"),
    ],
)
def test_headers_that_lie(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load_native(folder)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_truncated_file(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short.*Fetch the checkpoint again"):
        load_native(folder)


def test_file_with_something_behind_it(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"12345")
    with pytest.raises(CheckpointError, match="has 5 bytes after its last tensor"):
        load_native(folder)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[]", b'{"a": 1}'])
def test_malformed_header(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="has a malformed safetensors header"):
        load_native(folder)


def test_a_file_that_holds_tensors_twice(folder: Path) -> None:
    """Readers take the last of them without a word."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"][:2]
    again = json.dumps({name: header[name] for name in names})[1:-1]
    text = json.dumps(header)[:-1].encode() + f", {again}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match=f"holds {re.escape(', '.join(names))} twice"):
        load_native(folder)


def test_truncated_shard(shards: Path) -> None:
    path = sorted(shards.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{path.name} is cut short"):
        load_native(shards)


def test_missing_shard(shards: Path) -> None:
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    first.unlink()
    second.unlink()
    with pytest.raises(CheckpointError, match=f"names files that are not there: {first.name}, {second.name}"):
        load_native(shards)


def test_index_that_lies(shards: Path, arrays: Arrays) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = list(arrays)
    for change, message in (
        ({names[0]: index["weight_map"][names[-1]]}, f"does not hold {names[0]}, which the index places there"),
        ({names[0]: None}, f"the index does not list {names[0]}"),
        ({names[0]: "../elsewhere.safetensors"}, r"names what are not files of its folder: '\.\./elsewhere"),
        ({names[0]: 3}, "is malformed"),
    ):
        weight_map = {name: file for name, file in (index["weight_map"] | change).items() if file is not None}
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load_native(shards)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is malformed"):
        load_native(shards)


def test_tensor_in_two_shards(shards: Path, arrays: Arrays) -> None:
    paths = sorted(shards.glob("model-*.safetensors"))
    save_file({**load_file(paths[0]), **load_file(paths[1])}, paths[1])
    with pytest.raises(CheckpointError, match="held by more than one file") as caught:
        load_native(shards)
    assert paths[0].name in str(caught.value)
    assert paths[1].name in str(caught.value)


def test_folder_without_tensors_or_config(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_native(folder)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(No such file or directory\)"):
        load_native(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown field `colour`"),
        ({"name": 3}, "Expected `str`, got `int`"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std .* not positive"),
        ({"pixel_std": [58.395, 57.12, 57.375]}, "pixel_std .* is outside 0.0001 to 10, expected that of pixels from 0 to 1"),
        ({"pixel_std": [1.0, 1e308, 1.0]}, "pixel_std .* is outside"),
        ({"pixel_mean": [123.675, 116.28, 103.53]}, "pixel_mean .* is outside -10 to 10, expected that of pixels from 0 to 1"),
        ({"pixel_mean": [0.0, 10**30, 0.0]}, "pixel_mean .* is outside"),
    ],
)
def test_config_that_is_none(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_native(folder)
    assert "config.json" in str(caught.value)


def test_empty_tensor(tmp_path: Path) -> None:
    save_file({"nothing": np.zeros((0, 4), np.float32)}, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).read("nothing").shape == (0, 4)
