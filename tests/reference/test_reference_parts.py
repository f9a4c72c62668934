"""Resampler, gated cross-attention and relative attention against independent fp64 formulations (oracles.py)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from tiny_models import TINY, smaller, tiny_model
from torch.nn import functional as F
from variations import LLAMA, VARIATIONS, drawn_model

from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.model.cross_attention import phi_cross_attention
from flamingo_reference.model.decoder import LanguageModel, LanguageModelLayer
from flamingo_reference.model.modules import load_part
from flamingo_reference.model.positions import sinusoids
from flamingo_reference.phi import phi_from_tokens
from flamingo_reference.time_weights import time_weights

TIGHT: Any = {"rtol": 1e-10, "atol": 1e-12}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("frames", [1, 3, 8, 11])
def test_resampler(tiny: Flamingo, frames: int) -> None:
    features = draw(2, frames, 5, TINY.vision.feature_width)
    mix = time_weights(frames, 8).astype(np.float64)
    found = tiny.resampler(torch.from_numpy(features), torch.from_numpy(mix)).numpy()
    wanted = [oracles.resampler(oracles.weights_of(tiny.resampler), one, mix, TINY.resampler.num_heads) for one in features]
    assert found.shape == (2, TINY.resampler.num_latents, TINY.resampler.width)
    np.testing.assert_allclose(found, wanted, **TIGHT)


def test_order_of_frames_matters_and_of_patches_does_not(tiny: Flamingo) -> None:
    features = torch.from_numpy(draw(1, 3, 5, TINY.vision.feature_width))
    mix = torch.from_numpy(time_weights(3, 8)).double()
    straight = tiny.resampler(features, mix)
    torch.testing.assert_close(tiny.resampler(features.flip(2), mix), straight, **TIGHT)
    assert (tiny.resampler(features.flip(1), mix) - straight).abs().max() > 1e-2


@pytest.mark.parametrize(
    "phi",
    [
        pytest.param([[0, 0, 1, 1, 2, 2], [1, 2, 3, 3, 3, 3]], id="text first, adjacent media"),
        pytest.param([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 3]], id="no medium, medium last"),
        pytest.param([[2, 1, 2, 0, 3, 1], [3, 3, 0, 1, 1, 2]], id="any order"),
    ],
)
def test_gated_block(tiny: Flamingo, phi: list[list[int]]) -> None:
    latents = draw(5, TINY.resampler.num_latents, TINY.resampler.width)
    rows = np.array([[4, 0, 4], [2, 4, 1]])
    hidden = draw(2, 6, TINY.language_model.width, seed=1)
    block: Any = tiny.cross_attention[1]
    k, v = block.media_kv(torch.from_numpy(latents))
    found = block(torch.from_numpy(hidden), k, v, torch.from_numpy(rows), torch.tensor(phi)).numpy()
    for request in range(2):
        media = [latents[row] for row in rows[request]]
        weights = oracles.weights_of(block)
        wanted = oracles.gated_block(weights, hidden[request], media, phi[request], TINY.cross_attention.num_heads)
        np.testing.assert_allclose(found[request], wanted, **TIGHT)


def test_phi_zero_attends_to_exactly_nothing() -> None:
    q, bank = torch.randn(1, 4, 2, 10), torch.randn(3, 2, 7, 10)
    found = phi_cross_attention(q, bank, bank, torch.tensor([[1, 2]]), torch.tensor([[0, 1, 0, 2]]))
    assert torch.equal(found[0, [0, 2]], torch.zeros(2, 2, 10))
    assert found[0, [1, 3]].abs().min() > 0


def test_phi_equals_attention_over_all_media_with_a_mask() -> None:
    """Alayrac et al., figure 7: all media concatenated, all but the last one masked."""
    torch.manual_seed(0)
    q = torch.randn(1, 5, 2, 10, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, 7, 10, dtype=torch.float64)
    rows, phi = torch.tensor([[2, 0, 1]]), torch.tensor([[1, 1, 2, 3, 3]])
    found = phi_cross_attention(q, k, v, rows, phi)
    joined_k, joined_v = (x[rows[0]].transpose(0, 1).reshape(1, 2, 21, 10) for x in (k, v))
    mask = (torch.arange(21) // 7 + 1)[None, :] == phi[0][:, None]
    wanted = F.scaled_dot_product_attention(q.transpose(1, 2), joined_k, joined_v, attn_mask=mask[None, None])
    torch.testing.assert_close(found, wanted.transpose(1, 2), **TIGHT)


def test_phi_beyond_the_media_is_refused() -> None:
    q, bank = torch.randn(1, 2, 2, 10), torch.randn(3, 2, 7, 10)
    with pytest.raises(ValueError, match="phi 3 is beyond the request's 2 media"):
        phi_cross_attention(q, bank, bank, torch.tensor([[1, 2]]), torch.tensor([[0, 3]]))


@pytest.mark.parametrize("length", [1, 2, 7, 12, 15])
def test_lm_layer(tiny: Flamingo, length: int) -> None:
    """15 positions are more than the table of distances has."""
    lm = TINY.language_model
    layer = tiny.language_model.layers[3]
    hidden = draw(2, length, lm.width)
    found = layer(torch.from_numpy(hidden)).numpy()
    for row in range(2):
        wanted = oracles.lm_layer(
            oracles.weights_of(layer), hidden[row], heads=lm.num_heads, max_positions=lm.max_positions, eps=lm.norm_eps
        )
        np.testing.assert_allclose(found[row], wanted, **TIGHT)


@pytest.mark.slow
def test_distances_are_encoded_as_by_transformer_xl() -> None:
    found = sinusoids(2048, 8192, torch.empty(0, dtype=torch.float64))
    for distance in (0, 1, 63, 2047):
        np.testing.assert_allclose(found[distance].numpy(), oracles.distance_encoding(distance, 8192), rtol=0, atol=1e-9)


def test_positions_are_relative(tiny: Flamingo) -> None:
    """A layer with a window of keys gives the same wherever the window lies: only distances count."""
    layer = tiny.language_model.layers[0]
    assert isinstance(layer, LanguageModelLayer)
    lm = TINY.language_model
    hidden = torch.from_numpy(draw(1, 3, lm.width))
    cache = torch.zeros(1, lm.num_heads, 3, lm.head_size, dtype=torch.float64)
    results = []
    for offset in (0, 5000):
        positions = torch.arange(3)[None] + offset
        out, _, _ = layer.forward_cached(
            hidden,
            past_k=cache,
            past_v=cache,
            write_index_B=torch.zeros(1, dtype=torch.int64),
            positions_BS=positions,
            distance_BSC=positions[:, :, None] - positions[:, None, :],
            mask_B1SC=torch.ones(3, 3, dtype=torch.bool).tril()[None, None],
        )
        results.append(out)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], layer(hidden), **TIGHT)


@pytest.mark.parametrize("gate", [0.0, -0.3, 1e-6])
def test_gates(gate: float) -> None:
    """0: bit for bit the language model. Otherwise a step of tanh(gate) along the block's two directions."""
    model = tiny_model()
    block: Any
    for block in model.cross_attention:
        block.attention_gate.fill_(gate)
        block.ffw_gate.fill_(gate)
    tokens = torch.tensor([[1, 3, 9, 10, 3, 11], [1, 12, 13, 3, 14, 15]])
    phi = torch.from_numpy(phi_from_tokens(tokens.numpy(), TINY.tokens.image))
    kv = model.media_kv(torch.from_numpy(draw(3, TINY.resampler.num_latents, TINY.resampler.width)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype)
        found = model(tokens, [(k.to(dtype), v.to(dtype)) for k, v in kv], torch.tensor([[0, 1], [2, 0]]), phi)
        alone = model.language_model(tokens)
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert torch.equal(found, alone) == (gate == 0.0 or (gate == 1e-6 and dtype in (torch.bfloat16, torch.float16))), dtype


def test_new_model_is_its_language_model() -> None:
    model = Flamingo(TINY)
    tokens = torch.tensor([[1, 3, 9, 10]])
    pixels = torch.randn(2, 1, 3, TINY.vision.image_size, TINY.vision.image_size)
    with torch.no_grad():
        kv = model.media_kv(model.latents(pixels))
        found = model(tokens, kv, torch.tensor([[1]]), torch.tensor([[0, 1, 1, 1]]))
        assert torch.equal(found, model.language_model(tokens))


def test_output_is_tied_to_the_embedding(tiny: Flamingo) -> None:
    lm = TINY.language_model
    hidden = draw(1, 2, lm.width)
    weights = oracles.weights_of(tiny.language_model)
    wanted = oracles.rms_norm(hidden, weights["norm.weight"], lm.norm_eps) @ weights["embedding.weight"].T
    np.testing.assert_allclose(tiny.language_model.logits(torch.from_numpy(hidden)).numpy(), wanted, **TIGHT)


def test_gradients_reach_every_part_that_gates_let_through() -> None:
    """With gates open, every parameter of the bridge learns; the paper freezes the rest."""
    model = tiny_model(smaller(TINY, language_model={"num_layers": 2})).requires_grad_(True)
    pixels = torch.randn(2, 2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = model(
        torch.tensor([[1, 3, 9, 10]]), model.media_kv(model.latents(pixels)), torch.tensor([[1]]), torch.tensor([[0, 1, 1, 1]])
    )
    F.cross_entropy(logits[0, :-1], torch.tensor([3, 9, 10])).backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


@pytest.mark.parametrize("config", [*VARIATIONS.values(), TINY], ids=lambda config: config.name)
def test_a_vision_encoder_that_is_held_as_stored_computes_the_same(config: ModelConfig) -> None:
    whole = drawn_model(config).vision_encoder
    stored = {
        f"vision_encoder.{name}": tensor.to(torch.bfloat16).view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        for name, tensor in whole.state_dict().items()
    }
    read = stored.__getitem__
    wide, narrow = (load_part(config, "vision_encoder", read, narrow=held) for held in (False, True))
    size = config.vision.image_size
    tiles = () if config.tiled is None else (config.tiled.max_tiles,)
    pixels = torch.from_numpy(draw(2, *tiles, 3, size, size).astype(np.float32))
    rest = () if config.tiled is None else (torch.tensor([2, 1]),)
    before = [parameter.dtype for parameter in narrow.parameters()]
    assert torch.bfloat16 in before
    for _ in range(2):
        assert torch.equal(narrow(pixels, *rest), wide(pixels, *rest))
    assert [parameter.dtype for parameter in narrow.parameters()] == before


def test_an_embedding_and_a_head_that_are_held_as_stored_compute_the_same() -> None:
    whole = drawn_model(LLAMA).state_dict()
    stored = {
        name: tensor.to(torch.bfloat16).view(torch.int16).numpy().view(ml_dtypes.bfloat16) for name, tensor in whole.items()
    }
    wide, narrow = (load_part(LLAMA, "language_model", stored.__getitem__, narrow=held) for held in (False, True))
    rows = torch.tensor([[5, 0, 69]])
    assert isinstance(wide, LanguageModel)
    assert isinstance(narrow, LanguageModel)
    assert wide.head is not None
    assert narrow.head is not None
    hidden = wide.embedding(rows)
    assert hidden.dtype == torch.float32
    assert torch.equal(narrow.embedding(rows), hidden)
    assert torch.equal(narrow.norm(hidden), wide.norm(hidden))
    assert torch.equal(narrow.head(hidden), wide.head(hidden))
    assert narrow.embedding.weight.dtype == narrow.head.weight.dtype == torch.bfloat16
