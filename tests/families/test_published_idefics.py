"""IDEFICS from files as they are published to answers: written by transformers, recognised, built, and compared with what wrote them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import assert_as_exact, opened
from idefics_models import (
    FAKE,
    IMAGE,
    PROMPTS,
    SIDE,
    generated,
    image_attention_mask,
    pixels,
    their_config,
    their_logits,
    their_model,
)
from openflamingo_models import Theirs
from PIL import Image
from published_files import write_openflamingo, write_tokenizer
from safetensors.numpy import load_file, save_file
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.cli import main
from flamingo_export.errors import CheckpointError
from flamingo_export.sources.choice import CheckpointFolder
from flamingo_reference.input_format import IDEFICS, IDEFICS_INSTRUCT

WORDS = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, 60)), "<fake_token_around_image>", "<image>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as on the hub, in shards with an index, and the model that it holds."""
    folder: Path = tmp_path_factory.mktemp("hub") / "idefics-tiny"
    config = their_config(vector=True)
    config.max_position_embeddings = 256  # parity shows 32 images
    theirs = their_model(config, seed=3).float()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    write_tokenizer(folder, WORDS, SPECIAL)
    return folder, theirs


@pytest.fixture(scope="module")
def idefics_bundle(idefics: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("bundles") / "idefics.bundle"
    return flamingo_export.build(idefics[0], out=out).path


def test_idefics_is_proved_and_recorded(idefics: tuple[Path, Any], idefics_bundle: Path) -> None:
    assert len(list(idefics[0].glob("model-*.safetensors"))) > 3
    manifest = read_manifest(idefics_bundle)
    assert manifest.parity.state == "passed"
    assert (manifest.source.family, manifest.inputs) == ("idefics", IDEFICS)
    assert manifest.config.tokens.image == IMAGE
    assert (idefics_bundle / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("case", PROMPTS)
def test_idefics_logits(idefics: tuple[Path, Any], idefics_bundle: Path, case: str) -> None:
    tokens = PROMPTS[case]
    images = pixels(tokens.count(IMAGE), seed=1).float()
    exact = their_logits(copy.deepcopy(idefics[1]).double(), tokens, images.double())
    with opened(idefics_bundle) as runs:
        assert_as_exact(runs.logits(tokens, images[0]), exact, their_logits(idefics[1], tokens, images))


def test_an_answer_of_idefics_ends_with_its_own_token(
    idefics_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line too, where nobody writes it: `</s>` and not `<EOC>`."""
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(picture)
    line = [
        "score",
        str(idefics_bundle),
        "--image",
        str(picture),
        "--prompt",
        "w9 <image> w12",
        "--candidates",
        "w20,w21",
        "--json",
    ]
    assert main(line) == 0
    found = {each["candidate"]: each["logprob"] for each in json.loads(capsys.readouterr().out)["scores"]}
    with flamingo_export.load(idefics_bundle, threads=1) as model:
        wanted = model.score([1, 9, FAKE, IMAGE, FAKE, 12], [[20, 2], [21, 2]], images=[picture])
    np.testing.assert_allclose([found["w20"], found["w21"]], [each.logprob for each in wanted], rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_idefics_from_text_and_image_files(idefics: tuple[Path, Any], idefics_bundle: Path, tmp_path: Path, beams: int) -> None:
    """The runtime's own way from a prompt and files of images, beside transformers' tokens, pixels and generation."""
    rng = np.random.default_rng(7)
    pictures = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((50, 41, 3), (20, 64, 3))]
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    theirs = np.asarray(IdeficsImageProcessorPil(image_size=SIDE)(pictures, return_tensors="np"))
    tokens = [1, 9, FAKE, IMAGE, FAKE, IMAGE, FAKE, 12, 13]
    wanted, _ = generated(
        copy.deepcopy(idefics[1]).double(), tokens, torch.from_numpy(theirs)[None].double(), beams=beams, new_tokens=8
    )
    with flamingo_export.load(idefics_bundle, threads=1) as model:
        answer = model.generate("w9 <image><image> w12 w13", images=paths, beams=beams, max_new_tokens=8)
    assert [list(text.token_ids) for text in (answer,)] == wanted[:1]


WANTS_FAKE = [1, 7, FAKE, IMAGE, FAKE, 8, 9]


@pytest.fixture(scope="module")
def wants_fake(idefics: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """A bundle whose likeliest token after WANTS_FAKE is the tag around images, its model in fp64, and the model's inputs."""
    folder: Path = tmp_path_factory.mktemp("wants")
    changed = copy.deepcopy(idefics[1]).double()
    inputs = {
        "input_ids": torch.tensor([WANTS_FAKE]),
        "pixel_values": pixels(1, seed=1),
        "image_attention_mask": image_attention_mask(WANTS_FAKE, 1),
    }
    with torch.no_grad():
        last = changed.model(**inputs).last_hidden_state[0, -1]
        changed.lm_head.additional_fc.weight[0] = 3 * last / last.norm()
        assert changed(**inputs).logits[0, -1].argmax() == FAKE
    changed.float().save_pretrained(folder / "wants")
    (folder / "wants" / "tokenizer.json").write_bytes((idefics[0] / "tokenizer.json").read_bytes())
    bundle = flamingo_export.build(folder / "wants", out=folder / "wants.bundle", parity="skip").path
    return bundle, changed.double(), inputs


@pytest.mark.slow
def test_parity_with_transformers_bans_the_same_tokens(wants_fake: tuple[Path, Any, dict[str, Any]]) -> None:
    assert main(["parity", str(wants_fake[0]), "--against", "transformers"]) == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_the_tag_around_images_is_never_generated(wants_fake: tuple[Path, Any, dict[str, Any]], beams: int) -> None:
    """transformers' own guide bans it, together with `<image>`, by bad_words_ids."""
    bundle, changed, inputs = wants_fake
    tokens, images = WANTS_FAKE, inputs["pixel_values"]
    assert read_manifest(bundle).config.tokens.never == (IMAGE, FAKE)
    with opened(bundle) as runs:
        found = runs.generate(tokens, images[0].float(), beams=beams, new_tokens=6)
    wanted, _ = generated(changed, tokens, images, beams=beams, new_tokens=6)
    assert [list(each.token_ids) for each in found] == wanted
    if beams == 1:  # the order of tokens is the same whether a ban comes before the softmax or after it
        out = changed.generate(
            **inputs, attention_mask=torch.ones(1, len(tokens), dtype=torch.int64), do_sample=False, max_new_tokens=6,
            eos_token_id=2, pad_token_id=0, bad_words_ids=[[IMAGE], [FAKE]],
        )  # fmt: skip
        assert out[0, len(tokens) :].tolist()[: len(wanted[0])] == wanted[0]


def test_an_instructed_idefics_is_told_by_its_tokenizer(idefics: tuple[Path, Any], tmp_path: Path) -> None:
    config = their_config()
    config.additional_vocab_size = 3
    their_model(config).float().save_pretrained(tmp_path)
    write_tokenizer(tmp_path, [*WORDS, "<end_of_utterance>"], [*SPECIAL, "<end_of_utterance>"])
    result = flamingo_export.build(tmp_path, out=tmp_path / "b.bundle", parity="skip")
    assert result.manifest.inputs == IDEFICS_INSTRUCT
    assert (result.manifest.config.tokens.eoc, result.manifest.config.tokens.reset) == (62, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 56}, r"model\.norm\.weight has shape \(48,\), expected \(56,\)"),
        ({"num_hidden_layers": 8}, r"missing model\.layers\.7\.input_layernorm\.weight \(48,\)"),
        ({"qk_layer_norms": False}, r"unknown model\.gated_cross_attn_layers\.0\.cross_attn\.q_layer_norm\.weight"),
        ({"alpha_type": "float"}, r"alpha_dense has shape \(1, 1, 48\), expected \(1,\)"),
        ({"num_attention_heads": 5}, "hidden_size 48 must be a multiple of num_attention_heads 5"),
        ({"vocab_size": 61}, r"model\.embed_tokens\.weight has shape \(60, 48\), expected \(61, 48\)"),
        ({"hidden_size": "48"}, "hidden_size is '48', expected int"),
        ({"num_hidden_layers": 10**9}, "language_model.num_layers is 1000000000, expected at most 10000"),
        ({"max_position_embeddings": 10**12}, "max_positions is 1000000000000, expected at most 16777216"),
        *(
            (
                {"rope_parameters": {"rope_type": "default", "rope_theta": base}},
                f"config.json: rope_theta is {said}, expected",
            )
            for base, said in (
                (float("nan"), "nan"),
                (float("inf"), "inf"),
                (float("-inf"), "-inf"),
                (10**400, "10{79}"),
                (-1.0, "-1.0"),
                (0, "0.0"),
                ("1e4", "'1e4'"),
                (True, "True"),
                ([1.0], r"\[1.0\]"),
            )
        ),
        ({"rope_parameters": None, "rope_theta": float("nan")}, "config.json: rope_theta is nan, expected a"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {'type': 'linear'"),
        ({"hidden_size": 2**64}, "hidden_size is 18446744073709551616, expected a number that a model can have"),
        ({"num_attention_heads": -4}, "hidden_size 48 must be a multiple of num_attention_heads -4"),
        ({"num_attention_heads": 4.0}, r"num_attention_heads is 4\.0, expected int"),
        ({"additional_vocab_size": -1}, "additional_vocab_size is -1, expected at least 0"),
        ({"vision_config": "large"}, "vision_config is 'large', expected dict"),
        (
            {"vision_config": {"embed_dim": 40, "hidden_size": 20}},
            "embed_dim 40 and hidden_size 20 are two names of one setting",
        ),
        ({"head_dim": 8}, "head_dim is 8, and a width of 48 with 4 heads makes 12"),
        ({"vision_config": {"num_attention_heads": 0}}, "vision.num_heads is 0, expected at least 1"),
        ({"perceiver_config": {"resampler_depth": 10**7}}, "resampler.num_layers is 10000000, expected at most 10000"),
        ({"eos_token_id": []}, r"eos_token_id is \[\], expected int"),
        ({"hidden_size": "x" * 10_000}, "hidden_size is '[x]{79}, expected int"),
        ({"rms_norm_eps": -1.0}, "norm_eps is -1.0, expected a small positive number"),
        ({"model_type": "idefics2"}, "model_type 'idefics2', which is not known"),
        ({"model_type": "clip"}, "but the tensors look like IDEFICS v1"),
    ],
)
def test_a_config_that_contradicts_the_shapes(
    idefics: tuple[Path, Any], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    for path in idefics[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    raw = json.loads((idefics[0] / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(CheckpointError, match=named):
        flamingo_export.build(tmp_path, out=tmp_path / "b.bundle", parity="skip")
    assert not (tmp_path / "b.bundle").exists()


def test_a_tokenizer_of_another_model(idefics: tuple[Path, Any], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, [*WORDS, "more"], SPECIAL)
    source = CheckpointFolder(path=idefics[0], tokenizer=tmp_path)
    with pytest.raises(CheckpointError, match="has 63 tokens, the model's vocabulary has 62"):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")


def test_a_tokenizer_that_lacks_a_word(idefics: tuple[Path, Any], tmp_path: Path) -> None:
    """The ids of the tokens behind it are others then, and with them the rows of the embedding."""
    write_tokenizer(tmp_path, [word for word in WORDS if word != "w9"], SPECIAL)
    source = CheckpointFolder(path=idefics[0], tokenizer=tmp_path)
    named = "<fake_token_around_image> is 59, and tokens that were added have ids 60 to 61 by config.json"
    with pytest.raises(CheckpointError, match=named):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")


def test_a_file_without_its_config(idefics: tuple[Path, Any], tmp_path: Path) -> None:
    shards = {name: array for path in idefics[0].glob("model-*.safetensors") for name, array in load_file(path).items()}
    save_file(shards, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has no config\.json, which this kind of model needs"):
        flamingo_export.build(tmp_path / "model.safetensors", out=tmp_path / "b.bundle", parity="skip")
    source = write_openflamingo(tmp_path / "of", Theirs("mpt"))
    (tmp_path / "of" / "lm" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lm has no config\.json, which this kind of model needs"):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")


def test_an_adapter_of_peft_for_the_language_model(idefics: tuple[Path, Any], tmp_path: Path) -> None:
    """Merged into the shards' tensor while it is read: the logits are transformers' with W + 2 B A put in."""
    folder, theirs = idefics
    generator = torch.Generator().manual_seed(4)
    module = "model.layers.3.mlp.up_proj"
    down, up = torch.randn(2, 48, generator=generator) * 0.1, torch.randn(88, 2, generator=generator) * 0.1
    halves = {f"base_model.model.{module}.lora_{half}.weight": part.numpy() for half, part in (("A", down), ("B", up))}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    source = CheckpointFolder(path=folder, adapters=(tmp_path,))
    bundle = flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip").path
    changed = copy.deepcopy(theirs).double()
    with torch.no_grad():
        changed.get_submodule(module).weight += 2 * up.double() @ down.double()
    tokens, images = PROMPTS["one image"], pixels(1, seed=1).float()
    with opened(bundle) as runs:
        found = runs.logits(tokens, images[0])
    exact = their_logits(changed, tokens, images.double())
    assert_as_exact(found, exact, their_logits(copy.deepcopy(changed).float(), tokens, images))
    assert (exact - their_logits(copy.deepcopy(theirs).double(), tokens, images.double())).abs().max() > 0.01
