"""OpenFlamingo: the reference and the built engines against transformers' language models and CLIP, joined by the published equations."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import assert_as_exact, opened
from openflamingo_models import IMAGE, KINDS, SIDE, TOKENS, Theirs, files_of, ours

import flamingo_export
from flamingo_reference.checkpoints.converted import source_shapes
from flamingo_reference.checkpoints.families import openflamingo, openflamingo_files
from flamingo_reference.config import ConfigError
from flamingo_reference.model import Flamingo
from flamingo_reference.names import expected_tensors
from flamingo_reference.phi import phi_from_tokens

PROMPT = [0, 7, 8, IMAGE, 9, 10, 11, IMAGE, IMAGE, 12, 61, 13, 14]


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def our_logits(model: Flamingo, tokens: list[int], images: torch.Tensor) -> torch.Tensor:
    bank = model.media_kv(model.latents(images.double()[:, None]))
    phi = torch.from_numpy(phi_from_tokens(np.array([tokens]), IMAGE, model.config.tokens.reset))
    logits: torch.Tensor = model(torch.tensor([tokens]), bank, torch.arange(len(images))[None], phi)[0]
    return logits


@pytest.mark.parametrize("layout", ["openai", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_reference(kind: str, layout: str) -> None:
    theirs = Theirs(kind)
    model, _ = ours(theirs, layout=layout)
    wanted = theirs.logits(PROMPT, pixels(3))
    # transformers turns, and takes softmax, in fp32 whatever the model's type: the agreement is that of fp32.
    torch.testing.assert_close(
        our_logits(model, PROMPT, pixels(3)), wanted, rtol=0, atol=4e-6 * wanted.square().mean().sqrt().item()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_engines(kind: str, tmp_path: Path) -> None:
    theirs = Theirs(kind, every=1 if kind == "mpt" else 2)
    model, _ = ours(theirs)
    flamingo_export.build(model.float(), out=tmp_path / "of.bundle", parity="skip")
    # The engines' weights are fp32, so theirs are rounded too.
    theirs.tensors = {name: tensor.float().double() for name, tensor in theirs.tensors.items()}
    theirs.norms = theirs.norms.float().double()
    exact = theirs.to(torch.float32).to(torch.float64).logits(PROMPT, pixels(3))
    eager = theirs.to(torch.float32).logits(PROMPT, pixels(3))
    with opened(tmp_path / "of.bundle") as runs:
        assert_as_exact(runs.logits(PROMPT, pixels(3)), exact, eager)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_every_tensor_is_used_or_ignored_with_a_reason(every: int) -> None:
    _, files = ours(Theirs("gpt_neox, parallel", every=every))
    config = openflamingo.config_from(files, tokens=TOKENS)
    assert (config.cross_attention.every, config.gated_layers) == (every, tuple(range(every - 1, 4, every)))
    recipes = openflamingo.recipes(config, files)
    assert recipes.keys() == expected_tensors(config).keys()
    read = source_shapes(recipes)
    held = {**files.checkpoint, **files.language_model, **files.vision}
    assert len(held) == len(files.checkpoint) + len(files.language_model) + len(files.vision)
    left = {name for name in held if not any(re.fullmatch(pattern, name) for pattern, _ in openflamingo.ignored(config, files))}
    assert read == {name: held[name] for name in left}
    assert "gpt_neox.embed_in.weight" not in left  # gives way to the trained one


@pytest.mark.parametrize("saved", ["lists", "decoder_layer"])
def test_names_as_they_were_saved(saved: str) -> None:
    theirs = Theirs("mpt")
    tensors = {"checkpoint": theirs.checkpoint(), "language_model": theirs.language_model(), "vision": theirs.vision("openai")}
    if saved == "lists":
        tensors["checkpoint"] = {
            re.sub(r"transformer\.blocks\.(\d+)\.gated_cross_attn_layer", r"gated_cross_attn_layers.\1", name): tensor
            for name, tensor in tensors["checkpoint"].items()
        }
    else:
        whole = {f"lang_encoder.{name}": tensor for name, tensor in tensors["language_model"].items() if ".blocks." in name}
        tensors["checkpoint"] |= {
            re.sub(r"(blocks\.\d+\.)", r"\1decoder_layer.", name): tensor for name, tensor in whole.items()
        }
    files = files_of(tensors, theirs.language_model_config())
    config = openflamingo.config_from(files, tokens=TOKENS)
    read = source_shapes(openflamingo.recipes(config, files))
    assert all(any(name in held for held in tensors.values()) for name in read)
    assert all(("lang_encoder" in name) == (saved == "decoder_layer") for name in read if "Wqkv" in name)


def broken(change: str) -> openflamingo_files.Files:
    """Files that do not go together."""
    theirs = Theirs("gpt_neox, parallel")
    tensors = {"checkpoint": theirs.checkpoint(), "language_model": theirs.language_model(), "vision": theirs.vision("openai")}
    raw, held = theirs.language_model_config(), tensors["checkpoint"]
    if change == "another vision encoder":
        tensors["vision"]["visual.conv1.weight"] = np.zeros((128, 3, 7, 7))
    elif change == "another language model":
        raw = {**raw, "hidden_size": 96}
    elif change == "a language model of another kind":
        raw = Theirs("mpt").language_model_config()
    elif change == "more layers":
        raw = {**raw, "num_hidden_layers": 8}
    elif change == "an unknown kind":
        raw = {**raw, "model_type": "bert"}
    elif change == "no perceiver":
        tensors["checkpoint"] = {name: tensor for name, tensor in held.items() if not name.startswith("perceiver")}
    elif change == "no CLIP":
        tensors["vision"] = {"weight": np.zeros(3)}
    elif change == "positions of media":
        held["perceiver.media_time_embs"] = np.zeros((4, 1, 64))
    elif change == "heads that do not divide":
        held["perceiver.layers.0.0.to_q.weight"] = np.zeros((100, 64))
    return files_of(tensors, raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("another vision encoder", "the perceiver's width in checkpoint.pt is 64, the other files have 128"),
        ("another language model", "the width of text in the gated blocks in checkpoint.pt is 48, the other files have 96"),
        ("a language model of another kind", r"no tensor is called lang_encoder.transformer.blocks.0.gated"),
        ("more layers", r"gated blocks before layers \[1, 3\], expected every 2th of 8"),
        ("an unknown kind", "model_type is 'bert', which is not supported; expected 'llama', 'gpt_neox', 'mosaic_gpt', 'mpt'"),
        ("no perceiver", "checkpoint.pt holds no matrix perceiver.latents"),
        ("no CLIP", "the vision file holds no CLIP image encoder"),
        ("positions of media", "media_time_embs"),
        ("heads that do not divide", "has 100 rows, expected a multiple of 64"),
    ],
)
def test_files_that_do_not_go_together(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        openflamingo.config_from(broken(change), tokens=TOKENS)


def test_rows_of_added_tokens_must_be_somewhere() -> None:
    _, files = ours(Theirs("llama"))
    config = openflamingo.config_from(files, tokens=TOKENS, vocab_size=80)
    with pytest.raises(ConfigError, match="has 64 rows for 80 tokens"):
        openflamingo.recipes(config, files)
