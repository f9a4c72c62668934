"""Llama 3.2 Vision from files as they are published to answers: written by transformers, recognised, built, and compared with what wrote
them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import assert_as_exact, opened
from llama_models import (
    BOS,
    END,
    IMAGE,
    PROMPTS,
    TURN,
    VOCAB,
    corrected,
    generated,
    our_config,
    our_model,
    pixels,
    their_config,
    their_logits,
    their_model,
)
from PIL import Image
from published_files import write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import MllamaConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.sources import CheckpointSource
from flamingo_export.validate import check_bundle
from flamingo_export.validate.expected.cases import decoder_cases, pixel_cases
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.oracle import record_numbers
from flamingo_export.validate.expected.transformers.transformers_parts import TransformersParts
from flamingo_export.validate.expected.transformers.whole import record_whole
from flamingo_reference.checkpoints.families import llama_vision
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles, load
from flamingo_reference.input_format import LLAMA_VISION, LLAMA_VISION_INSTRUCT

SPECIAL = ["<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|image|>"]
WORDS = [*SPECIAL[:4], *(f"w{index}" for index in range(4, VOCAB)), SPECIAL[4]]
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "MllamaImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_image_tiles": 4,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 28, "width": 28},
}


def write(folder: Path, theirs: Any, *, shard: str = "400KB") -> Path:
    """A folder as on the hub."""
    theirs.save_pretrained(folder, max_shard_size=shard)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    write_tokenizer(folder, WORDS, SPECIAL)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as on the hub, in shards with an index, and the model that it holds."""
    theirs = their_model(seed=3).float()
    return write(tmp_path_factory.mktemp("hub") / "llama-vision-tiny", theirs), theirs


@pytest.fixture(scope="module")
def bundle(llama: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("bundles") / "llama.bundle"
    return flamingo_export.build(llama[0], out=out, parity="skip").path


@pytest.mark.parametrize("case", PROMPTS)
def test_logits(llama: tuple[Path, Any], bundle: Path, case: str) -> None:
    tokens, ids = PROMPTS[case]
    images = pixels(ids, seed=1).float()
    with corrected(copy.deepcopy(llama[1]).double()) as theirs:
        exact = their_logits(theirs, tokens, ids, images.double())
    with corrected(llama[1]) as theirs:
        eager = their_logits(theirs, tokens, ids, images)
    with opened(bundle) as runs:
        assert_as_exact(runs.logits(tokens, images, ids), exact, eager)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["image first", "several images", "adjacent images", "text first", "text only"])
def test_generated_tokens(llama: tuple[Path, Any], bundle: Path, case: str, beams: int) -> None:
    tokens, ids = PROMPTS[case]
    images = pixels(ids, seed=1).float()
    with corrected(copy.deepcopy(llama[1]).double()) as theirs:
        wanted, scores = generated(theirs, tokens, ids, images.double(), beams=beams, new_tokens=8)
    with opened(bundle) as runs:
        found = runs.generate(tokens, images, ids, beams=beams, new_tokens=8)
    assert [list(each.token_ids) for each in found][: len(wanted)] == wanted
    if beams > 1:
        assert [each.score for each in found] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_from_image_files(llama: tuple[Path, Any], bundle: Path, tmp_path: Path, beams: int) -> None:
    """Sizes of 1, 2 and 4 tiles, the last two side by side: transformers' own processor of images, masks and generation."""
    rng = np.random.default_rng(7)
    sizes = ((20, 25, 3), (20, 60, 3), (70, 66, 3))
    pictures = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    paths = [tmp_path / f"{index}.png" for index in range(len(sizes))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    settings: dict[str, Any] = {name: value for name, value in PREPROCESSOR.items() if name != "image_processor_type"}
    processor: Any = MllamaImageProcessorPil(**settings)
    theirs = processor([pictures], return_tensors="pt")
    ids = theirs["aspect_ratio_ids"][0].tolist()
    assert len(set(ids)) == 3
    tokens = [BOS, 9, IMAGE, 12, IMAGE, IMAGE, 13, 14]
    with corrected(copy.deepcopy(llama[1]).double()) as model:
        wanted, _ = generated(model, tokens, ids, theirs["pixel_values"][0].double(), beams=beams, new_tokens=8)
    with flamingo_export.load(bundle, threads=1) as ours:
        answer = ours.generate(tokens, images=paths, beams=beams, max_new_tokens=8)
        assert list(answer.token_ids) == wanted[0]
        by_text = ours.generate("w9<|image|> w12 <|image|><|image|> w13 w14", images=paths, beams=beams, max_new_tokens=8)
    assert by_text.token_ids == answer.token_ids


def test_what_the_bundle_says_of_itself(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.source.family, manifest.inputs) == ("llama_vision", LLAMA_VISION_INSTRUCT)
    assert manifest.config.tokens.stops == (TURN, END)
    assert manifest.config.banned_logits == ()


def changed(folder: Path, into: Path, **settings: Any) -> Path:
    """A copy with other settings in config.json; `part__name` is a setting of a part."""
    into.mkdir()
    for path in folder.iterdir():
        (into / path.name).write_bytes(path.read_bytes())
    raw = json.loads((into / "config.json").read_text())
    for name, value in settings.items():
        part, _, inner = name.rpartition("__")
        (raw[part] if part else raw)[inner] = value
    (into / "config.json").write_text(json.dumps(raw))
    return into


def test_published_names_and_shards(llama: tuple[Path, Any]) -> None:
    folder, theirs = llama
    assert len(list(folder.glob("*.safetensors"))) > 2
    found = load(CheckpointFiles(path=folder))
    assert found.family.name == "llama_vision"
    assert (found.config.tokens.eoc, found.config.tokens.ends) == (TURN, (END,))
    assert found.inputs == LLAMA_VISION_INSTRUCT
    ours = our_model(theirs).state_dict()
    for name in found.reader.names():
        torch.testing.assert_close(torch.from_numpy(found.reader.read(name).copy()), ours[name], rtol=0, atol=0)
    assert not found.ignored


def test_live_names_in_one_file(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """The names of the live model's state_dict, as a trainer that knows nothing of conversions saves them."""
    folder, theirs = llama
    into = changed(folder, tmp_path / "live")
    for path in into.glob("*.safetensors*"):
        path.unlink()
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert "lm_head.weight" in state
    save_file(state, into / "model.safetensors")
    found, published = load(CheckpointFiles(path=into)), load(CheckpointFiles(path=folder))
    for name in published.reader.names():
        assert (found.reader.read(name) == published.reader.read(name)).all()


def test_published_names_are_those_that_transformers_writes(llama: tuple[Path, Any]) -> None:
    names = {name for path in llama[0].glob("*.safetensors") for name in load_file(path)}
    assert names == {llama_vision.plain_name(name) for name in llama[1].state_dict()}
    assert {llama_vision.plain_name(llama_vision.live_name(name)) for name in names} == names


def test_a_base_model_is_told_by_its_end(llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder = changed(llama[0], tmp_path / "base", text_config__eos_token_id=END)
    (folder / "generation_config.json").unlink(missing_ok=True)
    found = load(CheckpointFiles(path=folder))
    assert found.config.tokens.stops == (END,)
    assert found.inputs == LLAMA_VISION


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes.*published quantised"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq.*published quantised"),
        ({"text_config__cross_attention_layers": [1, 2]}, "1 and 2 next to each other"),
        ({"text_config__cross_attention_layers": [1, 5]}, "ends with the model's last layer, 5"),
        ({"text_config__cross_attention_layers": [2, 4]}, "not a regular schedule"),
        ({"text_config__cross_attention_layers": []}, "expected layers of 6"),
        ({"vision_config__supported_aspect_ratios": [[1, 1], [2, 2]]}, "supported_aspect_ratios"),
        ({"vision_config__vision_output_dim": 96}, "vision_output_dim is 96"),
        ({"vision_config__intermediate_layers_indices": [1, 2, 7]}, "beyond the 5"),
        ({"image_token_index": 12}, "image_token_index is 12"),
        ({"text_config__tie_word_embeddings": True}, "tie_word_embeddings"),
        (
            {"text_config__rope_scaling": {"rope_type": "default"}},
            "rope_parameters and rope_scaling are two names of one setting",
        ),
        (
            {"text_config__rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_scaling: high_freq_factor, original_max_position_embeddings missing, which rope_type 'llama3' needs",
        ),
        ({"vision_config__num_attention_heads": 8}, "attention_heads 4 and num_attention_heads 8 are two names of one setting"),
        ({"image_token_id": 71}, "image_token_index 70 and image_token_id 71 are two names of one setting"),
        ({"text_config__head_dim": 8}, "text_config: head_dim is 8, and a width of 48 with 4 heads makes 12"),
        ({"vision_config__norm_eps": 1e-6}, "norm_eps is 1e-06, which is not supported"),
        ({"model_type": "mllama_text_model"}, "but the tensors look like Llama 3.2 Vision"),
    ],
)
def test_settings_that_are_refused(llama: tuple[Path, Any], tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(CheckpointFiles(path=changed(llama[0], tmp_path / "bad", **settings)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"max_image_tiles": 6}, "max_image_tiles is 6"),
        ({"size": {"height": 56, "width": 56}}, "size is"),
        ({"resample": 3}, "resample is 3"),
    ],
)
def test_preprocessors_of_other_models(llama: tuple[Path, Any], tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    folder = changed(llama[0], tmp_path / "bad")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | entries))
    with pytest.raises(CheckpointError, match=message):
        load(CheckpointFiles(path=folder))


def test_a_preprocessor_that_says_no_colours(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """transformers' own are a half, not CLIP's, which the published files say."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil as Theirs

    folder = changed(llama[0], tmp_path / "plain")
    said = {name: value for name, value in PREPROCESSOR.items() if name not in ("image_mean", "image_std")}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    theirs, config = Theirs.from_pretrained(folder), load(CheckpointFiles(path=folder)).config
    assert (list(config.pixel_mean), list(config.pixel_std)) == (list(theirs.image_mean), list(theirs.image_std))


def test_the_image_token_by_both_of_its_names(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """transformers calls it image_token_id too."""
    folder = changed(llama[0], tmp_path / "other")
    raw = json.loads((folder / "config.json").read_text())
    raw["image_token_id"] = raw.pop("image_token_index")
    assert MllamaConfig.from_dict(raw).image_token_index == 70
    (folder / "config.json").write_text(json.dumps(raw))
    assert load(CheckpointFiles(path=folder)).config.tokens.image == 70


def rewritten(folder: Path, into: Path, change: Any) -> Path:
    """A copy in one file whose tensors went through `change`."""
    changed(folder, into)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in into.glob("*.safetensors*"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, into / "model.safetensors")
    return into


def test_a_missing_projector(llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder = rewritten(llama[0], tmp_path / "bad", lambda all_: {n: t for n, t in all_.items() if "projector" not in n})
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.weight"):
        load(CheckpointFiles(path=folder))


def test_embedding_rows_other_than_the_head_and_8(llama: tuple[Path, Any], tmp_path: Path) -> None:
    name = "language_model.model.embed_tokens.weight"
    folder = rewritten(llama[0], tmp_path / "bad", lambda all_: all_ | {name: all_[name][:-1]})
    with pytest.raises(CheckpointError, match=rf"{name}.*\(77, 48\).*\(78, 48\)"):
        load(CheckpointFiles(path=folder))


def test_the_language_model_without_its_vision_encoder(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """As transformers' MllamaForCausalLM is saved."""
    front = "language_model."
    folder = rewritten(
        llama[0], tmp_path / "text", lambda all_: {n.removeprefix(front): t for n, t in all_.items() if n.startswith(front)}
    )
    text = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"without its vision encoder .*Bring the whole checkpoint"):
        load(CheckpointFiles(path=folder))


def test_a_text_only_llama(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """Llama 3.2 1B and 3B are language models and nothing else."""
    rows = {"model.embed_tokens.weight": torch.zeros(70, 48), "model.layers.0.self_attn.q_proj.weight": torch.zeros(48, 48)}
    folder = rewritten(llama[0], tmp_path / "text", lambda _: rows)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 48}))
    with pytest.raises(CheckpointError, match=r"is a LLaMA language model .*, a component of a model"):
        load(CheckpointFiles(path=folder))


def test_packed_matrices_without_a_word_in_the_config(llama: tuple[Path, Any], tmp_path: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj"
    folder = rewritten(llama[0], tmp_path / "bad", lambda all_: all_ | {f"{name}.qweight": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=r"up_proj\.qweight: its matrices are published quantised"):
        load(CheckpointFiles(path=folder))


@pytest.mark.parametrize("folder", [True, False])
def test_gguf(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "Llama-3.2-11B-Vision-Q4_K.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CheckpointError, match=r"is GGUF, llama\.cpp's format"):
        load(CheckpointFiles(path=tmp_path if folder else path))


def test_a_tokenizer_of_another_model(llama: tuple[Path, Any], tmp_path: Path) -> None:
    folder = changed(llama[0], tmp_path / "bad")
    write_tokenizer(folder, [*WORDS[:30], "<|image|>", *WORDS[30:-1]], SPECIAL)
    with pytest.raises(CheckpointError, match=r"<\|image\|> is 30, config.json says 70"):
        load(CheckpointFiles(path=folder))


def test_names_of_the_tiny_model_are_the_config_s() -> None:
    assert our_config(their_config()).tokens.image == IMAGE


@pytest.mark.slow
@pytest.mark.parametrize("live", [False, True], ids=["published names", "live names"])
def test_parity_against_transformers(llama: tuple[Path, Any], bundle: Path, tmp_path: Path, live: bool) -> None:
    folder, out = llama[0], Path(shutil.copytree(bundle, tmp_path / "copy.bundle"))
    if live:
        folder = rewritten(folder, tmp_path / "live", lambda all_: {llama_vision.live_name(n): t for n, t in all_.items()})
        out = flamingo_export.build(folder, out=tmp_path / "live.bundle", parity="skip").path
    report = check_bundle(out, backend="onnxruntime", checkpoint=folder, against="transformers")
    assert report.verdict == "passed", report.summary
    assert report.not_run == ()
    assert "inputs of the listed vision layers" in report.summary
    assert {row.subgraph for row in report.rows if row.level == "layer"} == {f"decoder/layer.{layer}" for layer in range(4)}
    assert {(trace.search, trace.outcome) for trace in report.traces} == {("greedy", "equal"), ("beam", "equal")}


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["lower_feature_indices", "mask_rows"])
def test_parity_fails_without_a_correction(
    llama: tuple[Path, Any], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, correction: str
) -> None:
    monkeypatch.setattr(f"flamingo_export.validate.expected.transformers.mllama.{correction}", lambda _: None)
    out = Path(shutil.copytree(bundle, tmp_path / "copy.bundle"))
    report = check_bundle(out, backend="onnxruntime", checkpoint=llama[0], against="transformers")
    assert report.verdict == "failed"


@pytest.mark.slow
def test_transformers_part_by_part_is_transformers_as_a_whole(llama: tuple[Path, Any]) -> None:
    source = CheckpointSource(llama[0])
    parts = TransformersParts(source, "fp32")
    cases = (*decoder_cases(source.config), *pixel_cases(source.config))
    joined, whole = (Goldens(weights_sha256="", storage="fp32", model="") for _ in range(2))
    record_numbers(parts, joined, cases=cases)
    record_whole(parts.fp64, parts.rounded, source.config, cases, whole)
    assert len(whole.expected) == 4
    for key, expected in whole.expected.items():
        assert np.abs(joined.expected[key].values - expected.values).max() < 1e-12 * expected.peak
