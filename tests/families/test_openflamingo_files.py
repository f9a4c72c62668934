"""OpenFlamingo's files as they are found: vision encoders that were trained, v1's two names, LLaMA without rows of the added tokens, Otter's
folder, open_clip's files, MosaicGPT's slopes. Compared with transformers' models joined by the published equations."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_runs import assert_as_exact, opened
from openflamingo_models import SIDE, VOCAB, Theirs, draw
from published_files import write_openflamingo, write_tokenizer
from safetensors.numpy import load_file, save_file

import flamingo_export
from flamingo_reference.checkpoints.files.tensors import CheckpointError
from flamingo_reference.checkpoints.loading import Checkpoint, CheckpointFiles, load
from flamingo_reference.config import AlibiPositions, ViTConfig
from flamingo_reference.input_format import OPENFLAMINGO, OTTER, with_bos
from flamingo_reference.model import Flamingo, torch_from_numpy
from flamingo_reference.phi import phi_from_tokens

PROMPT = [0, 7, 8, 62, 9, 10, 11, 62, 62, 12, 61, 13, 14]


def images() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def logits(found: Checkpoint, prompt: list[int] = PROMPT) -> torch.Tensor:
    """[S, V] of the reference in fp64 with a checkpoint's weights."""
    model = Flamingo(found.config).double()
    state = {name: torch_from_numpy(np.array(found.reader.read(name))) for name in found.reader.names()}
    model.load_state_dict(state)
    phi = torch.from_numpy(phi_from_tokens(np.array([prompt]), found.config.tokens.image, found.config.tokens.reset))
    with torch.no_grad():
        bank = model.media_kv(model.latents(images().double()[:, None]))
        answer: torch.Tensor = model(torch.tensor([prompt]), bank, torch.arange(3)[None], phi)[0]
    return answer


def rounded(theirs: Theirs) -> Theirs:
    """The model whose numbers are those of its files, which are fp32."""
    theirs.tensors = {name: tensor.float().double() for name, tensor in theirs.tensors.items()}
    theirs.norms = theirs.norms.float().double()
    return theirs.to(torch.float32).to(torch.float64)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """transformers turns, and takes softmax, in fp32 whatever the model's type: the agreement is that of fp32."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.square().mean().sqrt().item())


def saved(source: CheckpointFiles) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(source.path, weights_only=True)["model_state_dict"]
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


# Vision encoders in checkpoint.pt.


@pytest.mark.parametrize("given", ["openai", "transformers"])
@pytest.mark.parametrize("kept", ["open_clip's visual", "a whole open_clip", "transformers' model"])
def test_a_vision_encoder_that_was_trained_is_used(tmp_path: Path, kept: str, given: str) -> None:
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path, theirs, layout=given)
    stock = theirs.logits(PROMPT, images())
    draw(theirs.clip, 77)  # what further training made of it
    held = theirs.vision("transformers" if kept == "transformers' model" else "openai")
    if kept == "open_clip's visual":
        held = {name.removeprefix("visual."): tensor for name, tensor in held.items() if name.startswith("visual.")}
    torch.save(
        saved(source) | {f"vision_encoder.{name}": torch.from_numpy(np.array(each)).float() for name, each in held.items()},
        source.path,
    )
    found = load(source)
    assert any("vision encoder that was trained further" in note for note in found.notes)
    wanted = rounded(theirs).logits(PROMPT, images())
    assert_same(logits(found), wanted)
    assert (wanted - stock).abs().max() > 0.1
    given_way = [name for name, reason in found.ignored.items() if reason == "trained further: checkpoint.pt has it"]
    assert any("conv1" in name or "patch_embedding" in name for name in given_way)


def test_a_vision_encoder_of_which_one_layer_was_trained(tmp_path: Path) -> None:
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path, theirs)
    before = copy.deepcopy(theirs.clip.state_dict())
    draw(theirs.clip, 77)
    after = theirs.clip.state_dict()
    theirs.clip.load_state_dict({name: after[name] if "layers.1." in name else before[name] for name in before})
    held = {name: tensor for name, tensor in theirs.vision("openai").items() if "resblocks.1." in name}
    torch.save(
        saved(source)
        | {
            name.replace("visual.", "module.vision_encoder._fsdp_wrapped_module."): torch.from_numpy(np.array(each)).float()
            for name, each in held.items()
        },
        source.path,
    )
    assert_same(logits(load(source)), rounded(theirs).logits(PROMPT, images()))


def test_what_no_vision_encoder_has_is_named(tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path, Theirs("mpt"))
    torch.save(saved(source) | {"vision_encoder.head.weight": torch.ones(2, 2)}, source.path)
    with pytest.raises(CheckpointError, match=r"unknown vision_encoder\.head\.weight \(2, 2\)"):
        load(source)


# v1.


def in_v1(state: dict[str, torch.Tensor], layers: str) -> dict[str, torch.Tensor]:
    """A module that is listed twice is saved under both names."""
    second = {}
    for name, tensor in state.items():
        match = re.fullmatch(rf"lang_encoder\.{re.escape(layers)}\.(\d+)\.gated_cross_attn_layer\.(.+)", name)
        if match:
            second[f"lang_encoder.gated_cross_attn_layers.{match[1]}.{match[2]}"] = tensor
    assert second
    return state | second


@pytest.mark.parametrize("copied", [False, True], ids=["one storage", "copies"])
def test_v1_saved_gated_blocks_under_two_names(tmp_path: Path, copied: bool) -> None:
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path, theirs)
    state = in_v1(saved(source), "transformer.blocks")
    torch.save({name: tensor.clone() for name, tensor in state.items()} if copied else state, source.path)
    found = load(source)
    assert_same(logits(found), rounded(theirs).logits(PROMPT, images()))
    second = [name for name, reason in found.ignored.items() if reason.startswith("second name of ")]
    assert len(second) == len(state) - len(saved_names(state))


def saved_names(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if ".gated_cross_attn_layers." not in name]


def test_v1_with_different_numbers_under_two_names(tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path, Theirs("mpt"))
    state = in_v1(saved(source), "transformer.blocks")
    name = "lang_encoder.gated_cross_attn_layers.1.ff.1.weight"
    state[name] = state[name] + 1e-3
    torch.save(state, source.path)
    with pytest.raises(CheckpointError, match=r"are two names of one tensor, and hold different numbers"):
        logits(load(source))


def test_a_tied_output_saved_by_its_own_name(tmp_path: Path) -> None:
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path, theirs)
    assert source.language_model is not None
    path = source.language_model / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].copy()}, path)
    state = saved(source)
    torch.save(state | {"lang_encoder.lm_head.weight": state["lang_encoder.transformer.wte.weight"]}, source.path)
    found = load(source)
    assert found.config.language_model.tied_head
    assert {"lm_head.weight", "lang_encoder.lm_head.weight"} <= set(found.ignored)
    assert_same(logits(found), rounded(theirs).logits(PROMPT, images()))


def test_an_mpt_whose_output_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    """transformers' MPT can be so; the output is not the embedding then, nor may it be taken for one that was left in."""
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path, theirs)
    assert source.language_model is not None
    generator = torch.Generator().manual_seed(8)
    head = torch.randn(theirs.lm.lm_head.weight.shape, generator=generator) / theirs.width**0.5
    raw = json.loads((source.language_model / "config.json").read_text())
    (source.language_model / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        load(source)
    path = source.language_model / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": head.numpy()}, path)
    theirs.lm.lm_head.weight = torch.nn.Parameter(head.double())
    found = load(source)
    assert not found.config.language_model.tied_head
    assert_same(logits(found), rounded(theirs).logits(PROMPT, images()))


# LLaMA.


def without_head_rows(tmp_path: Path) -> tuple[Theirs, CheckpointFiles]:
    """OpenFlamingo-9B-deprecated's kind: three tokens were added to the embedding, whose rows are saved; the output's are not."""
    theirs = Theirs("llama")
    source = write_openflamingo(tmp_path, theirs)
    assert source.language_model is not None
    path, added = source.language_model / "model.safetensors", 3
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][: VOCAB - added].copy()
    save_file(tensors, path)
    raw = json.loads((source.language_model / "config.json").read_text())
    raw |= {"vocab_size": VOCAB - added, "eos_token_id": 2}
    (source.language_model / "config.json").write_text(json.dumps(raw))
    return theirs, source


def test_added_tokens_without_rows_are_never_generated(tmp_path: Path) -> None:
    theirs, source = without_head_rows(tmp_path)
    result = flamingo_export.build(source, out=tmp_path / "of.bundle", parity="skip")  # type: ignore[arg-type]
    tokens = result.manifest.config.tokens
    assert (tokens.image, tokens.eoc, tokens.pad) == (62, 61, 63)
    assert set(tokens.never) == {61, 62, 63}
    assert tokens.stops == (61, 2)
    assert any("tokens 61 to 63 were added in training" in note for note in result.manifest.notes)
    assert any("attends to the image last shown before it" in note for note in result.manifest.notes)
    rounded(theirs)
    exact = theirs.logits(PROMPT, images())
    eager = theirs.to(torch.float32).logits(PROMPT, images())
    with opened(result.path) as runs:
        found = runs.logits(PROMPT, images())
        assert found.shape[1] == VOCAB
        assert_as_exact(found[:, :61], exact[:, :61], eager[:, :61])
        for beams in (1, 3):
            said = runs.generate(PROMPT[:4], images()[:1], beams=beams, new_tokens=12)
            assert not any({61, 62, 63} & {*text.token_ids} for text in said)


def test_a_text_of_such_a_model_ends_where_the_language_model_ends_its_own(tmp_path: Path) -> None:
    _, source = without_head_rows(tmp_path)
    assert source.language_model is not None
    path = source.language_model / "model.safetensors"
    tensors = load_file(path)
    bundle = flamingo_export.build(source, out=tmp_path / "a.bundle", parity="skip").path  # type: ignore[arg-type]
    with opened(bundle) as runs:
        said = runs.generate(PROMPT[:4], images()[:1], beams=1, new_tokens=6)[0].token_ids
    assert len(said) == 6
    swapped = tensors["lm_head.weight"].copy()
    swapped[[2, said[0]]] = swapped[[said[0], 2]]  # the first token that it says is the end now
    save_file(tensors | {"lm_head.weight": swapped}, path)
    bundle = flamingo_export.build(source, out=tmp_path / "b.bundle", parity="skip").path  # type: ignore[arg-type]
    with opened(bundle) as runs:
        assert runs.generate(PROMPT[:4], images()[:1], beams=1, new_tokens=6)[0].token_ids == (2,)


@pytest.mark.parametrize(
    ("said", "contradicts"),
    [
        ({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}, True),
        ({"bos_token_id": 1, "eos_token_id": 1}, True),
        ({"bos_token_id": 1, "eos_token_id": 2}, False),
        ({"bos_token_id": 1, "eos_token_id": [2, 5]}, False),
    ],
)
def test_the_first_llamas_config_names_other_tokens_than_its_tokenizer(
    tmp_path: Path, said: dict[str, Any], contradicts: bool
) -> None:
    """OpenFlamingo 0.0.x was trained on LLaMA as it was first converted, whose config.json has `<unk>` and `<s>` for `<s>` and `</s>`."""
    _, source = without_head_rows(tmp_path)
    assert source.language_model is not None
    path = source.language_model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    special = ["<unk>", "<s>", "</s>"]
    write_tokenizer(source.language_model, [*special, *(f"w{index}" for index in range(3, 61))], special)
    result = flamingo_export.build(source, out=tmp_path / "of.bundle", parity="skip")  # type: ignore[arg-type]
    tokens = result.manifest.config.tokens
    assert tokens.bos == 1
    assert tokens.stops == ((61, 2, 5) if isinstance(said["eos_token_id"], list) else (61, 2))
    assert any("the tokenizer's <s> (1) and </s> (2) are used" in note for note in result.manifest.notes) == contradicts


def test_candidates_of_such_a_model_end_with_a_token_that_it_says(tmp_path: Path) -> None:
    _, source = without_head_rows(tmp_path)
    bundle = flamingo_export.build(source, out=tmp_path / "of.bundle", parity="skip").path  # type: ignore[arg-type]
    picture = np.full((40, 30, 3), 90, np.uint8)
    with flamingo_export.load(bundle, threads=1) as model:
        found = model.score("<image> w7", ["w8", "w9 w10"], images=[picture])
        assert model.tokenizer is not None
        ids = model.tokenizer.encode("<image> w7")
        wanted = model.score(ids, [[8, 2], [9, 10, 2]], images=[picture])
    assert np.isfinite([each.logprob for each in found]).all()
    np.testing.assert_allclose([each.logprob for each in found], [each.logprob for each in wanted], rtol=1e-5)


def test_rows_that_are_missing_elsewhere_are_an_error(tmp_path: Path) -> None:
    """An embedding that was not saved either: nobody knows what the added tokens mean."""
    _, source = without_head_rows(tmp_path)
    state = saved(source)
    del state["lang_encoder.model.embed_tokens.weight"]
    torch.save(state, source.path)
    with pytest.raises(CheckpointError, match="outside the vocabulary of 61"):
        load(source)


def test_bans_of_the_language_models_generation_config_are_applied(tmp_path: Path) -> None:
    """OpenFlamingo's generate is the language model's own, with another token that ends texts."""
    source = write_openflamingo(tmp_path, Theirs("mpt"))
    plain = load(source).config.tokens
    assert source.language_model is not None
    says = {"eos_token_id": [0, 9_999], "suppress_tokens": [7], "bad_words_ids": [[8], [5, 6]], "temperature": 0.2}
    (source.language_model / "generation_config.json").write_text(json.dumps(says))
    found = load(source)
    assert found.config.tokens == msgspec.structs.replace(plain, banned=(*plain.banned, 7, 8))
    assert dict(found.generation.not_applied) == {"temperature": 0.2, "bad_words_ids": [[5, 6]]}
    (source.language_model / "generation_config.json").write_text(json.dumps({"suppress_tokens": [9_999]}))
    with pytest.raises(CheckpointError, match=r"lm.generation_config\.json: suppress_tokens holds 9999, expected ids of"):
        load(source)


# Otter.


def write_otter(folder: Path, theirs: Theirs, *, model_type: str = "otter") -> CheckpointFiles:
    """One folder with everything, by the names of Otter's classes."""
    folder.mkdir()
    layers = "transformer.blocks" if theirs.kind == "mpt" else "model.layers"
    tensors: dict[str, Any] = {}
    for name, tensor in theirs.checkpoint().items():
        if name.startswith("lang_encoder.") and "gated_cross" not in name:
            continue
        name = re.sub(r"^(perceiver\.layers\.\d+)\.0\.", r"\1.", name)
        name = re.sub(r"^(perceiver\.layers\.\d+)\.1\.", r"\1.feed_forward.", name)
        tensors[name.replace(".gated_cross_attn_layer.ff.", ".gated_cross_attn_layer.feed_forward.")] = tensor
    for name, tensor in theirs.language_model().items():
        tensors["lang_encoder." + re.sub(rf"^({re.escape(layers)}\.\d+)\.", r"\1.decoder_layer.", name)] = tensor
    tensors |= {f"vision_encoder.{name}": tensor for name, tensor in theirs.vision("transformers").items()}
    save_file({name: np.ascontiguousarray(each, np.float32) for name, each in tensors.items()}, folder / "model.safetensors")
    text = theirs.language_model_config()
    if theirs.kind == "mpt":
        text |= {"architectures": ["MPTForCausalLM"], "model_type": ""}
    raw = {
        "model_type": model_type, "architectures": ["OtterForConditionalGeneration"], "cross_attn_every_n_layers": theirs.every,
        "text_config": text, "vision_config": theirs.clip.config.to_dict(), "use_media_placement_augmentation": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    bos = ["<s>"] if theirs.kind == "llama" else []
    added = ["<|endofchunk|>", "<image>", "<answer>"] if model_type == "otter" else ["<|endofchunk|>", "<image>"]
    words = ["<unk>", *(bos or ["w1"]), *(f"w{index}" for index in range(2, VOCAB - 1 - len(added))), *added, "<PAD>"]
    write_tokenizer(folder, words, [*bos, *added, "<PAD>"])
    return CheckpointFiles(path=folder)


@pytest.mark.parametrize("model_type", ["otter", "flamingo"])
@pytest.mark.parametrize("kind", ["mpt", "llama"])
def test_otters_folder(tmp_path: Path, kind: str, model_type: str) -> None:
    theirs = Theirs(kind)
    source = write_otter(tmp_path / "otter", theirs, model_type=model_type)
    result = flamingo_export.build(source.path, out=tmp_path / "otter.bundle", parity="skip")
    inputs = OTTER if model_type == "otter" else OPENFLAMINGO
    assert result.manifest.inputs == (with_bos(inputs, "<s>") if kind == "llama" else inputs)
    tokens = result.manifest.config.tokens
    assert (tokens.eoc, tokens.image, tokens.pad) == ((60, 61, 63) if model_type == "otter" else (61, 62, 63))
    assert any("attends to the image last shown before it" in note for note in result.manifest.notes)
    prompt = [tokens.image if token == 62 else token for token in PROMPT if token != 61]
    place = {62: tokens.image}
    wanted_prompt = [token for token in PROMPT if token != 61]
    assert prompt == [place.get(token, token) for token in wanted_prompt]
    found = load(source)
    theirs_tokens = rounded(theirs)
    if tokens.image == 62:
        assert_same(logits(found, prompt), theirs_tokens.logits(prompt, images()))
    else:
        import openflamingo_models

        known, openflamingo_models.IMAGE = openflamingo_models.IMAGE, tokens.image
        try:
            assert_same(logits(found, prompt), theirs_tokens.logits(prompt, images()))
        finally:
            openflamingo_models.IMAGE = known


@pytest.mark.parametrize("said", [True, False])
def test_an_otter_that_may_have_attended_to_the_next_image(tmp_path: Path, said: bool) -> None:
    source = write_otter(tmp_path / "otter", Theirs("mpt"))
    path = source.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"only_attend_previous": said}))
    assert any("only_attend_previous false" in note for note in load(source).notes) != said


def test_an_otter_whose_config_contradicts_its_tensors(tmp_path: Path) -> None:
    source = write_otter(tmp_path / "otter", Theirs("mpt"))
    path = source.path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"cross_attn_every_n_layers": 4}))
    with pytest.raises(CheckpointError, match="a gated block every 4 layers, the tensors have one every 2"):
        load(source)
    path.write_text(json.dumps(raw | {"text_config": raw["text_config"] | {"architectures": ["RWForCausalLM"]}}))
    with pytest.raises(CheckpointError, match="model_type is '', which is not supported; expected 'llama'"):
        load(source)
    path.write_text(json.dumps({name: value for name, value in raw.items() if name != "vision_config"}))
    with pytest.raises(CheckpointError, match="vision_config is None, expected dict"):
        load(source)


# open_clip.


def write_open_clip(folder: Path, theirs: Theirs, name: str, **model: Any) -> Path:
    """A folder as open_clip's are on the hub."""
    folder.mkdir()
    tensors = {each: np.ascontiguousarray(array, np.float32) for each, array in theirs.vision("openai").items()}
    if name.endswith(".bin"):
        torch.save({each: torch.from_numpy(array) for each, array in tensors.items()}, folder / name)
    else:
        save_file(tensors, folder / name)
    vision = {"image_size": SIDE, "layers": 2, "width": 64, "patch_size": 7} | model.pop("vision_cfg", {})
    images = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
              "interpolation": "bicubic", "resize_mode": "shortest"} | model.pop("preprocess_cfg", {})  # fmt: skip
    raw = {
        "model_cfg": {"embed_dim": 4, "vision_cfg": vision, "text_cfg": {"width": 4}, **model},
        "preprocess_cfg": images,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(raw))
    return folder


def with_activation(theirs: Theirs, activation: str, heads: int = 1) -> Theirs:
    from transformers import CLIPVisionModel

    config = copy.deepcopy(theirs.clip.config)
    config.hidden_act, config.num_attention_heads = activation, heads
    changed = CLIPVisionModel._from_config(config, attn_implementation="eager").double().eval()
    changed.load_state_dict(theirs.clip.state_dict())
    theirs.clip = changed
    return theirs


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize(("model", "activation", "heads"), [
    ({"quick_gelu": True}, "quick_gelu", 1), ({}, "gelu", 1), ({"quick_gelu": False, "vision_cfg": {"head_width": 16}}, "gelu", 4),
])  # fmt: skip
def test_open_clip_says_activation_and_heads(tmp_path: Path, name: str, model: Any, activation: str, heads: int) -> None:
    theirs = with_activation(Theirs("mpt"), activation, heads)
    source = write_openflamingo(tmp_path / "of", theirs)
    folder = write_open_clip(tmp_path / "clip", theirs, name, **dict(model))
    wanted = rounded(theirs).logits(PROMPT, images())
    for path in (folder, folder / name):
        found = load(msgspec.structs.replace(source, vision_encoder=path))
        assert isinstance(found.config.vision, ViTConfig)
        assert (found.config.vision.activation, found.config.vision.num_heads) == (activation, heads)
        assert_same(logits(found), wanted)


def test_a_file_that_is_not_openais_own_is_not_guessed_at(tmp_path: Path) -> None:
    """LAION's ViT-L/14 has every shape of OpenAI's, and GELU where that has QuickGELU."""
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path / "of", theirs)
    torch.save({name: torch.from_numpy(np.array(each)) for name, each in theirs.vision("openai").items()}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"x\.pt is not OpenAI's own file \(it lacks input_resolution, .*open_clip_config"
    ):
        load(msgspec.structs.replace(source, vision_encoder=tmp_path / "x.pt"))


def test_open_clips_file_beside_one_of_timms(tmp_path: Path) -> None:
    theirs = with_activation(Theirs("mpt"), "gelu")
    source = write_openflamingo(tmp_path / "of", theirs)
    folder = write_open_clip(tmp_path / "clip", theirs, "open_clip_model.safetensors")
    save_file({"blocks.0.attn.qkv.weight": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_large_patch14_clip_224"}))
    assert_same(logits(load(msgspec.structs.replace(source, vision_encoder=folder))), rounded(theirs).logits(PROMPT, images()))


def test_images_are_prepared_as_open_clip_says(tmp_path: Path) -> None:
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path / "of", theirs)
    how = {"mean": [0.5, 0.25, 0.75], "std": [0.5, 0.5, 1], "resize_mode": "squash"}
    folder = write_open_clip(tmp_path / "clip", theirs, "open_clip_model.safetensors", quick_gelu=True, preprocess_cfg=how)
    found = load(msgspec.structs.replace(source, vision_encoder=folder))
    assert (found.config.pixel_mean, found.config.pixel_std) == ((0.5, 0.25, 0.75), (0.5, 0.5, 1.0))
    assert found.inputs.fit == "stretch"


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name is 'vit', which is not supported"),
        ({"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs is {'approximate': 'tanh'}, which is not"),
        ({"vision_cfg": {"head_width": 24}}, "head_width 24 does not divide the encoder's width 64"),
        ({"vision_cfg": {"layers": 24}}, "layers is 24, the tensors have 2"),
        ({"vision_cfg": {"layers": [1, 1]}}, r"layers is \[1, 1\], the tensors have 2"),
        ({"vision_cfg": {"image_size": 336}}, "image_size is 336, the tensors have 28"),
        ({"vision_cfg": {"no_ln_pre": True}}, "no_ln_pre is True, which is not supported"),
        ({"preprocess_cfg": {"interpolation": "bilinear"}}, "interpolation is 'bilinear', which is not supported"),
        ({"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode is 'longest', which is not supported"),
        ({"preprocess_cfg": {"mean": [0.5]}}, r"mean is \[0.5\], expected three numbers"),
        ({"quick_gelu": "yes"}, "quick_gelu is 'yes', expected bool"),
    ],
)
def test_what_open_clip_says_that_has_no_counterpart(tmp_path: Path, model: Any, named: str) -> None:
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path / "of", theirs)
    folder = write_open_clip(tmp_path / "clip", theirs, "open_clip_model.safetensors", **dict(model))
    with pytest.raises(CheckpointError, match=named):
        load(msgspec.structs.replace(source, vision_encoder=folder))


# MosaicGPT.


@pytest.mark.parametrize("heads", [1, 2, 6, 12, 16, 24, 31, 32, 40])
def test_slopes(heads: int) -> None:
    """MPT's are transformers'; MosaicGPT's are the formula of its own code, 1 / 2 ** (8 * head / heads) for heads counted from 1."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_mpt_alibi_tensor(heads, 2, alibi_bias_max=8)[:, 0, -2].neg().double().reshape(-1)
    np.testing.assert_allclose(AlibiPositions().slopes(heads), theirs, rtol=1e-6)
    mosaic = 1.0 / 2.0 ** (np.arange(1, heads + 1) * 8.0 / heads)
    np.testing.assert_allclose(AlibiPositions(rounded=False).slopes(heads), mosaic, rtol=1e-12)
    assert (heads & (heads - 1) == 0) == np.allclose(AlibiPositions().slopes(heads), mosaic)


@pytest.mark.parametrize(("model_type", "rounded_slopes"), [("mosaic_gpt", False), ("mpt", True)])
def test_which_slopes_a_checkpoint_has(tmp_path: Path, model_type: str, rounded_slopes: bool) -> None:
    source = write_openflamingo(tmp_path, Theirs(model_type))
    positions = load(source).config.language_model.positions
    assert positions == AlibiPositions(rounded=rounded_slopes)
