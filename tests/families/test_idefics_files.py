"""IDEFICS' files as they are found: the old flat config.json, a tied output under both names, generation_config.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import opened
from idefics_models import (
    FAKE,
    IMAGE,
    PROMPTS,
    generated,
    image_attention_mask,
    pixels,
    published,
    their_config,
    their_logits,
    their_model,
)
from published_files import write_tokenizer
from safetensors.numpy import load_file, save_file

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.cli import main
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from flamingo_reference.phi import phi_from_tokens
from tests.families.test_published_idefics import SPECIAL, WORDS


def write(folder: Path, *, tied: bool = False) -> tuple[Path, Any]:
    theirs = their_model(their_config(tied=tied), seed=5).float()
    theirs.save_pretrained(folder)
    write_tokenizer(folder, WORDS, SPECIAL)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder, theirs


# The form of config.json before transformers took the model in.


def flat(folder: Path, **changes: Any) -> dict[str, Any]:
    raw = published(their_config())
    vision, perceiver = raw.pop("vision_config"), raw.pop("perceiver_config")
    names = ("image_size", "patch_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    raw |= {f"vision_{name}": vision[name] for name in names} | {"vision_embed_dim": vision["embed_dim"]}
    raw |= {name: value for name, value in perceiver.items() if name.startswith(("resampler_", "qk_"))}
    raw |= {"vision_model_name": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"} | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value != "left out"}))
    return raw


def test_the_old_flat_config(tmp_path: Path) -> None:
    folder, theirs = write(tmp_path / "idefics")
    wanted = load(CheckpointFiles(path=folder)).config
    flat(folder)
    assert load(CheckpointFiles(path=folder)).config == wanted
    bundle = flamingo_export.build(folder, out=tmp_path / "b.bundle", parity="skip").path
    tokens, images = PROMPTS["one image"], pixels(1, seed=1).float()
    with opened(bundle) as runs:
        found = runs.logits(tokens, images[0])
    torch.testing.assert_close(torch.from_numpy(found), their_logits(theirs, tokens, images), rtol=0, atol=1e-3)


def test_an_old_flat_config_that_lacks_what_no_tensor_tells(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "idefics")
    flat(folder, vision_num_attention_heads="left out", resampler_n_heads="left out")
    with pytest.raises(
        CheckpointError, match=r"old flat form .* lacks vision_num_attention_heads, resampler_n_heads\. Fetch today's"
    ):
        load(CheckpointFiles(path=folder))


# A tied output.


@pytest.mark.parametrize("second", [False, True])
def test_a_tied_output_under_both_names(tmp_path: Path, second: bool) -> None:
    folder, _ = write(tmp_path / "idefics", tied=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    if second:
        for head, embedding in (
            ("lm_head.weight", "model.embed_tokens.weight"),
            ("lm_head.additional_fc.weight", "model.embed_tokens.additional_embedding.weight"),
        ):
            tensors[head] = tensors[embedding].copy()
        save_file(tensors, path)
    found = load(CheckpointFiles(path=folder))
    assert found.config.language_model.tied_head
    embedding_rows = np.concatenate(
        [tensors["model.embed_tokens.weight"], tensors["model.embed_tokens.additional_embedding.weight"]]
    )
    np.testing.assert_array_equal(found.reader.read("language_model.embedding.weight"), embedding_rows)
    assert len([name for name in found.ignored if name.startswith("lm_head")]) == (2 if second else 0)


@pytest.mark.parametrize(
    ("eos", "instruct", "wanted"),
    [(2, False, [2]), ([2, 9], False, [2, 9]), ([2, 60], True, [60, 2]), ([9, 2], False, [9, 2]), (2, True, [60])],
)
def test_several_end_tokens_of_config_json(tmp_path: Path, eos: Any, instruct: bool, wanted: list[int]) -> None:
    """As transformers goes by them where there is no generation_config.json."""
    from transformers import GenerationConfig, IdeficsConfig

    folder, _ = write(tmp_path / "idefics")
    raw = json.loads((folder / "config.json").read_text()) | {"eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(raw))
    if instruct:
        write_tokenizer(folder, [*WORDS[:60], "<end_of_utterance>", "<image>"], [*SPECIAL[:3], "<end_of_utterance>", "<image>"])
    found = load(CheckpointFiles(path=folder)).config.tokens
    assert list(found.stops) == wanted
    theirs = GenerationConfig.from_model_config(IdeficsConfig.from_dict(raw)).eos_token_id
    assert set(found.stops) >= (set(theirs) if isinstance(theirs, list) else set())


@pytest.mark.parametrize("eos", [9, [9, 2], [2, 9]])
def test_images_are_seen_until_the_tokenizers_end_of_a_text(tmp_path: Path, eos: Any) -> None:
    """transformers' processor goes by the tokenizer, whatever config.json says: many who tune the model write the end of a turn there."""
    folder, _ = write(tmp_path / "idefics")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": eos}))
    tokens = load(CheckpointFiles(path=folder)).config.tokens
    prompt = [1, FAKE, IMAGE, FAKE, 20, 9, 21, 2, 22, 9, FAKE, IMAGE, FAKE, 9, 23]
    phi = phi_from_tokens(np.array([prompt]), tokens.image, tokens.reset)[0]
    mask = image_attention_mask(prompt, 2)[0].numpy()
    np.testing.assert_array_equal(phi, (mask * np.array([1, 2])).sum(-1))
    assert phi.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 2]


def test_a_config_without_a_padding_token(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "idefics")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"pad_token_id": None}))
    assert load(CheckpointFiles(path=folder)).config.tokens.pad == 2


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_a_kind_of_rotary_positions_by_both_of_its_names(tmp_path: Path, name: str) -> None:
    """transformers takes both, so either changes its numbers."""
    from transformers import IdeficsConfig

    folder, _ = write(tmp_path / "idefics")
    rope = {name: "linear", "factor": 2.0, "rope_theta": 10000.0}
    raw = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope}
    theirs = IdeficsConfig.from_dict(copy.deepcopy(raw)).rope_parameters
    assert theirs is not None
    assert theirs["rope_type"] == "linear"
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=f"rope_parameters: {name} is 'linear', which is not supported"):
        load(CheckpointFiles(path=folder))


def test_an_adapter_beside_the_weights_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """transformers would load it with them."""
    from peft import LoraConfig, get_peft_model

    folder, theirs = write(tmp_path / "idefics")
    assert not load(CheckpointFiles(path=folder)).notes
    get_peft_model(copy.deepcopy(theirs), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    (note,) = load(CheckpointFiles(path=folder)).notes
    assert "holds an adapter beside the weights (adapter_config.json), which is not merged; --lora" in note
    assert not load(CheckpointFiles(path=folder, adapters=(folder,))).notes


def test_weights_in_torchs_format_beside_an_adapter_in_safetensors(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder, theirs = write(tmp_path / "idefics")
    plain = load(CheckpointFiles(path=folder)).reader
    wanted = {name: np.array(plain.read(name)) for name in plain.names()}
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    get_peft_model(copy.deepcopy(theirs), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    assert (folder / "adapter_model.safetensors").is_file()
    found = load(CheckpointFiles(path=folder))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found.reader.read(name), array)


def test_an_adapter_in_place_of_a_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    _, theirs = write(tmp_path / "idefics")
    get_peft_model(copy.deepcopy(theirs), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"adapter holds an adapter, .* Give both: --checkpoint MODEL --lora .*adapter"):
        load(CheckpointFiles(path=tmp_path / "adapter"))


# generation_config.json.


def says(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_ends_and_bans_of_generation_config_are_applied(tmp_path: Path) -> None:
    """Beside transformers' search with several end tokens, the banned ones taken out of its logits."""
    folder, theirs = write(tmp_path / "idefics")
    tokens, images = PROMPTS["one image"], pixels(1, seed=1)
    exact = copy.deepcopy(theirs).double()
    free, _ = generated(exact, tokens, images, beams=1, new_tokens=6)
    banned, end = free[0][0], None
    inputs = {
        "input_ids": torch.tensor([tokens]),
        "pixel_values": images,
        "image_attention_mask": image_attention_mask(tokens, 1),
    }

    def search(beams: int, ends: list[int]) -> list[list[int]]:
        never = torch.tensor([IMAGE, FAKE, banned])
        hook = exact.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, never, -torch.inf))
        out = exact.generate(
            **inputs, attention_mask=torch.ones(1, len(tokens), dtype=torch.int64), num_beams=beams, num_return_sequences=beams,
            do_sample=False, length_penalty=0.0, early_stopping=False, max_new_tokens=6, eos_token_id=ends, pad_token_id=0,
        )  # fmt: skip
        hook.remove()
        texts = [sequence[len(tokens) :].tolist() for sequence in out]
        places = [next((place for place, token in enumerate(text) if token in ends), len(text)) for text in texts]
        return [text[: place + 1] for text, place in zip(texts, places, strict=True)]

    end = search(1, [2])[0][2]
    says(
        folder, eos_token_id=[2, end], bad_words_ids=[[banned], [IMAGE], [FAKE], [5, 6]], suppress_tokens=[banned], temperature=0.2,
        num_beams=4, do_sample=True, pad_token_id=0, transformers_version="4.33", repetition_penalty=None,
    )  # fmt: skip
    found = load(CheckpointFiles(path=folder))
    assert found.config.tokens.stops == (2, end)
    assert found.config.tokens.never == (IMAGE, FAKE, banned)
    not_applied = {"bad_words_ids": [[5, 6]], "temperature": 0.2, "num_beams": 4, "do_sample": True}
    assert dict(found.generation.not_applied) == not_applied
    bundle = flamingo_export.build(folder, out=tmp_path / "b.bundle", parity="skip").path
    assert read_manifest(bundle).config.tokens == found.config.tokens
    with opened(bundle) as runs:
        for beams in (1, 3):
            mine = [list(text.token_ids) for text in runs.generate(tokens, images[0].float(), beams=beams, new_tokens=6)]
            assert mine == search(beams, [2, end])
        assert mine[0] != free[0]


@pytest.mark.parametrize("ends", [2, [2, 9]])
def test_words_that_end_a_text_are_not_banned(tmp_path: Path, ends: Any) -> None:
    """Beside transformers' own processor of bad words, which leaves out what ends a text; what is suppressed is, whatever it ends."""
    from transformers import NoBadWordsLogitsProcessor

    folder, _ = write(tmp_path / "idefics")
    words = [[2], [9], [5]]
    says(folder, eos_token_id=ends, bad_words_ids=words)
    found = load(CheckpointFiles(path=folder))
    theirs = NoBadWordsLogitsProcessor(copy.deepcopy(words), ends)(torch.tensor([[1]]), torch.zeros(1, 62))[0]
    assert set(found.config.tokens.never) - {IMAGE, FAKE} == set(theirs.isneginf().nonzero()[:, 0].tolist())
    assert found.generation.not_applied["bad_words_ids"] == [word for word in words if word[0] not in found.config.tokens.never]
    says(folder, eos_token_id=ends, suppress_tokens=[2])
    assert 2 in load(CheckpointFiles(path=folder)).config.tokens.never


def test_inspect_shows_what_generation_config_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = write(tmp_path / "idefics")
    says(folder, eos_token_id=[2, 9], suppress_tokens=[7], temperature=0.2, max_length=40)
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "also ends     tokens 9 (generation_config.json)" in shown
    assert "also banned   tokens 7 (generation_config.json)" in shown
    assert "not applied   temperature 0.2, max_length 40 (generation_config.json)" in shown
    assert main(["inspect", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["generation"]
    assert said == {"ends": [9], "banned": [7], "not_applied": {"temperature": 0.2, "max_length": 40}}


@pytest.mark.parametrize("name", ["eos_token_id", "suppress_tokens"])
@pytest.mark.parametrize("value", [[2, 62], [-1], ["2"], [True], [2.0], [[2]], "2", {"a": 1}])
def test_ids_that_no_token_has(tmp_path: Path, name: str, value: Any) -> None:
    folder, _ = write(tmp_path / "idefics")
    says(folder, **{name: value})
    with pytest.raises(
        CheckpointError, match=rf"generation_config\.json: {name} holds .*, expected ids of the model's 62 tokens"
    ):
        load(CheckpointFiles(path=folder))


@pytest.mark.parametrize("value", [5, [5], {"a": 1}, [[5], 6]])
def test_bad_words_that_are_no_lists(tmp_path: Path, value: Any) -> None:
    folder, _ = write(tmp_path / "idefics")
    says(folder, bad_words_ids=value)
    with pytest.raises(CheckpointError, match=r"bad_words_ids is .*, expected a list of lists of token ids"):
        load(CheckpointFiles(path=folder))


def test_a_ban_of_everything(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "idefics")
    says(folder, suppress_tokens=list(range(60)))
    with pytest.raises(CheckpointError, match="leaves none of 62 tokens to generate"):
        load(CheckpointFiles(path=folder))


def test_nothing_of_generation_config_is_a_matter_of_course(tmp_path: Path) -> None:
    """transformers writes one with every model: its end token is the family's own."""
    folder, _ = write(tmp_path / "idefics")
    plain = load(CheckpointFiles(path=folder))
    says(folder, _from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, transformers_version="4.33.0")
    found = load(CheckpointFiles(path=folder))
    assert found.config == plain.config
    assert not found.generation.not_applied


# preprocessor_config.json, processor_config.json.


def test_images_are_prepared_as_the_preprocessor_says(tmp_path: Path) -> None:
    """Beside transformers' own processor of a model that was tuned with other means."""
    from PIL import Image
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    from flamingo_export.runtime.media import medium_of

    folder, _ = write(tmp_path / "idefics")
    theirs = IdeficsImageProcessorPil(image_size=30, image_mean=[0.5, 0.25, 0.75], image_std=[0.5, 0.5, 1.0])
    theirs.save_pretrained(folder)
    found = load(CheckpointFiles(path=folder))
    assert (found.config.pixel_mean, found.config.pixel_std) == ((0.5, 0.25, 0.75), (0.5, 0.5, 1.0))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    wanted = np.asarray(theirs([picture], return_tensors="np"))
    np.testing.assert_allclose(medium_of([np.asarray(picture)], found.config).pixels, wanted.reshape(1, 3, 30, 30), atol=1e-6)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"image_size": 224}, "image_size is 224, the encoder takes images of 30"),
        ({"size": {"height": 30, "width": 28}}, "size is {'height': 30, 'width': 28}, the encoder takes images of 30"),
        ({"do_center_crop": True}, "do_center_crop is True, which is not supported"),
        ({"crop_size": {"height": 30, "width": 31}}, "crop_size is {'height': 30, 'width': 31}, the encoder takes"),
        ({"do_normalize": False}, "do_normalize is False, which is not supported"),
        ({"resample": 2}, "resample is 2, which is not supported"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, which is not supported"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], expected three numbers"),
        ({"image_mean": [0.5, 0.5, "x"]}, "image_mean is .*, expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "pixel_std .* has an entry that is not positive"),
    ],
)
def test_a_preprocessor_that_asks_for_something_else(tmp_path: Path, said: dict[str, Any], named: str) -> None:
    folder, _ = write(tmp_path / "idefics")
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=named):
        load(CheckpointFiles(path=folder))


def processor(folder: Path, mean: list[float]) -> Any:
    """What transformers 5 writes of images and tokens together: one processor_config.json."""
    from transformers import IdeficsProcessor, PreTrainedTokenizerFast
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    theirs = IdeficsProcessor(IdeficsImageProcessorPil(image_size=30, image_mean=mean), tokenizer)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("older", [False, True], ids=["by itself", "beside an older file"])
def test_images_are_prepared_as_the_processor_of_transformers_5_says(tmp_path: Path, older: bool) -> None:
    """transformers goes by it where both files are there."""
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    folder, _ = write(tmp_path / "idefics")
    if older:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.1, 0.1]}))
    processor(folder, [0.5, 0.25, 0.75])
    assert older or not (folder / "preprocessor_config.json").exists()
    theirs = IdeficsImageProcessorPil.from_pretrained(folder)
    found = load(CheckpointFiles(path=folder))
    assert found.config.pixel_mean == tuple(theirs.image_mean) == (0.5, 0.25, 0.75)


def test_a_processor_that_says_nothing_of_images(tmp_path: Path) -> None:
    """As transformers 4 wrote it."""
    folder, _ = write(tmp_path / "idefics")
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "IdeficsProcessor"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.25, 0.75]}))
    assert load(CheckpointFiles(path=folder)).config.pixel_mean == (0.5, 0.25, 0.75)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"do_rescale": False}, "processor_config.json, image_processor: do_rescale is False, which is not supported"),
        (
            {"size": {"height": 28, "width": 28}},
            "processor_config.json, image_processor: size is .*, the encoder takes images of 30",
        ),
        ({"image_std": [1]}, r"processor_config.json, image_processor: image_std is \[1\], expected three numbers"),
        (["x"], r"processor_config.json: image_processor is \['x'\], expected an object"),
    ],
)
def test_a_processor_of_transformers_5_that_asks_for_something_else(tmp_path: Path, said: Any, named: str) -> None:
    folder, _ = write(tmp_path / "idefics")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    with pytest.raises(CheckpointError, match=named):
        load(CheckpointFiles(path=folder))
