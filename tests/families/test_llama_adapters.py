"""LoRA adapters of Llama 3.2 Vision as PEFT saves them and as unsloth does, merged while weights are read, beside what PEFT makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import assert_as_exact, opened
from llama_models import PROMPTS, corrected, pixels, their_logits, their_model
from safetensors.torch import load_file, save_file

import flamingo_export
from flamingo_export.sources.choice import CheckpointFolder
from flamingo_reference.checkpoints.families import llama_vision
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from tests.families.test_peft import lora, saved, trained
from tests.families.test_published_llama import write

UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|multi_modal_projector).*?)"
)
"""What unsloth's FastVisionModel asks PEFT for: one expression over vision and language layers."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    theirs = their_model(seed=5).float()
    return write(tmp_path_factory.mktemp("peft") / "llama", theirs), theirs


def assert_merged(files: CheckpointFiles, merged: Any, *, least: int) -> None:
    """Every tensor is that of PEFT's merge, and at least so many of them are not the base's."""
    found, plain = load(files).published, load(CheckpointFiles(path=files.path)).published
    wanted, changed = merged.state_dict(), 0
    for name in found.names():
        theirs = wanted[llama_vision.live_name(name)].numpy()
        np.testing.assert_allclose(found.read(name), theirs, rtol=1e-5, atol=1e-5, err_msg=name)
        changed += not np.array_equal(found.read(name), plain.read(name))
    assert changed >= least


def renamed(adapter: Path, into: Path) -> Path:
    """The same adapter with the names that transformers had before 4.52, which older training wrote."""
    into.mkdir()
    (into / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    front = "base_model.model."
    tensors = load_file(adapter / "adapter_model.safetensors")
    older = {front + llama_vision.plain_name(name.removeprefix(front)): tensor for name, tensor in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, into / "adapter_model.safetensors")
    return into


@pytest.mark.parametrize("older", [False, True], ids=["names of today", "names before 4.52"])
@pytest.mark.parametrize(
    ("targets", "changes", "least"),
    [
        (["q_proj", "v_proj"], {}, 12),
        (["q_proj", "up_proj"], {"use_rslora": True, "rank_pattern": {"up_proj": 2}}, 10),
        (["fc1", "o_proj", "multi_modal_projector"], {}, 15),
        (["k_proj"], {"modules_to_save": ["lm_head", "multi_modal_projector"]}, 9),
        (UNSLOTH, {}, 60),
    ],
    ids=["attention", "ranks", "vision and projector", "whole modules", "unsloth"],
)
def test_merged(base: tuple[Path, Any], tmp_path: Path, targets: Any, changes: dict[str, Any], least: int, older: bool) -> None:
    model = trained(base[1], lora(targets, **changes))
    adapter = saved(model, tmp_path / "adapter")
    if older:
        adapter = renamed(adapter, tmp_path / "older")
    assert_merged(CheckpointFiles(path=base[0], adapters=(adapter,)), model.merge_and_unload(), least=least)


@pytest.mark.slow
def test_a_bundle_of_base_and_adapter(base: tuple[Path, Any], tmp_path: Path) -> None:
    """Logits of what is built are those of transformers' model with the adapter merged in; the projector's columns are permuted behind it."""
    model = trained(base[1], lora(["q_proj", "down_proj", "multi_modal_projector", "fc2"]))
    adapter = saved(model, tmp_path / "adapter")
    out = tmp_path / "adapted.bundle"
    flamingo_export.build(CheckpointFolder(path=base[0], adapters=(adapter,)), out=out, parity="skip")
    merged = model.merge_and_unload()
    tokens, ids = PROMPTS["several images"]
    images = pixels(ids).float()
    with corrected(merged):
        eager = their_logits(merged, tokens, ids, images)
    with corrected(merged.double()):
        exact = their_logits(merged, tokens, ids, images.double())
    with opened(out) as runs:
        assert_as_exact(runs.logits(tokens, images, ids), exact, eager)


def test_an_adapter_of_another_model(base: tuple[Path, Any], tmp_path: Path) -> None:
    adapter = saved(trained(base[1], lora(["q_proj"])), tmp_path / "adapter")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[name.replace("layers.0", "layers.90")] = tensors.pop(name)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.90\.self_attn\.q_proj\.weight, which the base does not have"):
        load(CheckpointFiles(path=base[0], adapters=(adapter,)))
