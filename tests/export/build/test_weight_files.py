"""What streaming writes: the recipes' numbers rounded to the storage type, checked against a second path; faults named."""

from __future__ import annotations

import copy
import math
import resource
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch
from recorder import Recorder
from safetensors.torch import load_file

from flamingo_export import api
from flamingo_export.errors import CheckpointError
from flamingo_export.pipeline import write_weights
from flamingo_export.pipeline.write_weights import cast, peak
from flamingo_export.precision import StorageType
from flamingo_export.sources import LiveSource
from flamingo_export.sources.choice import LiveModel, RandomWeights
from flamingo_export.weights import bundle_weights
from flamingo_reference.checkpoints.families.native import save_native
from flamingo_reference.config import SIZES, ModelConfig
from flamingo_reference.model import Flamingo

from .conftest import contents, in_child, wait

TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def written(bundle: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in (bundle / "weights").iterdir() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_weights_are_the_recipes_numbers_rounded_by_torch(storage: StorageType, tiny_model: Flamingo, tmp_path: Path) -> None:
    source = LiveSource(tiny_model)
    result = api.build(tiny_model, out=tmp_path / "b.bundle", storage=storage, parity="skip")
    tensors = written(result.path)
    weights = bundle_weights(tiny_model.config)
    assert set(tensors) == {weight.name for weight in weights}
    for weight in weights:
        made = torch.from_numpy(np.ascontiguousarray(weight.make([source.read(name) for name in weight.sources])))
        wanted = made.float().to(torch.float32 if weight.full_precision else TORCH_TYPES[storage])
        assert tensors[weight.name].dtype == wanted.dtype
        assert torch.equal(tensors[weight.name], wanted), weight.name


def test_a_16_bit_checkpoint_keeps_its_bits(tiny_model: Flamingo, tmp_path: Path) -> None:
    """Matrices that are merely moved pass from a bf16 checkpoint to a bf16 bundle unrounded, and to fp32 exactly."""
    state = {name: tensor.bfloat16() for name, tensor in tiny_model.state_dict().items()}
    arrays = {name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for name, tensor in state.items()}
    save_native(tmp_path / "half", tiny_model.config, arrays.items())
    q, k, v = (state[f"language_model.layers.1.{kind}_proj.weight"] for kind in "qkv")
    wanted = torch.cat([q, k, v]).T
    storages: tuple[tuple[StorageType, torch.Tensor], ...] = (("bf16", wanted), ("fp32", wanted.float()))
    for storage, expected in storages:
        result = api.build(tmp_path / "half", out=tmp_path / storage, storage=storage, parity="skip")
        assert torch.equal(written(result.path)["decoder/layer.1/self_attention/qkv_proj"], expected)


def test_live_checkpoint_and_one_thread_give_the_same_bytes(
    tiny_model: Flamingo, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = api.build(tiny_model, out=tmp_path / "live.bundle", parity="skip").path
    saved = api.build(checkpoint, out=tmp_path / "saved.bundle", parity="skip").path
    monkeypatch.setattr(write_weights, "THREADS", 1)
    monkeypatch.setattr(write_weights, "LARGE", 0)
    monkeypatch.setattr(write_weights, "_CHUNK", 1000)
    monkeypatch.setattr(write_weights, "_BLOCK", 100)
    alone = api.build(checkpoint, out=tmp_path / "alone.bundle", parity="skip").path
    assert contents(saved) == contents(alone)
    assert {**contents(live), "manifest.json": ""} == {**contents(saved), "manifest.json": ""}


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_nan_and_infinity_are_named_wherever_they_are(storage: StorageType, tiny_model: Flamingo, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    state["vision_encoder.stem.0.gain"][1] = float("nan")
    state["cross_attention.1.ffw_gate"].fill_(float("inf"))
    state["language_model.layers.2.ffw_down.weight"][-1, -1] = -float("inf")
    save_native(tmp_path / "bad", tiny_model.config, ((name, tensor.numpy()) for name, tensor in state.items()))
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        api.build(tmp_path / "bad", out=tmp_path / "b.bundle", storage=storage, parity="skip")
    message = str(caught.value)
    assert all(
        name in message
        for name in ("vision_encoder.stem.0.gain", "cross_attention.1.ffw_gate", "language_model.layers.2.ffw_down.weight")
    )
    assert message.count(",") == 2, "no other tensor is named"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["bad"], "nothing half written is left"


def test_overflow_of_fp16_is_named_and_bf16_takes_it(tiny_model: Flamingo, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    state["language_model.layers.0.ffw_up.weight"][3, 3] = 65520.0  # the least number that fp16 rounds to infinity
    state["cross_attention.0.out_proj.weight"][0, 0] = 4e5  # folded: times tanh(gate)
    state["language_model.layers.1.ffw_up.weight"][0, 0] = 65519.0  # still rounds to the largest finite one
    save_native(tmp_path / "wide", tiny_model.config, ((name, tensor.numpy()) for name, tensor in state.items()))
    with pytest.raises(CheckpointError, match=r"beyond the range of fp16.*--storage bf16") as caught:
        api.build(tmp_path / "wide", out=tmp_path / "b.bundle", storage="fp16", parity="skip")
    assert "decoder/layer.0/ffw_up (up to 6.55e+04)" in str(caught.value)
    assert "decoder/layer.0/cross_attention/out_proj" in str(caught.value)
    assert "layer.1" not in str(caught.value)
    api.build(tmp_path / "wide", out=tmp_path / "b.bundle", storage="bf16", parity="skip")


def test_what_overflows_is_judged_after_folding(tiny_model: Flamingo, tmp_path: Path) -> None:
    """Numbers that fold into the range are taken though the checkpoint's are beyond it, and those that fold out of it are refused though
    the checkpoint's are within."""
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    state["cross_attention.0.attention_gate"].fill_(0.1)
    state["cross_attention.0.out_proj.weight"][0, 0] = 4e5  # times tanh(0.1) = 39867
    save_native(tmp_path / "into", tiny_model.config, ((name, tensor.numpy()) for name, tensor in state.items()))
    into = api.build(tmp_path / "into", out=tmp_path / "into.bundle", storage="fp16", parity="skip")
    found = written(into.path)["decoder/layer.0/cross_attention/out_proj"]
    assert found.abs().max().item() == torch.tensor(4e5 * math.tanh(0.1), dtype=torch.float16).item()

    state["cross_attention.0.out_proj.weight"][0, 0] = 1.0
    kernel, gain = state["vision_encoder.stem.1.weight"], state["vision_encoder.stem.1.gain"]
    kernel[0].zero_()
    kernel[0, 0, 0, 0] = 1.0
    gain[0] = 60_000.0  # times nearly GELU_GAIN = 1.7, as the kernel has its whole norm in one number
    save_native(tmp_path / "out-of", tiny_model.config, ((name, tensor.numpy()) for name, tensor in state.items()))
    with pytest.raises(CheckpointError, match=r"beyond the range of fp16.*--storage bf16") as caught:
        api.build(tmp_path / "out-of", out=tmp_path / "out-of.bundle", storage="fp16", parity="skip")
    assert "vision_encoder/stem/1/weight (up to 1.01e+05)" in str(caught.value)
    assert "cross_attention" not in str(caught.value)


def test_a_faulty_live_model_is_refused_too(tiny_model: Flamingo, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        resampler: Any = model.resampler
        resampler.latents[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinite numbers: resampler\.latents\."):
        api.build(LiveModel(model=model), out=tmp_path / "b.bundle", parity="skip")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_peak(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 1000)).astype(dtype)
    assert peak(values) == float(np.abs(values.astype(np.float64)).max())
    assert peak(values.T) == peak(values)
    assert peak(values[::-1, ::2]) == float(np.abs(values[:, ::2].astype(np.float64)).max())
    assert peak(np.zeros((0, 3), dtype)) == 0.0
    assert peak(np.array(-2.5, dtype)) == 2.5
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = values.copy()
        spoilt[299, 999] = bad
        assert not np.isfinite(peak(spoilt))


def test_cast_rounds_to_nearest_even_like_torch() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 50_000, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40, -0.0], np.float32)])
    values = values[np.isfinite(values)]
    wanted = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(cast(values, np.dtype(ml_dtypes.bfloat16)).view(np.int16), wanted)


def test_progress_adds_up(spoken_config: ModelConfig, tmp_path: Path, recorder: Recorder) -> None:
    api.build(RandomWeights(config=spoken_config), out=tmp_path / "b.bundle", parity="skip", progress=recorder)
    assert recorder.done == recorder.stages
    sizes = sum(path.stat().st_size for path in (tmp_path / "b.bundle" / "weights").iterdir())
    assert 0 < sizes - recorder.stages["weights"] < 60_000  # headers


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A model whose layers together are far larger than each: resident memory grows by a few tensors, not by the model."""
    nano = SIZES["nano"]
    lm = msgspec.structs.replace(
        nano.language_model, num_layers=24, width=512, ffw_width=2048, head_size=128, vocab_size=1000, max_positions=64
    )
    block = msgspec.structs.replace(nano.cross_attention, ffw_width=512)
    config = msgspec.structs.replace(nano, language_model=lm, cross_attention=block, name="deep")

    def measured() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = api.build(RandomWeights(config=config), out=tmp_path / "b.bundle", storage="bf16", parity="skip")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        stored = sum(file.size for file in result.manifest.files)
        assert stored > 150e6
        assert grown < 0.6 * stored, f"{grown / 1e6:.0f} MB for {stored / 1e6:.0f} MB"

    with in_child(measured) as child:
        assert wait(child) == 0
