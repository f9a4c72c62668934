"""Fine-tuned models and the paper's ablations: vision weights and sizes of their own, blocks without gates, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from openflamingo_models import PATCH, Theirs
from published_files import write_openflamingo
from variations import GROUPED, MPT, NEOX, drawn_model

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.errors import CheckpointError
from flamingo_export.validate.report.parity_report import read_report
from flamingo_reference.checkpoints.loading import load
from flamingo_reference.config import ModelConfig
from flamingo_reference.model.cross_attention import GatedCrossAttention
from flamingo_reference.names import expected_tensors


def at(config: ModelConfig, side: int) -> ModelConfig:
    return msgspec.structs.replace(config, vision=msgspec.structs.replace(config.vision, image_size=side))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "patches"), [(GROUPED, 60 * 60), (NEOX, 34 * 34 + 1)], ids=["nfnet", "vit"])
def test_a_model_tuned_at_480_pixels(config: ModelConfig, patches: int, tmp_path: Path) -> None:
    """Own vision weights: positions and patches follow the size, and parity passes."""
    wide = at(config, 480)
    assert wide.vision.num_patches == patches
    drawn_model(wide, seed=11).save(tmp_path / "checkpoint")
    flamingo_export.build(tmp_path / "checkpoint", out=tmp_path / "w.bundle")
    manifest, report = read_manifest(tmp_path / "w.bundle"), read_report(tmp_path / "w.bundle")
    assert manifest.parity.state == "passed"
    assert report is not None
    assert {row.subgraph for row in report.rows} >= {"vision_encoder", "resampler", "decoder"}
    with flamingo_export.load(tmp_path / "w.bundle", threads=1) as model:
        picture = np.random.default_rng(0).integers(0, 256, (500, 300, 3), np.uint8)
        prepared = model.prepare(flamingo_export.Request(prompt=[1, config.tokens.image, 9], media=[picture]))
        assert prepared.media[0].pixels.shape == (1, 3, 480, 480)
        assert model.generate([1, config.tokens.image, 9], images=[picture], max_new_tokens=2).token_ids


def test_openflamingo_tuned_with_its_vision_encoder_at_another_size(tmp_path: Path) -> None:
    """checkpoint.pt holds CLIP at 5 x 5 patches, the file given has it at 4 x 4."""
    theirs = Theirs("mpt")
    source = write_openflamingo(tmp_path, theirs)
    held = torch.load(source.path, weights_only=True)
    state = held.get("model_state_dict", held)
    plain = load(source)
    generator = torch.Generator().manual_seed(9)
    tuned = {
        "vision_encoder.positional_embedding": torch.randn(26, 64, generator=generator),
        "vision_encoder.class_embedding": torch.randn(64, generator=generator),
    }
    torch.save({**state, **tuned}, source.path)
    made = load(source)
    assert (plain.config.vision.image_size, made.config.vision.image_size) == (4 * PATCH, 5 * PATCH)
    assert made.reader.shape("vision_encoder.position_embedding.weight") == (26, 64)
    np.testing.assert_array_equal(
        made.reader.read("vision_encoder.position_embedding.weight"), tuned["vision_encoder.positional_embedding"].numpy()
    )
    assert any("25 patches of 7 pixels, so images are made 35 pixels wide" in note for note in made.notes)
    result = flamingo_export.build(source, out=tmp_path / "of.bundle", parity="skip")
    assert result.manifest.config.vision.num_patches == 25
    torch.save({**state, "vision_encoder.positional_embedding": torch.randn(25, 64)}, source.path)
    with pytest.raises(Exception, match="holds 25 positions of the image encoder, which are not a square"):
        load(source)


def ungated(config: ModelConfig) -> ModelConfig:
    return msgspec.structs.replace(
        config, name="ungated", cross_attention=msgspec.structs.replace(config.cross_attention, gate="none")
    )


def test_a_block_without_gates_is_the_plain_sum() -> None:
    """Written out in numpy: x + attention(norm x), then + feed-forward(norm of that)."""
    config = ungated(MPT)
    block = GatedCrossAttention(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    sizes, rng = config.cross_attention, np.random.default_rng(0)
    width, latents = config.language_model.width, config.resampler.num_latents
    x, media = rng.standard_normal((5, width)), rng.standard_normal((latents, config.resampler.width))
    phi = np.array([0, 1, 1, 0, 1])
    with torch.no_grad():
        k, v = block.media_kv(torch.from_numpy(media[None]))
        found = block(torch.from_numpy(x[None]), k, v, torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(phi[None]))[
            0
        ].numpy()
    state = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
    assert not [name for name in state if "gate" in name]

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        scaled = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + sizes.norm_eps)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    q, keys, values = (
        norm(x, "norm") @ state["q_proj.weight"].T,
        media @ state["k_proj.weight"].T,
        media @ state["v_proj.weight"].T,
    )
    seen = np.zeros_like(q)
    for head in range(sizes.num_heads):
        part = slice(head * sizes.head_size, (head + 1) * sizes.head_size)
        scores = q[:, part] @ keys[:, part].T / np.sqrt(sizes.head_size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        seen[:, part] = weights / weights.sum(-1, keepdims=True) @ values[:, part]
    seen[phi == 0] = 0
    x = x + seen @ state["out_proj.weight"].T
    inner = norm(x, "ffw_norm") @ state["ffw_up.weight"].T
    inner = inner * 0.5 * (1 + torch.erf(torch.from_numpy(inner / np.sqrt(2))).numpy())
    np.testing.assert_allclose(found, x + inner @ state["ffw_down.weight"].T, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, "int8"])
@pytest.mark.parametrize("config", [MPT, GROUPED], ids=["every second layer", "every third layer"])
def test_models_without_gates_pass_parity(config: ModelConfig, policy: str | None, tmp_path: Path) -> None:
    plain = ungated(config)
    assert not [name for name in expected_tensors(plain) if name.endswith("_gate")]
    drawn_model(plain).save(tmp_path / "checkpoint")
    built = flamingo_export.build(tmp_path / "checkpoint", out=tmp_path / "u.bundle", policy=policy)
    assert built.manifest.parity.state == "passed"


def test_openflamingo_without_gates(tmp_path: Path) -> None:
    source = write_openflamingo(tmp_path, Theirs("mpt"))
    held = torch.load(source.path, weights_only=True)
    state = held.get("model_state_dict", held)
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith(("attn_gate", "ff_gate"))}, source.path)
    made = load(source)
    assert made.config.cross_attention.gate == "none"
    assert any("holds no tanh gates" in note for note in made.notes)
    some = {name: tensor for name, tensor in state.items() if not name.endswith("ff_gate")}
    torch.save(some, source.path)
    with pytest.raises(Exception, match=r"missing .*ff_gate"):
        load(source)


@pytest.mark.parametrize(
    ("part", "field", "value", "why"),
    [
        ("cross_attention", "attends", "all", "attention to all previous images"),
        ("resampler", "kind", "transformer", "a Transformer in the resampler's place"),
        ("resampler", "kind", "MLP", "an MLP in the resampler's place"),
        ("cross_attention", "kind", "vanilla", "vanilla cross-attention: it stands inside"),
        ("cross_attention", "kind", "grafting", "grafting: cross-attention and self-attention layers"),
    ],
)
def test_other_ablations_are_refused_by_name_with_the_reason(
    part: str, field: str, value: str, why: str, tmp_path: Path
) -> None:
    drawn_model(MPT).save(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    raw = msgspec.json.decode(path.read_bytes())
    raw[part][field] = value
    path.write_bytes(msgspec.json.encode(raw))
    with pytest.raises(CheckpointError, match=rf"{part}\.{field} is '{value}', which is not supported: {why}"):
        flamingo_export.build(tmp_path / "checkpoint", out=tmp_path / "m.bundle", parity="skip")
