"""Adapters as PEFT itself writes them, merged while weights are read, beside what PEFT makes of them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from idefics_models import their_config, their_model
from openflamingo_models import Theirs
from peft import LoraConfig, PeftModel, get_peft_model
from published_files import write_openflamingo, write_tokenizer
from safetensors.torch import load_file, save_file

from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from tests.families.test_published_idefics import SPECIAL, WORDS

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder: Path = tmp_path_factory.mktemp("peft") / "idefics"
    theirs = their_model(their_config(vector=True), seed=5).float()
    theirs.save_pretrained(folder)
    write_tokenizer(folder, WORDS, SPECIAL)
    return folder, theirs


def trained(model: Any, config: LoraConfig, seed: int = 0) -> PeftModel:
    """A PEFT model after some steps: everything that training would change has changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stepped(get_peft_model(copy.deepcopy(model), config), seed)


def stepped(found: Any, seed: int = 0) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return found.eval()


def saved(model: PeftModel, folder: Path, **how: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), **how)
    return folder


def lora(targets: list[str], **changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian"} | changes
    return LoraConfig(target_modules=targets, **settings)


def assert_merged(files: CheckpointFiles, merged: Any, *, least: int) -> None:
    """Every tensor is that of PEFT's merge, and at least so many of them are not the base's."""
    found, plain = load(files).published, load(msgspec.structs.replace(files, adapters=())).published
    wanted, changed = merged.state_dict(), 0
    for name in found.names():
        np.testing.assert_allclose(found.read(name), wanted[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
        changed += not np.array_equal(found.read(name), plain.read(name))
    assert changed >= least


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({}, 5),
        ({"init_lora_weights": "orthogonal", "use_rslora": True}, 5),
        (
            {
                "rank_pattern": {"up_proj": 2, "^model.layers.1.self_attn.q_proj": 3},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 64, "mlp.up_proj": 1, "^q_proj": 99},
            },
            5,
        ),
        ({"modules_to_save": ["perceiver_resampler"]}, 30),
        ({"modules_to_save": ["lm_head"]}, 7),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 9),
        ({"targets": ["q_proj", "embed_tokens"]}, 5),
        ({"targets": ["q_proj", "lm_head"]}, 5),
    ],
    ids=lambda value: next(iter(value), "plain") if isinstance(value, dict) else "",
)
def test_idefics(idefics: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], least: int) -> None:
    changes = dict(changes)
    model = trained(idefics[1], lora(changes.pop("targets", ["q_proj", "up_proj"]), **changes))
    adapter = saved(model, tmp_path / "adapter")
    assert_merged(CheckpointFiles(path=idefics[0], adapters=(adapter,)), model.merge_and_unload(), least=least)


def test_an_adapter_that_has_a_name_lies_a_folder_further_down(idefics: tuple[Path, Any], tmp_path: Path) -> None:
    model: Any = get_peft_model(copy.deepcopy(idefics[1]), lora(["q_proj"]), adapter_name="birds")
    saved(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter has no adapter_config\.json, but .*birds has one\. Name the adapter"):
        load(CheckpointFiles(path=idefics[0], adapters=(tmp_path / "adapter",)))
    found = load(CheckpointFiles(path=idefics[0], adapters=(tmp_path / "adapter" / "birds",)))
    assert found.published.names()


def test_matrices_that_an_adapter_calls_transposed(idefics: tuple[Path, Any], tmp_path: Path) -> None:
    """PEFT sets fan_in_fan_out to false where it meets a linear layer, and these matrices are square: a transposed update fits too."""
    adapter = saved(trained(idefics[1], lora(["k_proj", "o_proj"])), tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": True}))
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        model = PeftModel.from_pretrained(copy.deepcopy(idefics[1]), adapter)
    assert_merged(CheckpointFiles(path=idefics[0], adapters=(adapter,)), model.merge_and_unload(), least=5)


@pytest.mark.parametrize("rows", ["as the base", "changed"])
def test_copies_that_lie_beside_an_update_take_the_bases_place(idefics: tuple[Path, Any], tmp_path: Path, rows: str) -> None:
    """PEFT saves an embedding with LoRA whole, as `base_layer`, and loads it again: what was trained there counts."""
    model = trained(idefics[1], lora(["embed_tokens"]))
    if rows == "changed":
        with torch.no_grad():
            base: Any = model.base_model
            base.model.model.embed_tokens.base_layer.weight[7] += 1.0
    adapter = saved(model, tmp_path / "adapter", save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(copy.deepcopy(idefics[1]), adapter)
    assert_merged(CheckpointFiles(path=idefics[0], adapters=(adapter,)), loaded.merge_and_unload(), least=1)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_changed_their_base(idefics: tuple[Path, Any], tmp_path: Path, start: str) -> None:
    """As they were trained they belong to other weights; converted by PEFT they are updates of the base."""
    first: Any = get_peft_model(copy.deepcopy(idefics[1]), lora(["q_proj", "up_proj"], init_lora_weights=start))
    first.peft_config["default"].init_lora_weights = True  # what conversion needs: where training began
    beginning = saved(first, tmp_path / "beginning")
    first.peft_config["default"].init_lora_weights = start
    model = stepped(first)
    whole = saved(model, tmp_path / "whole")
    assert json.loads((whole / "adapter_config.json").read_text())["init_lora_weights"] == start
    with pytest.raises(CheckpointError, match=f"init_lora_weights is '{start}'. Such an adapter changed the base's weights"):
        load(CheckpointFiles(path=idefics[0], adapters=(whole,)))
    converted = saved(model, tmp_path / "converted", path_initial_model_for_weight_conversion=str(beginning))
    assert_merged(CheckpointFiles(path=idefics[0], adapters=(converted,)), model.merge_and_unload(), least=5)


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "something new", ["pissa"]])
def test_beginnings_that_are_not_the_base(idefics: tuple[Path, Any], tmp_path: Path, start: Any) -> None:
    adapter = saved(trained(idefics[1], lora(["q_proj"])), tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": start}))
    with pytest.raises(CheckpointError, match=r"init_lora_weights is .* Convert it with PEFT"):
        load(CheckpointFiles(path=idefics[0], adapters=(adapter,)))


class Within(torch.nn.Module):
    """A module by a dotted name, as OpenFlamingo keeps the language model's: what PEFT names in the adapter."""

    def __init__(self, names: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in names.items():
            place: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            place.add_module(last, linear)


@pytest.mark.parametrize(
    "pattern",
    [
        "blocks.0.decoder_layer.attn.Wqkv",
        "^lang_encoder.transformer.blocks.0.decoder_layer.attn.Wqkv$",
        "lang_encoder.transformer.blocks.0.decoder_layer.attn.Wqkv",
        r"decoder_layer\.attn\.Wqkv",
        "blocks.0.attn.Wqkv",
        "^transformer.blocks.0.decoder_layer.attn.Wqkv",
    ],
)
def test_patterns_are_matched_by_the_names_of_the_model_that_was_trained(tmp_path: Path, pattern: str) -> None:
    """OpenFlamingo's names, not the published ones; the last two patterns match nothing, in PEFT as here."""
    source = write_openflamingo(tmp_path / "m", Theirs("mpt"))
    plain = load(source).published
    name = "transformer.blocks.0.attn.Wqkv.weight"
    module = "lang_encoder.transformer.blocks.0.decoder_layer.attn.Wqkv"
    base = Within({module: torch.from_numpy(plain.read(name).copy()), "lang_encoder.other": torch.ones(2, 2)})
    model = trained(base, lora(["Wqkv"], alpha_pattern={pattern: 64}))
    adapter = saved(model, tmp_path / "adapter")
    found = load(msgspec.structs.replace(source, adapters=(adapter,)))
    wanted = model.merge_and_unload().get_submodule(module).weight.detach().numpy()
    np.testing.assert_allclose(found.published.read(name), wanted, rtol=1e-5, atol=1e-5)
    matched = pattern.startswith(("blocks.0.decoder", "^lang", "lang", "decoder"))
    said = [note for note in found.notes if "matches no module that the adapter changes" in note]
    assert bool(said) != matched
    assert all(repr(pattern) in note for note in said)


@pytest.mark.parametrize("name", ["lm_head", "embed_out"])
@pytest.mark.parametrize("whole", [False, True], ids=["LoRA", "trained whole"])
def test_neox_output_by_the_names_that_it_has_in_memory_and_in_files(tmp_path: Path, name: str, whole: bool) -> None:
    """transformers 5 calls it lm_head, and writes embed_out; transformers 4 had the latter name for both."""
    theirs = Theirs("gpt_neox, parallel")
    source = write_openflamingo(tmp_path / "m", theirs)
    config = lora(["query_key_value"], modules_to_save=["lm_head"]) if whole else lora(["query_key_value", "lm_head"])
    model = trained(theirs.lm.float(), config)
    adapter = saved(model, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({each.replace("lm_head", name): tensor for each, tensor in load_file(path).items()}, path)
    settings = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(settings.replace("lm_head", name))
    found = load(msgspec.structs.replace(source, adapters=(adapter,))).published.read("embed_out.weight")
    wanted = model.merge_and_unload().lm_head.weight.detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(wanted - load(source).published.read("embed_out.weight")).max() > 0.01


TIED: dict[str, Callable[[], LoraConfig]] = {
    "LoRA on the embedding": lambda: lora(["wte", "Wqkv"]),
    "LoRA on the output": lambda: lora(["lm_head", "Wqkv"]),
    "embedding trained whole": lambda: lora(["Wqkv"], modules_to_save=["wte"]),
    "output trained whole": lambda: lora(["Wqkv"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", TIED)
def test_an_embedding_that_is_the_output_too(tmp_path: Path, kind: str) -> None:
    """Training changed one of the two and left the other as it was: they are two matrices from then on."""
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path / "m", theirs)
    assert load(source).config.language_model.tied_head
    model = trained(copy.deepcopy(theirs.lm).float(), TIED[kind]())
    adapter = saved(model, tmp_path / "adapter", save_embedding_layers=False)
    found = load(msgspec.structs.replace(source, adapters=(adapter,)))
    assert not found.config.language_model.tied_head
    assert any("one matrix" in note for note in found.notes)
    embedding, head = (
        torch.from_numpy(np.array(found.reader.read(f"language_model.{name}.weight"), np.float32))
        for name in ("embedding", "head")
    )
    rows, width = embedding.shape
    with torch.no_grad():
        wanted = model.get_input_embeddings()(torch.arange(rows))
        of_head = model.get_output_embeddings()(torch.eye(width)).T[:rows]
    torch.testing.assert_close(embedding, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head, of_head, rtol=1e-5, atol=1e-5)
    assert (embedding - head).abs().max() > 0.01


def test_an_adapter_that_leaves_a_tied_embedding_alone(tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path / "m", Theirs("mpt"))
    adapter = saved(trained(Theirs("mpt").lm.float(), lora(["Wqkv"])), tmp_path / "adapter")
    found = load(msgspec.structs.replace(source, adapters=(adapter,)))
    assert found.config.language_model.tied_head
    assert found.config == load(source).config


def test_an_embedding_and_an_output_trained_as_one(tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path / "m", Theirs("mpt"))
    adapter = saved(trained(Theirs("mpt").lm.float(), lora(["wte"])), tmp_path / "adapter", save_embedding_layers=False)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"ensure_weight_tying": True}))
    with pytest.raises(CheckpointError, match="ensure_weight_tying is set, so embedding and output were trained as one"):
        load(msgspec.structs.replace(source, adapters=(adapter,)))
