"""OpenFlamingo from files as they are published to answers: written by torch and transformers, recognised, built, and compared with what
wrote them."""

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
from openflamingo_models import SIDE as CLIP_SIDE
from openflamingo_models import Theirs
from PIL import Image
from published_files import write_openflamingo, write_tokenizer
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig

import flamingo_export
from flamingo_export.errors import CheckpointError
from flamingo_export.pipeline import plan as build_plan
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.sources.choice import CheckpointFolder
from flamingo_reference.checkpoints.files.tensors import CheckpointError as UnreadableCheckpoint
from flamingo_reference.checkpoints.loading import load
from flamingo_reference.config import ViTConfig
from flamingo_reference.input_format import OPENFLAMINGO, with_bos

PROMPT = [0, 7, 8, 62, 9, 10, 11, 62, 62, 12, 61, 13, 14]


@pytest.mark.slow
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
    found = load(source).config.vision
    assert isinstance(found, ViTConfig)
    assert found.num_heads == 4
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
        (
            "llama",
            {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            f"{LANGUAGE_MODEL}type is 'linear', which is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            f"{LANGUAGE_MODEL}partial_rotary_factor is 0.5, which is not supported",
        ),
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
        ("mpt", {"attn_config": {"alibi": True, "rope": True}}, "rope is True, which is not supported"),
        ("mpt", {"attn_config": {"alibi": True, "sliding_window_size": 8}}, "sliding_window_size is 8, which is not"),
        ("mpt", {"attn_config": {"alibi": True, "attn_logit_softcapping": 5.0}}, "attn_logit_softcapping is 5.0, which is"),
        ("mpt", {"final_logit_softcapping": 3.0}, "final_logit_softcapping is 3.0, which is not supported"),
        ("mpt", {"norm_eps": 1e-6}, "norm_eps is 1e-06, which is not supported"),
        ("mpt", {"attn_config": "alibi"}, "attn_config is 'alibi', expected an object"),
        ("mpt", {"n_layers": "4"}, "n_layers is '4', expected int"),
        # transformers goes by the second name, and turns other positions by a head_dim.
        ("gpt_neox, parallel", {"head_dim": 8}, "head_dim is 8, and a width of 48 with 3 heads makes 16"),
        ("mpt", {"hidden_size": 24}, "d_model 48 and hidden_size 24 are two names of one setting, and say different things"),
        ("mpt", {"num_attention_heads": 2}, "n_heads 4 and num_attention_heads 2 are two names of one setting"),
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


def test_a_config_of_clip_by_its_older_name(tmp_path: Path) -> None:
    """`vision_config_dict` beside or in place of `vision_config`: transformers goes by it, and fills in what it leaves out."""

    def theirs(raw: dict[str, Any]) -> Any:
        return CLIPConfig(**copy.deepcopy(raw)).vision_config

    source = write_openflamingo(tmp_path, Theirs("mpt"), layout="transformers")
    assert source.vision_encoder is not None
    path = source.vision_encoder / "config.json"
    vision = json.loads(path.read_text())
    wanted = load(source).config
    for whole in ({"vision_config": vision, "vision_config_dict": vision}, {"vision_config_dict": vision}):
        assert theirs(whole).hidden_size == 64
        path.write_text(json.dumps({"model_type": "clip", **whole}))
        assert load(source).config == wanted
    for older in (vision | {"hidden_act": "gelu"}, {**vision, "hidden_act": "gelu", "layer_norm_eps": 0.1}):
        unlike = {"vision_config": vision, "vision_config_dict": older}
        assert theirs(unlike).hidden_act == "gelu"
        path.write_text(json.dumps({"model_type": "clip", **unlike}))
        named = "vision_config_dict and vision_config are two names of one setting, and say different things .*'gelu' for 'quick_gelu'"
        with pytest.raises(UnreadableCheckpoint, match=named):
            load(source)
    partial = {name: value for name, value in vision.items() if name != "hidden_act"}
    unlike = {"vision_config": vision | {"hidden_act": "gelu"}, "vision_config_dict": partial}
    assert theirs(unlike).hidden_act == "quick_gelu"
    path.write_text(json.dumps({"model_type": "clip", **unlike}))
    with pytest.raises(UnreadableCheckpoint, match="'quick_gelu' for 'gelu'"):
        load(source)


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
    (bare.vision_encoder / "config.json").unlink()  # its activation stands nowhere else
    with pytest.raises(UnreadableCheckpoint, match=r"clip has no config\.json, which says how its tensors are computed with"):
        load(bare)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"size": {"shortest_edge": 28}, "crop_size": 28, "do_center_crop": True}, None),
        ({"size": 28, "crop_size": {"height": 28, "width": 28}}, None),
        ({"size": {"shortest_edge": 32}}, "size is {'shortest_edge': 32}, the encoder takes images of 28"),
        ({"size": {"height": 28, "width": 28}}, "size is {'height': 28, 'width': 28}, which stretches images"),
        ({"do_center_crop": False}, "do_center_crop is False, which is not supported"),
    ],
)
def test_clips_images_are_cropped_or_the_file_is_refused(tmp_path: Path, said: dict[str, Any], named: str | None) -> None:
    source = write_openflamingo(tmp_path / "of", Theirs("mpt"), layout="transformers")
    assert source.vision_encoder is not None
    (source.vision_encoder / "preprocessor_config.json").write_text(json.dumps(said))
    if named is None:
        assert load(source).inputs.fit == "crop"
        return
    with pytest.raises(UnreadableCheckpoint, match=named):
        load(source)


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
    if words + 3 < 64:  # the embedding may have more rows than there are tokens for another reason
        named += rf"\. The embedding may have been padded to a multiple .*save it with {words + 3} rows"
    with pytest.raises(CheckpointError, match=named):
        flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip")
