"""Quantised bundles of a Llama 3.2 Vision small enough for a test, calibrated while they are built and proven against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from llama_chat import BOS, EOT, IMAGE, special_tokens
from llama_models import our_model, their_config, their_model
from variations import LLAMA, drawn_model

import flamingo_export
from flamingo_calibration.shipped import shipped_samples
from flamingo_export.errors import ParityError
from flamingo_export.precision import Precision, Quantisation
from flamingo_export.quantize import matrices
from flamingo_export.quantize.policies import POLICIES, preset
from flamingo_export.sensitivity import measure
from flamingo_export.sources import LiveSource
from flamingo_export.validate.checks.stored_codes import ROUNDING
from flamingo_export.validate.report.parity_report import read_report
from flamingo_export.validate.tolerances import TABLE
from flamingo_export.weights import SCALE, WeightIndex
from flamingo_reference.config import projector_config

_replace = msgspec.structs.replace
BLOCKS_OF_128 = _replace(
    LLAMA,
    name="llama-quantised",
    vision=_replace(LLAMA.vision, width=64, ffw_width=128),
    resampler=projector_config(num_latents=17, width=128),
    cross_attention=_replace(LLAMA.cross_attention, head_size=32, ffw_width=256),
    language_model=_replace(
        LLAMA.language_model,
        width=128,
        head_size=32,
        ffw_width=256,
        positions=_replace(LLAMA.language_model.positions, size=32),
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_parity(policy: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    out = tmp_path / "b.bundle"
    flamingo_export.build(drawn_model(BLOCKS_OF_128), out=out, policy=policy)
    report = read_report(out)
    assert report is not None
    assert report.verdict == "passed", report.summary
    quantised = {name.removesuffix(SCALE) for name in WeightIndex.read(out) if name.endswith(SCALE)}
    assert {
        "decoder/layer.1/cross_attention/ffw_up",
        "media_kv/layer.0/k_proj",
        "decoder/layer.0/self_attention/qkv_proj",
    } <= quantised
    assert not any(name.startswith("vision_encoder/") for name in quantised)
    assert ("resampler/input_proj" in quantised) == (policy != "fp8")  # its input has outliers that one scale does not cover


def heavy_tailed() -> Any:
    """A model of 48 channels, whose blocks have 16. In int8 the largest error of its first layer is 6.8 times the rms."""
    config, ids = their_config(), special_tokens(300)
    config.image_token_index = ids[IMAGE]
    text: Any = config.text_config
    text.vocab_size, text.max_position_embeddings, text.bos_token_id, text.eos_token_id = 300, 1024, ids[BOS], ids[EOT]
    return our_model(their_model(config, seed=5)).float()


@pytest.mark.slow
def test_int8_is_held_to_the_nearest_code_of_each_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a layer's largest error is judged by the reference's own; a scale that is wrong in bundle and reference alike fails by name."""
    torch.set_num_threads(1)
    out = tmp_path / "b.bundle"
    flamingo_export.build(heavy_tailed(), out=out, policy="int8")
    report = read_report(out)
    assert report is not None
    assert report.verdict == "passed", report.summary
    roundings = [row for row in report.rows if row.tensor == ROUNDING]
    assert {"media_kv", "resampler", "decoder", "decoder/layer.0"} <= {row.subgraph for row in roundings}
    assert all(0.9 < (row.error or 0.0) <= 1.001 for row in roundings)
    assert max(row.error or 0.0 for row in report.rows if row.level == "layer") > TABLE["quantised layer, int8"].most

    def coarse(matrix: Any, how: Quantisation, importance: Any = None) -> Any:
        codes, scales = matrices.quantised(matrix, how, importance)
        return (np.rint(codes / 2).astype(np.int8), 2 * scales) if codes.shape == (48, 96) else (codes, scales)

    for module in ("flamingo_export.pipeline.write_weights", "flamingo_export.validate.expected.rounding"):
        monkeypatch.setattr(f"{module}.quantised", coarse)
    with pytest.raises(ParityError, match=r"first diverging layer: decoder/layer\.0"):
        flamingo_export.build(heavy_tailed(), out=tmp_path / "spoilt.bundle", policy="int8")


@pytest.mark.slow
def test_media_in_fp8(tmp_path: Path) -> None:
    """Keys and values of tiles as E4M3 codes."""
    torch.set_num_threads(1)
    out = tmp_path / "b.bundle"
    flamingo_export.build(drawn_model(BLOCKS_OF_128), out=out, policy=_replace(preset("fp8"), name="fp8-media", media="fp8"))
    report = read_report(out)
    assert report is not None
    assert report.verdict == "passed", report.summary


@pytest.mark.slow
def test_sensitivity() -> None:
    """Matrices and layers are measured, and the whole model's logits beside its quantised copies."""
    torch.set_num_threads(1)
    source = LiveSource(drawn_model(BLOCKS_OF_128))
    samples = shipped_samples(BLOCKS_OF_128, None)
    found = measure(source, samples, tokenizer=None, precision=Precision(storage="fp32", policy=preset("int8")))
    names = {each.name for each in found.matrices}
    assert {"resampler/input_proj", "media_kv/layer.1/v_proj", "decoder/layer.3/cross_attention/ffw_down"} <= names
    assert found.kl is not None
    assert found.kl > 0
    assert all(layer.kl is not None for layer in found.layers)
