"""The reference against transformers' IDEFICS, whole: pixels to logits, and the tokens that both generate."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from idefics_models import (
    END,
    FAKE,
    IMAGE,
    PROMPTS,
    generated,
    our_config,
    our_model,
    pixels,
    published,
    their_config,
    their_logits,
    their_model,
)

from flamingo_reference.checkpoints.converted import source_shapes
from flamingo_reference.checkpoints.families import idefics
from flamingo_reference.config import ConfigError, ModelConfig
from flamingo_reference.names import expected_tensors, parameter_counts
from flamingo_reference.phi import phi_from_tokens
from flamingo_reference.search import Rules, beam_search, flamingo_next_logits

KINDS = [(True, False), (False, True), (True, True), (False, False)]


def ours(model: Any, tokens: list[int], images: torch.Tensor) -> torch.Tensor:
    config: ModelConfig = model.config
    bank = model.media_kv(model.latents(images[0][:, None]))
    phi = torch.from_numpy(phi_from_tokens(np.array([tokens]), config.tokens.image, config.tokens.reset))
    return model(torch.tensor([tokens]), bank, torch.arange(images.shape[1])[None], phi)[0]


@pytest.mark.parametrize(("qk_norm", "vector"), KINDS)
@pytest.mark.parametrize("case", PROMPTS)
def test_logits(case: str, qk_norm: bool, vector: bool) -> None:
    model = their_model(their_config(qk_norm=qk_norm, vector=vector))
    tokens = PROMPTS[case]
    images = pixels(tokens.count(IMAGE))
    wanted, found = their_logits(model, tokens, images), ours(our_model(model), tokens, images)
    # transformers turns, normalises and takes softmax in fp32 whatever the model's type: the agreement is that of fp32.
    torch.testing.assert_close(found, wanted, rtol=0, atol=4e-6 * wanted.square().mean().sqrt().item())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["several images", "text before the first image", "an end, then another image"])
def test_generated_tokens(case: str, beams: int) -> None:
    model = their_model(their_config(vector=True), seed=3)
    tokens = PROMPTS[case]
    images = pixels(tokens.count(IMAGE), seed=1)
    wanted, scores = generated(model, tokens, images, beams=beams, new_tokens=8)
    reference = our_model(model)
    bank = reference.media_kv(reference.latents(images[0][:, None]))
    ask = flamingo_next_logits(reference, bank, list(range(images.shape[1])))
    found = beam_search(ask, tokens, Rules(eoc=END, image=IMAGE, banned=(FAKE,), max_new_tokens=8), beams=beams)
    assert found.closest > 1e-4  # so that the two may not differ by a tie
    assert [list(each.token_ids) for each in found.hypotheses] == wanted
    if beams > 1:
        assert [each.score for each in found.hypotheses] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_used_or_ignored_with_a_reason(tied: bool) -> None:
    config = their_config(tied=tied)
    model = their_model(config)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        names = {name: shape for name, shape in names.items() if not name.startswith("lm_head.")}
    recipes = idefics.recipes(our_config(config), additional_vocab=2)
    assert expected_tensors(our_config(config)).keys() == recipes.keys()
    read = source_shapes(recipes)
    left = {name for name in names if not any(re.fullmatch(pattern, name) for pattern, _ in idefics.IGNORED)}
    assert read == {name: names[name] for name in left}


def test_recipes_give_our_shapes() -> None:
    model = their_model(their_config(vector=True))
    state = our_model(model).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_tensors(our_config(model.config))


def test_the_published_sizes() -> None:
    """config.json of idefics-9b and -80b, the entries that matter (facts/checkpoints.md)."""
    raw = {
        "additional_vocab_size": 2, "cross_layer_interval": 4, "qk_layer_norms": True, "use_resampler": True, "vocab_size": 32000,
        "vision_config": {"embed_dim": 1280, "hidden_act": "gelu", "image_size": 224, "intermediate_size": 5120,
                          "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14},
        "perceiver_config": {"qk_layer_norms_perceiver": True, "resampler_depth": 6, "resampler_head_dim": 96,
                             "resampler_n_heads": 16, "resampler_n_latents": 64},
    }  # fmt: skip
    small = idefics.config_from(
        {**raw, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    )
    large = idefics.config_from(
        {**raw, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 22016}
    )
    for config, gated, width, layers in ((small, 8, 4096, 32), (large, 20, 8192, 80)):
        config.validate()
        assert (len(config.gated_layers), config.language_model.vocab_size) == (gated, 32002)
        shapes = source_shapes(idefics.recipes(config, additional_vocab=2))
        assert shapes["model.embed_tokens.additional_embedding.weight"] == (2, width)
        assert shapes[f"model.layers.{layers - 1}.mlp.down_proj.weight"] == (width, config.language_model.ffw_width)
        assert shapes["model.gated_cross_attn_layers.0.cross_attn.k_proj.weight"] == (width, 1280)
        assert shapes["model.perceiver_resampler.blocks.5.0.output_proj.weight"] == (1280, 1536)
        assert shapes["model.vision_model.embeddings.position_embedding.weight"] == (257, 1280)
    counts = {name: count / 1e9 for name, count in parameter_counts(small).items()}
    assert counts == pytest.approx(
        {"vision_encoder": 0.63, "resampler": 0.126, "cross_attention": 1.45, "language_model": 6.74}, rel=0.02
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_resampler": False}, "use_resampler is false"),
        ({"alpha_type": "matrix"}, "alpha_type is 'matrix', which is not supported; expected 'float', 'vector'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"hidden_size": "large"}, "hidden_size is 'large', expected int"),
        ({"num_attention_heads": 5}, "hidden_size 48 must be a multiple of num_attention_heads 5"),
        ({"cross_layer_interval": 4}, "num_hidden_layers 6 one of cross_layer_interval 4"),
        ({"vision_config": {"hidden_act": "tanh"}}, "vision_config: hidden_act is 'tanh'"),
    ],
)
def test_configs_that_are_not_supported(change: dict[str, Any], message: str) -> None:
    raw = published(their_config())
    with pytest.raises(ConfigError, match=message):
        idefics.config_from({**raw, **change})
