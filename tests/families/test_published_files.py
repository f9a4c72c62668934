"""From files as they are published to answers: written by transformers and torch, recognised, built, and compared with what wrote them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_runs import assert_as_exact, opened
from idefics_models import FAKE, IMAGE, PROMPTS, SIDE, generated, pixels, their_config, their_logits, their_model
from openflamingo_models import SIDE as CLIP_SIDE
from openflamingo_models import Theirs
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

import flamingo_export
from flamingo_export import build_plan
from flamingo_export.build_request import BuildRequest, CheckpointFolder
from flamingo_export.cli import main
from flamingo_export.errors import CheckpointError
from flamingo_export.manifest import read_manifest
from flamingo_reference.checkpoints.loading import load
from flamingo_reference.checkpoints.tensors import CheckpointError as UnreadableCheckpoint
from flamingo_reference.input_format import IDEFICS, IDEFICS_INSTRUCT, OPENFLAMINGO, with_bos


def write_tokenizer(folder: Path, words: list[str], special: list[str]) -> None:
    """Words parted by spaces; the special ones are added tokens of the ids that they have among the words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))


# IDEFICS

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


# OpenFlamingo

PROMPT = [0, 7, 8, 62, 9, 10, 11, 62, 62, 12, 61, 13, 14]


def write_openflamingo(folder: Path, theirs: Theirs, *, layout: str = "openai") -> CheckpointFolder:
    """checkpoint.pt as training saved it, the language model's folder with a tokenizer that lacks the added tokens, CLIP's file."""
    lm = folder / "lm"
    lm.mkdir(parents=True)
    trained = {f"module.{name}": torch.from_numpy(array.copy()).float() for name, array in theirs.checkpoint().items()}
    torch.save(
        {"epoch": 9, "model_state_dict": trained, "optimizer_state_dict": {"state": {0: torch.ones(3)}}},
        folder / "checkpoint.pt",
    )
    save_file(
        {name: np.ascontiguousarray(array, np.float32) for name, array in theirs.language_model().items()},
        lm / "model.safetensors",
    )
    (lm / "config.json").write_text(json.dumps(theirs.language_model_config()))
    bos = ["<s>"] if theirs.kind == "llama" else []
    write_tokenizer(lm, ["<unk>", *(bos or ["w1"]), *(f"w{index}" for index in range(2, 61))], bos)
    clip = {name: torch.from_numpy(np.array(array)).float() for name, array in theirs.vision(layout).items()}
    if layout == "openai":
        torch.save(clip, folder / "ViT-L-14.pt")
        return CheckpointFolder(path=folder / "checkpoint.pt", language_model=lm, vision_encoder=folder / "ViT-L-14.pt")
    (folder / "clip").mkdir()
    save_file({name: tensor.numpy() for name, tensor in clip.items()}, folder / "clip" / "model.safetensors")
    raw = theirs.clip.config.to_dict()
    (folder / "clip" / "config.json").write_text(json.dumps(raw))
    return CheckpointFolder(path=folder / "checkpoint.pt", language_model=lm, vision_encoder=folder / "clip")


@pytest.mark.parametrize("kind", ["mpt", "mosaic_gpt", "gpt_neox, parallel", "llama"])
def test_openflamingo(kind: str, tmp_path: Path) -> None:
    theirs = Theirs(kind, every=1 if kind == "mosaic_gpt" else 2)
    source = write_openflamingo(tmp_path, theirs, layout="transformers" if kind == "mpt" else "openai")
    result = flamingo_export.build(source, out=tmp_path / "of.bundle", parity="auto" if kind == "mpt" else "skip")
    manifest = result.manifest
    assert manifest.inputs == (with_bos(OPENFLAMINGO, "<s>") if kind == "llama" else OPENFLAMINGO)
    assert (manifest.config.tokens.eoc, manifest.config.tokens.image, manifest.config.tokens.pad) == (61, 62, 63)
    assert manifest.parity.state == ("passed" if kind == "mpt" else "not_run")
    # The engines' weights are fp32, so theirs are rounded too.
    theirs.tensors = {name: tensor.float().double() for name, tensor in theirs.tensors.items()}
    theirs.norms = theirs.norms.float().double()
    images = torch.randn(3, 3, CLIP_SIDE, CLIP_SIDE, generator=torch.Generator().manual_seed(5))
    exact = theirs.to(torch.float32).to(torch.float64).logits(PROMPT, images)
    eager = theirs.to(torch.float32).logits(PROMPT, images)
    with opened(result.path) as runs:
        assert_as_exact(runs.logits(PROMPT, images), exact, eager)


def test_openflamingos_text_is_encoded_with_the_added_tokens(tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path, Theirs("mpt"))
    bundle = flamingo_export.build(source, out=tmp_path / "of.bundle", parity="skip").path
    with flamingo_export.load(bundle, threads=1) as model:
        assert model.tokenizer is not None
        assert model.tokenizer.encode("<image> w7 <|endofchunk|>") == [62, 7, 61]
        picture = Image.fromarray(np.full((40, 30, 3), 90, np.uint8))
        assert model.generate("<image> w7", images=[picture], max_new_tokens=3).token_ids


@pytest.mark.parametrize("prefix", ["", "lang_encoder."])
@pytest.mark.parametrize("inner", ["", "decoder_layer."])
def test_an_adapter_of_the_language_model_within_openflamingo(tmp_path: Path, prefix: str, inner: str) -> None:
    """PEFT names modules as they are called in the model that it is given: OpenFlamingo's, or the bare language model."""
    source = write_openflamingo(tmp_path / "m", Theirs("mpt"))
    generator = np.random.default_rng(4)
    modules = {
        f"{prefix}transformer.blocks.1.{inner}ffn.up_proj": ("language_model.layers.1.ffw_up.weight", slice(None)),
        f"{prefix}transformer.blocks.1.{inner}attn.Wqkv": ("language_model.layers.1.k_proj.weight", slice(48, 96)),
        "lang_encoder.transformer.blocks.1.gated_cross_attn_layer.ff.1": ("cross_attention.0.ffw_up.weight", slice(None)),
    }
    plain, adapter = load(source), tmp_path / "adapter"
    adapter.mkdir()
    halves = {}
    for module, (ours, _) in modules.items():
        out, into = plain.reader.shape(ours)
        out = 3 * out if "Wqkv" in module else out
        for half, shape in (("A", (2, into)), ("B", (out, 2))):
            drawn = generator.standard_normal(shape).astype(np.float32)
            halves[f"base_model.model.{module}.lora_{half}.weight"] = drawn
    embedding = generator.standard_normal(plain.reader.shape("language_model.embedding.weight")).astype(np.float32)
    halves[f"base_model.model.{prefix}transformer.wte.weight"] = embedding
    save_file(halves, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["wte"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    merged = load(msgspec.structs.replace(source, adapters=(adapter,)))
    for module, (ours, rows) in modules.items():
        down, up = (halves[f"base_model.model.{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        wanted = plain.reader.read(ours) + (2 * up @ down)[rows]
        np.testing.assert_allclose(merged.reader.read(ours), wanted, atol=1e-5)
    # The published language model has an embedding too, which training went on from: it is checkpoint.pt's that is in use.
    np.testing.assert_array_equal(merged.reader.read("language_model.embedding.weight"), embedding)
    changed = {ours for ours, _ in modules.values()} | {"language_model.embedding.weight"}
    for name in set(plain.reader.names()) - changed - {f"language_model.layers.1.{part}_proj.weight" for part in "qv"}:
        np.testing.assert_array_equal(merged.reader.read(name), plain.reader.read(name))


def test_heads_of_clip_are_those_of_its_config(tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path, Theirs("mpt"), layout="transformers")
    assert source.vision_encoder is not None
    raw = json.loads((source.vision_encoder / "config.json").read_text())
    vision = raw.get("vision_config", raw)
    assert vision["num_attention_heads"] == 1
    vision["num_attention_heads"] = 4
    (source.vision_encoder / "config.json").write_text(json.dumps(raw))
    assert load(source).config.vision.num_heads == 4  # type: ignore[union-attr]
    vision["hidden_size"] = 128
    (source.vision_encoder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnreadableCheckpoint, match=r"the perceiver's width in checkpoint\.pt is 64, the other files have 128"):
        load(source)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    mine = write_openflamingo(tmp_path / "mine", Theirs("mpt"))
    lm = tmp_path / "mine" / "lm"
    tensors = load_file(lm / "model.safetensors")
    cut = {name: array[..., :36] if name.endswith("wte.weight") else array for name, array in tensors.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in cut.items()}, lm / "model.safetensors")
    raw = json.loads((lm / "config.json").read_text())
    (lm / "config.json").write_text(json.dumps(raw | {"d_model": 36}))
    with pytest.raises(
        CheckpointError, match=r"the width of text in the gated blocks in checkpoint\.pt is 48, the other files have 36"
    ):
        flamingo_export.build(mine, out=tmp_path / "b.bundle", parity="skip")
    other = write_openflamingo(tmp_path / "other", Theirs("llama"))
    swapped = CheckpointFolder(path=other.path, language_model=lm, vision_encoder=other.vision_encoder)
    with pytest.raises(
        CheckpointError, match=r"holds no gated block.*Is the language model given the one that it was trained with"
    ):
        flamingo_export.build(swapped, out=tmp_path / "b.bundle", parity="skip")
    (tmp_path / "other" / "lm" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer is beside .* --tokenizer FILE"):
        flamingo_export.build(other, out=tmp_path / "b.bundle", parity="skip")


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Some of the entries of a config.json changed."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


LANGUAGE_MODEL = "config.json of the language model: "


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, f"{LANGUAGE_MODEL}rope_theta is nan, expected"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, f"{LANGUAGE_MODEL}rope_theta is 0.0, expected a positive number"),
        ("llama", {"rope_parameters": None, "rope_theta": float("-inf")}, f"{LANGUAGE_MODEL}rope_theta is -inf, expected"),
        ("llama", {"rope_parameters": None, "rope_theta": 10**400}, f"{LANGUAGE_MODEL}rope_theta is 1000000000"),
        ("llama", {"head_dim": "12"}, f"{LANGUAGE_MODEL}head_dim is '12', expected int"),
        ("llama", {"head_dim": -12}, "language_model.head_size is -12, expected at least 1"),
        ("llama", {"num_key_value_heads": 2.0}, f"{LANGUAGE_MODEL}num_key_value_heads is 2.0, expected int"),
        ("llama", {"num_key_value_heads": -2}, "language_model.num_kv_heads is -2, expected at least 1"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ("llama", {"num_attention_heads": 0}, "language_model.num_heads is 0, expected at least 1"),
        ("llama", {"num_hidden_layers": 2**63}, f"{LANGUAGE_MODEL}num_hidden_layers is 9223372036854775808, expected"),
        (
            "llama",
            {"num_hidden_layers": 2**62},
            r"gated blocks before layers \[1, 3\], expected every 2th of 4611686018427387904",
        ),
        ("llama", {"num_hidden_layers": -4}, r"gated blocks before layers \[1, 3\], expected every 2th of -4"),
        ("gpt_neox, parallel", {"rope_parameters": None, "rotary_pct": float("nan")}, "rotary_pct is nan, expected"),
        ("gpt_neox, parallel", {"rope_parameters": None, "rotary_pct": 1e300}, "1e[+]300 of a head's channels are rotated"),
        (
            "gpt_neox, parallel",
            {"rope_parameters": None, "rotary_emb_base": -5},
            "rotary_emb_base is -5.0, expected a positive",
        ),
        ("mpt", {"attn_config": {"alibi": True, "alibi_bias_max": float("nan")}}, "alibi_bias_max is nan, expected"),
        ("mpt", {"attn_config": {"alibi": True, "alibi_bias_max": -8}}, "alibi_bias_max is -8.0, expected a positive number"),
        ("mpt", {"attn_config": {"alibi": True, "prefix_lm": True}}, "prefix_lm is True, which is not supported"),
        ("mpt", {"norm_type": "low_precision_rmsnorm"}, "norm_type is 'low_precision_rmsnorm', which is not supported"),
        ("mpt", {"attn_config": "alibi"}, "attn_config is 'alibi', expected an object"),
        ("mpt", {"n_layers": "4"}, "n_layers is '4', expected int"),
        ("mosaic_gpt", {"prefix_lm": True}, "prefix_lm is True, which is not supported"),
    ],
)
def test_a_language_models_config_that_no_model_has(kind: str, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path, Theirs(kind))
    assert source.language_model is not None
    rewrite(source.language_model / "config.json", change)
    with pytest.raises(CheckpointError, match=named):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_config": [1]}, r"config.json of CLIP: vision_config is \[1\], expected dict"),
        ({"num_attention_heads": -1}, "vision.num_heads is -1, expected at least 1"),
        ({"num_attention_heads": 3}, "vision.num_heads 3 does not divide vision.width 64"),
        ({"layer_norm_eps": float("nan")}, "config.json of CLIP: layer_norm_eps is nan, expected a number"),
        ({"num_hidden_layers": 10**6}, "vision.num_layers is 1000000, expected at most 10000"),
        ({"image_size": 35}, r"position_embedding\.weight has shape \(17, 64\), expected \(26, 64\)"),
    ],
)
def test_a_config_of_clip_that_its_file_contradicts(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path, Theirs("mpt"), layout="transformers")
    assert source.vision_encoder is not None
    rewrite(source.vision_encoder / "config.json", change)
    with pytest.raises(CheckpointError, match=named):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("perceiver.latents", None, r"holds no matrix perceiver\.latents \(nearest: perceiver\.latent \(5, 64\)\)"),
        ("perceiver.latents", (5, 1, 64), r"perceiver\.latents has shape \(5, 1, 64\), expected a matrix"),
        ("lang_encoder.transformer.wte.weight", (64,), r"wte\.weight has shape \(64,\), expected a matrix"),
        ("perceiver.frame_embs", (), r"perceiver\.frame_embs has shape \(\), expected a matrix"),
        (
            "perceiver.layers.1.1.1.weight",
            (9, 9),
            r"perceiver\.layers\.1\.1\.1\.weight has shape \(9, 9\), expected \(256, 64\)",
        ),
        (
            f"lang_encoder.transformer.blocks.{'9' * 5000}.gated_cross_attn_layer.x",
            (1,),
            r"unknown .*gated_cross_attn_layer\.x",
        ),
    ],
)
def test_tensors_of_a_checkpoint_that_do_not_fit(name: str, shape: tuple[int, ...] | None, named: str, tmp_path: Path) -> None:
    """None: under a name that is not quite its own."""
    source = write_openflamingo(tmp_path, Theirs("mpt"))
    saved = torch.load(source.path, weights_only=True)["model_state_dict"]
    if shape is None:
        saved[f"module.{name[:-1]}"] = saved.pop(f"module.{name}")
    else:
        saved[f"module.{name}"] = torch.zeros(shape)
    torch.save({"model_state_dict": saved}, source.path)
    with pytest.raises(CheckpointError, match=named):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")


def test_clip_as_newer_versions_of_transformers_save_it(tmp_path: Path) -> None:
    """Without `vision_model.` before every name, last norm and all."""
    theirs = Theirs("mpt")
    plain, bare = (write_openflamingo(tmp_path / name, theirs, layout="transformers") for name in ("plain", "bare"))
    assert bare.vision_encoder is not None
    path = bare.vision_encoder / "model.safetensors"
    save_file({name.removeprefix("vision_model."): array for name, array in load_file(path).items()}, path)
    wanted, found = load(plain), load(bare)
    assert found.config == wanted.config
    for name in wanted.reader.names():
        np.testing.assert_array_equal(found.reader.read(name), wanted.reader.read(name))
    (bare.vision_encoder / "config.json").unlink()  # sizes are read off the shapes
    assert load(bare).config.vision == load(plain).config.vision


def test_openflamingo_is_planned_without_its_language_models_shards(tmp_path: Path) -> None:
    """config.json and the index of a language model in shards suffice, its embedding, which training went on from, among what is missing."""
    source = write_openflamingo(tmp_path, Theirs("gpt_neox, parallel"))
    whole = build_plan.plan(BuildRequest(source=source, out=tmp_path / "b.bundle"))
    assert source.language_model is not None
    tensors = load_file(source.language_model / "model.safetensors")
    (source.language_model / "model.safetensors").unlink()
    index = {"weight_map": {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(tensors)}}
    (source.language_model / "model.safetensors.index.json").write_text(json.dumps(index))
    planned = build_plan.plan(BuildRequest(source=source, out=tmp_path / "b.bundle"))
    assert [path.name for path in planned.absent] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert msgspec.structs.replace(planned, absent=()) == whole
    with pytest.raises(CheckpointError, match="names files that are not there: model-00001-of-00002"):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")


@pytest.mark.parametrize("words", [40, 60, 62, 200])
def test_openflamingo_with_the_tokenizer_of_another_language_model(words: int, tmp_path: Path) -> None:
    """The ids of the tokens that training added follow from it."""
    source = write_openflamingo(tmp_path, Theirs("gpt_neox, parallel"))
    assert source.language_model is not None
    write_tokenizer(source.language_model, [f"w{index}" for index in range(words)], [])
    named = f"the tokenizer has {words + 3} tokens, .* and the embedding in .*checkpoint.pt has 64 rows.*--tokenizer FILE"
    with pytest.raises(CheckpointError, match=named):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")
