"""LoRA adapters: merged as the formula says, in float64 here; written in the layout of PEFT's files, which is plain safetensors and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.tensors import CheckpointError, FileReader
from flamingo_reference.checkpoints.lora import LoraReader

Arrays = dict[str, np.ndarray[Any, Any]]
Q, V, GATE = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.v_proj", "11.mlp.gate_proj"))
SHAPES = {
    f"{Q}.weight": (12, 8),
    f"{V}.weight": (8, 12),
    f"{GATE}.weight": (20, 8),
    "model.embed_tokens.weight": (30, 8),
    "lm_head.weight": (30, 8),
}


def drawn(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def base(tmp_path: Path) -> FileReader:
    tensors = {name: drawn(seed, *shape).astype(ml_dtypes.bfloat16) for seed, (name, shape) in enumerate(SHAPES.items())}
    save_file(tensors, tmp_path / "model.safetensors")
    return open_tensors(tmp_path)


def write(folder: Path, settings: dict[str, Any], tensors: Arrays) -> Path:
    folder.mkdir(exist_ok=True)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "use_dora": False, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    save_file({f"base_model.model.{name}": array for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def halves(module: str, *, rank: int = 4) -> Arrays:
    out, into = SHAPES[f"{module}.weight"]
    return {f"{module}.lora_A.weight": drawn(51, rank, into), f"{module}.lora_B.weight": drawn(52, out, rank)}


def check(
    base: FileReader,
    adapter: Path,
    target: str,
    down: np.ndarray[Any, Any],
    up: np.ndarray[Any, Any],
    scale: float,
    *,
    flipped: bool = False,
) -> None:
    """W + scale * B A in float64, to within the rounding of fp32; every other tensor untouched."""
    reader = LoraReader(base, adapter)
    assert reader.names() == base.names()
    delta = scale * (up.astype(np.float64) @ down.astype(np.float64))
    expected = base.read(target).astype(np.float64) + (delta.T if flipped else delta)
    merged = reader.read(target)
    assert merged.dtype == reader.dtype(target) == np.float32
    assert merged.shape == reader.shape(target)
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6 * np.abs(delta).max())
    for name in set(base.names()) - set(reader.changed):
        assert reader.read(name).tobytes() == base.read(name).tobytes()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 10}}, 10 / 4),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 10, "q_proj": 11}}, 10 / 4),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj$": 3}}, 3 / 4),
        ({"alpha_pattern": {"v_proj": 10, "j_proj": 3, "^q_proj": 7}}, 6 / 4),
        ({"lora_alpha": 0.5}, 0.5 / 4),
    ],
)
def test_the_formula(base: FileReader, tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    tensors = halves(Q)
    adapter = write(tmp_path / "adapter", settings, tensors)
    check(base, adapter, f"{Q}.weight", tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"], scale)


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 1e60}], ids=["numbers", "scale"])
def test_an_update_beyond_32_bits_is_left_to_the_build_to_name(
    base: FileReader, tmp_path: Path, settings: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    """Found by fuzzing: numpy's warnings reached the user before the build's error."""
    tensors = halves(Q)
    if not settings:
        tensors = {name: np.full_like(array, 3e38) for name, array in tensors.items()}
    merged = LoraReader(base, write(tmp_path / "adapter", settings, tensors)).read(f"{Q}.weight")
    assert not np.isfinite(merged).any()
    assert not recwarn.list


def test_ranks_of_their_own(base: FileReader, tmp_path: Path) -> None:
    tensors = halves(Q, rank=2) | halves(V)
    adapter = write(tmp_path / "adapter", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}, tensors)
    check(base, adapter, f"{Q}.weight", tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"], 5 / 2)
    check(base, adapter, f"{V}.weight", tensors[f"{V}.lora_A.weight"], tensors[f"{V}.lora_B.weight"], 6 / 4)


def test_a_setting_for_transposed_layers_changes_nothing(base: FileReader, tmp_path: Path) -> None:
    tensors = halves(Q)
    adapter = write(tmp_path / "adapter", {"fan_in_fan_out": True}, tensors)
    check(base, adapter, f"{Q}.weight", tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"], 6 / 4)


def test_embeddings(base: FileReader, tmp_path: Path) -> None:
    down, up = drawn(1, 4, 30), drawn(2, 8, 4)
    tensors = {"model.embed_tokens.lora_embedding_A": down, "model.embed_tokens.lora_embedding_B": up}
    check(base, write(tmp_path / "adapter", {}, tensors), "model.embed_tokens.weight", down, up, 6 / 4, flipped=True)


def test_modules_saved_whole_take_the_place_of_the_bases(base: FileReader, tmp_path: Path) -> None:
    head = drawn(9, 30, 8)
    adapter = write(tmp_path / "adapter", {"modules_to_save": ["lm_head"]}, halves(Q) | {"lm_head.weight": head})
    np.testing.assert_array_equal(LoraReader(base, adapter).read("lm_head.weight"), head)
    write(adapter, {"modules_to_save": ["lm_head"]}, halves(Q) | {"lm_head.weight": drawn(9, 31, 8)})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight \(31, 8\) replaces lm_head\.weight, and the base has shape \(30, 8\)"
    ):
        LoraReader(base, adapter)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True, "bias": "lora_only"}, r"use_dora is True; bias is 'lora_only'.*merge_and_unload"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"r": 0}, "the rank r is 0"),
        ({"r": "4"}, r"not a LoRA configuration.*\$\.r"),
        ({"alpha_pattern": {"(a+)+": 3}}, r"the pattern '\(a\+\)\+' is a regular expression"),
    ],
)
def test_settings_that_are_refused(base: FileReader, tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        LoraReader(base, write(tmp_path / "adapter", settings, halves(Q)))


def test_everything_that_does_not_fit_is_named(base: FileReader, tmp_path: Path) -> None:
    tensors = halves(Q) | halves(V) | halves(GATE)
    tensors["model.layers.0.attn.q_proj.lora_A.weight"] = drawn(1, 4, 8)
    tensors["model.layers.0.attn.q_proj.lora_B.weight"] = drawn(1, 12, 4)
    tensors[f"{V}.lora_B.weight"] = drawn(1, 9, 4)
    tensors["extra"] = drawn(1, 2)
    del tensors[f"{GATE}.lora_B.weight"]
    with pytest.raises(CheckpointError) as caught:
        LoraReader(base, write(tmp_path / "adapter", {}, tensors))
    message = str(caught.value)
    for part in (
        f"changes model.layers.0.attn.q_proj.weight, which the base does not have (nearest: {Q}.weight)",
        f"{V}.lora_B.weight (9, 4) and base_model.model.{V}.lora_A.weight (4, 12) for {V}.weight (8, 12), expected (8, 4) and (4, 12)",
        f"{GATE}.lora_A.weight has no other half",
        "extra is neither a LoRA matrix",
        "Give the base it was trained on",
    ):
        assert part in message


def test_files_that_are_missing(base: FileReader, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        LoraReader(base, tmp_path / "nothing")
    adapter = write(tmp_path / "adapter", {}, halves(Q))
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither adapter_model\.safetensors"):
        LoraReader(base, adapter)


@pytest.mark.parametrize(
    ("text", "named"), [("[]", "holds a list, expected an object"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")]
)
def test_a_config_that_is_none(base: FileReader, tmp_path: Path, text: str, named: str) -> None:
    adapter = write(tmp_path / "adapter", {}, halves(Q))
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=named):
        LoraReader(base, adapter)


def test_a_config_that_is_too_large(base: FileReader, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", {"padding": "x" * 10_000_000}, halves(Q))
    with pytest.raises(CheckpointError, match="expected at most 10000000"):
        LoraReader(base, adapter)
