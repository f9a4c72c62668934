"""Everything is accounted for."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flamingo_reference.checkpoints.accounting import Ignored, NearestName, account, check_tensors
from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.tensors import CheckpointError

EXPECTED = {f"model.layers.{i}.self_attn.{part}_proj.weight": (4, 4) for i in range(12) for part in "qkvo"} | {
    "model.norm.weight": (4,)
}
ROTARY = Ignored(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the config")


def test_what_is_left_out_has_its_reason() -> None:
    found = EXPECTED | {"model.layers.3.self_attn.rotary_emb.inv_freq": (2,)}
    assert check_tensors(EXPECTED, found, where="x", model="m", ignored=[ROTARY]) == {
        "model.layers.3.self_attn.rotary_emb.inv_freq": "computed from the config"
    }


def test_a_pattern_must_match_the_whole_name() -> None:
    found = EXPECTED | {"model.layers.3.self_attn.rotary_emb.inv_freq_2": (2,)}
    with pytest.raises(CheckpointError, match=r"unknown .*inv_freq_2"):
        check_tensors(EXPECTED, found, where="x", model="m", ignored=[ROTARY])


def test_everything_wrong_is_named_at_once() -> None:
    found = EXPECTED | {"model.layers.7.attn.q_proj.weight": (4, 4), "model.norm.weight": (5,), "zzz": (1,)}
    del found["model.layers.7.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        check_tensors(EXPECTED, found, where="folder", model="m")
    assert str(caught.value) == (
        "folder: 4 tensors do not fit model 'm': missing model.layers.7.self_attn.q_proj.weight (4, 4); "
        "model.norm.weight has shape (5,), expected (4,); "
        "unknown model.layers.7.attn.q_proj.weight (4, 4) (nearest: model.layers.7.self_attn.q_proj.weight); unknown zzz (1,)"
    )


def test_the_nearest_name_keeps_its_layer() -> None:
    names = NearestName(EXPECTED)
    assert names.find("layers.11.self_attn.v_proj.weight") == "model.layers.11.self_attn.v_proj.weight"
    assert names.find("model.layers.99.self_attn.o_proj.weights") == "model.layers.0.self_attn.o_proj.weight"
    assert names.find("utterly different") is None


def test_thousands_of_unknown_names_do_not_take_minutes() -> None:
    expected = {f"layers.{i}.{j}.weight": (1,) for i in range(100) for j in range(20)}
    found = {f"blocks.{i}.{j}.weight": (1,) for i in range(100) for j in range(20)}
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="4000 tensors do not fit"):
        check_tensors(expected, found, where="x", model="m")
    assert time.perf_counter() - started < 10


def test_weights_must_be_floats(tmp_path: Path) -> None:
    save_file(
        {"a": np.zeros(2, np.int8), "b": np.zeros(2, np.float32), "c": np.zeros(1, np.int64)}, tmp_path / "model.safetensors"
    )
    reader = open_tensors(tmp_path)
    with pytest.raises(CheckpointError, match=r"a has element type int8; expected one of float64, .*before it was quantised"):
        account({"a": (2,), "b": (2,)}, reader, where="x", model="m", ignored=[Ignored("c", "a buffer")])
    assert account({"b": (2,)}, reader, where="x", model="m", ignored=[Ignored("[ac]", "a buffer")]) == {
        "a": "a buffer",
        "c": "a buffer",
    }
