"""Which family a checkpoint is of, and what is said where it is of none or its files contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import TINY, tiny_model
from tokenizers import Tokenizer, models

from flamingo_reference.checkpoints.accounting import Ignored
from flamingo_reference.checkpoints.converted import Components, Converted
from flamingo_reference.checkpoints.families import idefics, llama_vision, native
from flamingo_reference.checkpoints.families.known import FAMILIES, Family
from flamingo_reference.checkpoints.families.recognition import recognise
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from flamingo_reference.config import ConfigError
from flamingo_reference.input_format import OPENFLAMINGO
from flamingo_reference.model import numpy_from_torch
from flamingo_reference.names import expected_tensors

NAMES = {
    "native": ["resampler.latents", "language_model.embedding.weight", "cross_attention.0.q_proj.weight"],
    "idefics": [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.gated_cross_attn_layers.0.alpha_dense",
        "model.perceiver_resampler.latents",
        "model.vision_model.embeddings.class_embedding",
    ],
    "llama_vision": [
        "language_model.model.layers.3.cross_attn.q_proj.weight",
        "vision_model.gated_positional_embedding.gate",
        "multi_modal_projector.weight",
    ],
    "llama_vision_text": ["model.layers.3.cross_attn.q_proj.weight", "model.embed_tokens.weight"],
    "otter": [
        "perceiver.latents",
        "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.feed_forward.0.weight",
        "vision_encoder.vision_model.embeddings.class_embedding",
    ],
    "openflamingo_folder": [
        "perceiver.latents",
        "lang_encoder.model.layers.3.gated_cross_attn_layer.feed_forward.0.weight",
        "vision_encoder.vision_model.embeddings.class_embedding",
    ],
    "openflamingo": ["perceiver.latents", "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn_gate"],
    "llama": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
    "gpt_neox": ["gpt_neox.layers.0.attention.dense.weight"],
    "mpt": ["transformer.blocks.0.attn.Wqkv.weight"],
    "clip": ["visual.class_embedding", "logit_scale"],
}
MODEL_TYPES = {
    "idefics": "idefics",
    "llama_vision": "mllama",
    "llama_vision_text": "mllama_text_model",
    "otter": "otter",
    "openflamingo_folder": "flamingo",
    "llama": "llama",
    "gpt_neox": "gpt_neox",
    "mpt": "mpt",
    "clip": "clip_vision_model",
}


def write(folder: Path, family: str | None, settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    if family is not None:
        save_file({name: np.zeros(2, np.float32) for name in NAMES[family]}, folder / "model.safetensors")
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("family", [family for family in NAMES if family != "openflamingo_folder"])  # Otter's names
def test_by_the_names_of_tensors_alone(tmp_path: Path, family: str) -> None:
    found = recognise(write(tmp_path / "c", family))
    assert found.family.name == family
    assert found.evidence
    assert set(found.evidence) <= set(NAMES[family])
    torch.save({name: torch.zeros(2) for name in NAMES[family]}, tmp_path / "weights.pt")
    assert recognise(tmp_path / "weights.pt").family.name == family


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_by_config_json(tmp_path: Path, family: str) -> None:
    found = recognise(write(tmp_path / "c", family, {"model_type": MODEL_TYPES[family]}))
    assert found.family.name == family
    assert found.evidence[0] == f"model_type {MODEL_TYPES[family]!r}"


def test_every_family_is_tried() -> None:
    assert list(NAMES) == [family.name for family in FAMILIES]


def test_a_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "mpt", {"model_type": "idefics"})
    with pytest.raises(
        CheckpointError, match=r"says model_type 'idefics', but the tensors look like an MPT language model, and none is called"
    ):
        recognise(folder)


def test_an_unknown_model_type_lists_what_was_looked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "llama", {"model_type": "llava"})
    with pytest.raises(CheckpointError, match="says model_type 'llava', which is not known") as caught:
        recognise(folder)
    for family in FAMILIES:
        assert family.title in str(caught.value)


def test_unknown_tensors_list_what_was_looked_for(tmp_path: Path) -> None:
    torch.save({f"encoder.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"of no known family: there is no config.json, and its tensors are encoder\.0, .* and 5 more"
    ) as caught:
        recognise(tmp_path / "x.pt")
    assert "perceiver" in str(caught.value)
    assert "pytorch_model.bin" in str(caught.value)


def test_a_mark_that_is_missing_is_left_to_accounting(tmp_path: Path) -> None:
    """An OpenFlamingo without latents is one that lacks them, not something unknown."""
    torch.save({NAMES["openflamingo"][1]: torch.zeros(1), "perceiver.latent": torch.zeros(2, 2)}, tmp_path / "checkpoint.pt")
    assert recognise(tmp_path / "checkpoint.pt").family.name == "openflamingo"
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "x.pt")  # which many have
    with pytest.raises(CheckpointError, match="of no known family"):
        recognise(tmp_path / "x.pt")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        recognise(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is empty\. Looked for"):
        recognise(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is IDEFICS v1 by its config\.json, but its tensors cannot be read: .* has neither"
    ):
        recognise(write(tmp_path / "c", None, {"model_type": "idefics"}))


@pytest.mark.parametrize("value", [3, None, ["idefics"], {}, "x" * 10_000])
def test_a_model_type_of_another_kind(tmp_path: Path, value: Any) -> None:
    folder = write(tmp_path / "c", "llama", {"model_type": value})
    if value is None:
        assert recognise(folder).family.name == "llama"
        return
    with pytest.raises(CheckpointError, match="is not known") as caught:
        recognise(folder)
    assert len(str(caught.value)) < 4000


def test_a_file_does_not_take_what_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "c", None, {"model_type": "idefics"})
    torch.save({name: torch.zeros(2) for name in NAMES["clip"]}, tmp_path / "c" / "ViT-L-14.pt")
    assert recognise(tmp_path / "c" / "ViT-L-14.pt").family.name == "clip"


# Loading.


def test_components_that_are_missing_or_too_many(tmp_path: Path) -> None:
    bridge, lm, clip = (write(tmp_path / name, name) for name in ("openflamingo", "mpt", "clip"))
    with pytest.raises(
        CheckpointError,
        match=r"OpenFlamingo, which leaves its language model and vision encoder to other files\. Add --lm FOLDER --vision",
    ):
        load(CheckpointFiles(path=bridge))
    families = [msgspec.structs.replace(family, convert=convert_toy) for family in FAMILIES]
    with pytest.raises(CheckpointError, match=r"--vision .*mpt is an MPT language model, expected a vision encoder"):
        load(CheckpointFiles(path=bridge, language_model=lm, vision_encoder=lm), families)
    with pytest.raises(
        CheckpointError, match=r"is an MPT language model .*, a component of a model\. .* --checkpoint MODEL --lm"
    ):
        load(CheckpointFiles(path=lm))
    folder = tmp_path / "native"
    save_native(folder)
    with pytest.raises(CheckpointError, match=r"holds its language model itself\. Leave out --lm"):
        load(CheckpointFiles(path=folder, language_model=lm))
    assert clip.is_dir()


def save_native(folder: Path) -> None:
    native.save_native(folder, TINY, ((name, numpy_from_torch(t.float())) for name, t in tiny_model().state_dict().items()))


def test_our_own_format(tmp_path: Path) -> None:
    save_native(tmp_path / "c")
    found = load(CheckpointFiles(path=tmp_path / "c"))
    assert (found.family.name, found.config, found.ignored, found.tokenizer) == ("native", TINY, {}, None)
    assert set(found.reader.names()) == set(expected_tensors(TINY))
    np.testing.assert_array_equal(
        found.reader.read("resampler.latents"), tiny_model().state_dict()["resampler.latents"].float().numpy()
    )


def test_our_own_format_with_an_adapter(tmp_path: Path) -> None:
    save_native(tmp_path / "c")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    module, (out, into) = (
        "language_model.layers.1.q_proj",
        expected_tensors(TINY)["language_model.layers.1.q_proj.weight"],
    )
    down, up = np.ones((2, into), np.float32), np.ones((out, 2), np.float32)
    save_file(
        {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up},
        adapter / "adapter_model.safetensors",
    )
    plain, merged = (load(CheckpointFiles(path=tmp_path / "c", adapters=adapters)) for adapters in ((), (adapter,)))
    difference = merged.reader.read(f"{module}.weight") - plain.reader.read(f"{module}.weight")
    np.testing.assert_allclose(difference, 4.0, atol=1e-5)  # 4 / 2 * (1 * 1 + 1 * 1)
    assert {adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")} < set(merged.files)
    twice = load(CheckpointFiles(path=tmp_path / "c", adapters=(adapter, adapter)))
    np.testing.assert_allclose(twice.reader.read(f"{module}.weight") - plain.reader.read(f"{module}.weight"), 8.0, atol=1e-5)


# A family of another's names, whose components lie in three files.


class Renamed(msgspec.Struct, frozen=True):
    sources: dict[str, tuple[int, ...]]

    def make(self, arrays: Any) -> Any:
        return arrays[0]


def convert_toy(components: Components) -> Converted:
    expected = expected_tensors(TINY)
    places = {
        "language_model": "transformer.blocks.",
        "vision_encoder": "visual.",
        "resampler": "perceiver.",
        "cross_attention": "lang_encoder.gated_cross_attn_layers.",
    }
    recipes = {name: Renamed({places[name.split(".")[0]] + name.split(".", 1)[1]: shape}) for name, shape in expected.items()}
    assert components.language_model is not None
    assert components.token_ids == {"<image>": 3}
    return Converted(
        config=TINY,
        expected=expected,
        recipes=recipes,
        ignored=(Ignored("logit_scale", "CLIP's text side"),),
        inputs=OPENFLAMINGO,
    )


TOY = Family(
    name="toy",
    title="a toy",
    marks=(r"perceiver\.latents",),
    needs=("language_model", "vision_encoder"),
    convert=convert_toy,
)
TOY_LM = Family(
    name="toy_lm", title="a toy's LM", component="language_model", marks=(r"transformer\.blocks\.embedding\.weight",)
)
TOY_VISION = Family(name="toy_vision", title="a toy's eyes", component="vision_encoder", marks=(r"visual\..+",))


@pytest.fixture
def toy(tmp_path: Path) -> CheckpointFiles:
    expected = expected_tensors(TINY)
    arrays = {
        name: np.random.default_rng(i).standard_normal(shape).astype(np.float32)
        for i, (name, shape) in enumerate(expected.items())
    }
    recipes = convert_toy(Components(model=None, language_model=1, token_ids={"<image>": 3})).recipes  # type: ignore[arg-type]
    assert recipes is not None
    files: dict[str, dict[str, Any]] = {"bridge": {}, "lm": {}, "vision": {"logit_scale": np.zeros((), np.float32)}}
    for name, array in arrays.items():
        place = {"language_model": "lm", "vision_encoder": "vision"}.get(name.split(".")[0], "bridge")
        files[place][next(iter(recipes[name].sources))] = array
    for place, tensors in files.items():
        (tmp_path / place).mkdir()
        save_file(tensors, tmp_path / place / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(tmp_path / "lm" / "tokenizer.json"))
    return CheckpointFiles(path=tmp_path / "bridge", language_model=tmp_path / "lm", vision_encoder=tmp_path / "vision")


def test_parts_become_one_model(toy: CheckpointFiles) -> None:
    found = load(toy, [TOY, TOY_LM, TOY_VISION])
    assert found.ignored == {"logit_scale": "CLIP's text side"}
    assert found.inputs == OPENFLAMINGO
    assert toy.language_model is not None
    assert found.tokenizer == toy.language_model / "tokenizer.json"
    assert len(found.files) == 3
    expected = expected_tensors(TINY)
    assert found.reader.names() == list(expected)
    for i, (name, shape) in enumerate(expected.items()):
        assert found.reader.shape(name) == shape
        np.testing.assert_array_equal(
            found.reader.read(name), np.random.default_rng(i).standard_normal(shape).astype(np.float32)
        )


def test_a_tensor_in_two_components(toy: CheckpointFiles) -> None:
    assert toy.vision_encoder is not None
    path = toy.vision_encoder / "model.safetensors"
    save_file(load_file(path) | {"perceiver.norm.weight": np.zeros(2, np.float32)}, path)
    with pytest.raises(
        CheckpointError, match=r"held by more than one component: perceiver\.norm\.weight \(in model, vision encoder\)"
    ):
        load(toy, [TOY, TOY_LM, TOY_VISION])


def test_faults_are_named_by_the_files_names(toy: CheckpointFiles) -> None:
    path = toy.path / "model.safetensors"
    tensors = load_file(path)
    tensors["perceiver.layers.0.q_proj.weigth"] = tensors.pop("perceiver.layers.0.q_proj.weight")
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError,
        match=r"missing perceiver\.layers\.0\.q_proj\.weight .*\(nearest: perceiver\.layers\.0\.q_proj\.weight\)",
    ):
        load(toy, [TOY, TOY_LM, TOY_VISION])


def test_an_adapter_is_merged_into_the_part_it_was_trained_on(toy: CheckpointFiles, tmp_path: Path) -> None:
    families = [TOY, TOY_LM, TOY_VISION]
    ours = "language_model.layers.1.q_proj.weight"
    out, into = expected_tensors(TINY)[ours]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3}))

    def write_halves(module: str) -> None:
        halves = {"A": np.ones((1, into), np.float32), "B": np.ones((out, 1), np.float32)}
        tensors = {f"base_model.model.{module}.lora_{half}.weight": array for half, array in halves.items()}
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")

    write_halves("transformer.blocks.layers.1.q_proj")
    adapted = msgspec.structs.replace(toy, adapters=(tmp_path / "adapter",))
    difference = load(adapted, families).reader.read(ours) - load(toy, families).reader.read(ours)
    np.testing.assert_allclose(difference, 3.0, atol=1e-5)
    write_halves("transformer.blocks.layers.99.q_proj")
    with pytest.raises(CheckpointError, match=r"which the base does not have \(nearest: transformer\.blocks\.layers\."):
        load(adapted, families)


def test_weights_that_zero_stage_3_left_empty(tmp_path: Path) -> None:
    """Saved without gathering the parameters: matrices are empty, small ones (norms) are whole."""
    names = ["lang_encoder.transformer.wte.weight", *NAMES["openflamingo"]]
    torch.save({name: torch.zeros(0 if name.endswith("weight") else 3) for name in names}, tmp_path / "checkpoint.pt")
    with pytest.raises(
        CheckpointError, match=r"holds 1 empty tensors of 3 \(the first is lang_encoder\..*wte\.weight\).*zero_to_fp32\.py"
    ):
        recognise(tmp_path / "checkpoint.pt")
    tensors = {name: torch.zeros(3) for name in names} | {"layer._extra_state": torch.zeros(0, dtype=torch.uint8)}  # no weight
    torch.save(tensors, tmp_path / "checkpoint.pt")
    assert recognise(tmp_path / "checkpoint.pt").family.name == "openflamingo"


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_ids_that_are_null(name: str) -> None:
    for config_from, raw, where in (
        (idefics.config_from, {"use_resampler": True, name: None}, "config.json"),
        (llama_vision.config_from, {"text_config": {name: None}, "vision_config": {}}, "config.json, text_config"),
    ):
        with pytest.raises(
            ConfigError, match=f"^{where}: {name} is null, so that .* (begins|ends) a text.*that the tokenizer has"
        ):
            config_from(raw)
