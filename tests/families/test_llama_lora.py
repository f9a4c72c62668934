"""Adapters of Llama 3.2 Vision as PEFT saves them, and as unsloth's users get them, beside PEFT's own merge."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_models import our_model, pixels, their_inputs, their_logits, their_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from flamingo_reference.checkpoints.families import llama_vision
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles, load

UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch_embed|language|text).*?"
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2).*?)"
)
"""Of the kind by which unsloth names all linear modules of vision and language model: a regular expression over module names."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("lora") / "llama"
    theirs = their_model(seed=8).float()
    theirs.save_pretrained(folder)
    return folder, theirs


def trained(model: Any, targets: Any, **changes: Any) -> PeftModel:
    """A PEFT model after some steps: everything that training would change has changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "init_lora_weights": "gaussian"} | changes
        config = LoraConfig(target_modules=targets, **settings)
        found = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return found.eval()


def saved(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return folder


def assert_merged(base: Path, adapter: Path, merged: Any, *, least: int) -> None:
    found = load(CheckpointFiles(path=base, adapters=(adapter,))).published
    plain = load(CheckpointFiles(path=base)).published
    wanted = {llama_vision.plain_name(name): tensor for name, tensor in merged.state_dict().items()}
    changed = 0
    for name in found.names():
        np.testing.assert_allclose(found.read(name), wanted[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
        changed += not np.array_equal(found.read(name), plain.read(name))
    assert changed >= least


CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "attention of the language model": (["q_proj", "v_proj"], {}, 12),
    "all that unsloth names": (UNSLOTH, {}, 60),
    "cross-attention and its feed-forward": (r".*layers\.(1|4)\.(cross_attn\.(q|k|v|o)_proj|mlp\.\w+_proj)", {}, 14),
    "projector and embedding saved whole": (["q_proj"], {"modules_to_save": ["multi_modal_projector", "embed_tokens"]}, 9),
    "head": (["lm_head", "down_proj"], {"use_rslora": True}, 7),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_merged_as_by_peft(llama: tuple[Path, Any], tmp_path: Path, case: str) -> None:
    targets, changes, least = CASES[case]
    model = trained(llama[1], targets, **changes)
    assert_merged(llama[0], saved(model, tmp_path / "adapter"), model.merge_and_unload(), least=least)


def test_adapters_by_the_names_of_earlier_transformers(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """Before 4.52 the live model had the published names, so adapters of that time have them too."""
    model = trained(llama[1], UNSLOTH)
    adapter = saved(model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model."
    renamed = {prefix + llama_vision.plain_name(name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, adapter / "adapter_model.safetensors")
    assert_merged(llama[0], adapter, model.merge_and_unload(), least=60)


def test_what_unsloth_writes_beside_an_adapter_is_no_hindrance(llama: tuple[Path, Any], tmp_path: Path) -> None:
    model = trained(llama[1], UNSLOTH)
    adapter = saved(model, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings |= {
        "auto_mapping": {"base_model_class": "MllamaForConditionalGeneration", "parent_library": "transformers"},
        "base_model_name_or_path": "unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit",
        "inference_mode": True,
        "task_type": None,
        "lora_dropout": 0,
        "unsloth_fixed": True,
    }
    path.write_text(json.dumps(settings))
    assert_merged(llama[0], adapter, model.merge_and_unload(), least=60)


def test_the_model_with_its_adapter_computes_what_pefts_merge_does(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """From files to logits: the projector's columns and the tiles' embeddings are put in our order after the merge."""
    model = trained(llama[1], UNSLOTH, modules_to_save=["multi_modal_projector"])
    adapter = saved(model, tmp_path / "adapter")
    merged = model.merge_and_unload()
    ours = our_model(merged).state_dict()
    found = load(CheckpointFiles(path=llama[0], adapters=(adapter,))).reader
    for name in found.names():
        np.testing.assert_allclose(found.read(name), ours[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
    tokens, images = [1, 70, 20, 21], [6]
    shown = pixels(images, dtype=torch.float32)
    assert "pixel_values" in their_inputs(tokens, images, shown)
    difference = their_logits(merged, tokens, images, shown) - their_logits(llama[1], tokens, images, shown)
    assert float(difference.abs().max()) > 0.1  # the adapter says something


def test_an_adapter_of_another_model_is_refused(llama: tuple[Path, Any], tmp_path: Path) -> None:
    model = trained(llama[1], ["q_proj"])
    adapter = saved(model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = {name.replace("layers.0.self_attn", "layers.99.self_attn"): tensor for name, tensor in tensors.items()}
    save_file(moved, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.99\.self_attn\.q_proj\.weight, which the base does not have"):
        load(CheckpointFiles(path=llama[0], adapters=(adapter,)))
