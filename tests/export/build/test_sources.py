"""Sources of weights: drawn ones are reproducible and sane, checkpoints are read as they are, live models must be standard."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from flamingo_export.errors import CheckpointError, UnsupportedModel
from flamingo_export.sources import CheckpointSource, LiveSource, RandomSource, combined_digest, open_source, tensor_digest
from flamingo_export.sources.choice import CheckpointFolder, LiveModel, RandomWeights
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo, cross_attention
from flamingo_reference.names import expected_tensors


def test_drawn_tensors_do_not_depend_on_the_order_of_reading(tiny_config: ModelConfig) -> None:
    one, other = RandomSource(tiny_config, 3), RandomSource(tiny_config, 3)
    forwards = {name: one.read(name) for name in one.names()}
    for name in reversed(other.names()):
        np.testing.assert_array_equal(other.read(name), forwards[name])
    assert {name: array.shape for name, array in forwards.items()} == expected_tensors(tiny_config)
    assert all(array.dtype == np.float32 for array in forwards.values())


def test_drawn_tensors_differ_by_name_and_seed(tiny_config: ModelConfig) -> None:
    source, other = RandomSource(tiny_config, 3), RandomSource(tiny_config, 4)
    q, k = "language_model.layers.0.q_proj.weight", "language_model.layers.0.k_proj.weight"
    assert abs(np.corrcoef(source.read(q).ravel(), source.read(k).ravel())[0, 1]) < 0.15
    assert abs(np.corrcoef(source.read(q).ravel(), other.read(q).ravel())[0, 1]) < 0.15
    assert source.identity != other.identity
    assert source.record({}).seed == 3
    assert source.record({}).sha256 != other.record({}).sha256


def test_drawn_scales_keep_activations_sane(tiny_config: ModelConfig) -> None:
    source = RandomSource(tiny_config, 0)
    for name in source.names():
        values = source.read(name)
        if name.endswith(("attention_gate", "ffw_gate", "skip_gain")):
            assert 0.1 < float(values) < 0.9, f"{name} must not silence its part"
        elif name.endswith("norm.weight"):
            assert 0.6 < values.min() < values.max() < 1.4
        elif values.ndim == 2 and name.endswith("weight") and values.size > 500:
            assert float(values.std()) * math.sqrt(values.shape[1]) == pytest.approx(1, rel=0.1)
            assert abs(float(values.mean())) < 0.1 * float(values.std()) + 0.01
    model = Flamingo(tiny_config)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(source.read(name))) for name in source.names()})
    with torch.no_grad():
        kv = model.media_kv(model.latents(torch.randn(2, 1, 3, 24, 24)))
        logits = model(torch.tensor([[1, 3, 9, 3, 11]]), kv, torch.tensor([[0, 1]]), torch.tensor([[0, 1, 1, 2, 2]]))
    assert 0.1 < float(logits.std()) < 10


def test_a_live_model_and_its_checkpoint_are_known_by_the_same_digest(tiny_model: Flamingo, checkpoint: Path) -> None:
    saved, live = CheckpointSource(checkpoint), LiveSource(tiny_model)
    digests = [{name: tensor_digest(source.read(name)) for name in source.names()} for source in (saved, live)]
    assert digests[0] == digests[1]
    assert saved.record(digests[0]).sha256 == live.record(digests[1]).sha256 == combined_digest(digests[0])


def test_a_live_model_of_16_bits_is_read_bit_by_bit(tiny_model: Flamingo) -> None:
    source = LiveSource(copy.deepcopy(tiny_model).bfloat16())
    name = "language_model.embedding.weight"
    wanted = tiny_model.state_dict()[name].bfloat16().float().numpy()
    np.testing.assert_array_equal(source.read(name).astype(np.float32), wanted)


def test_identity_of_a_checkpoint_changes_with_its_files(tiny_model: Flamingo, checkpoint: Path) -> None:
    before = CheckpointSource(checkpoint).identity
    assert CheckpointSource(checkpoint).identity == before
    tiny_model.save(checkpoint)
    assert CheckpointSource(checkpoint).identity != before


def test_missing_extra_and_misshapen_weights_are_named_at_once(tiny_model: Flamingo, checkpoint: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    del state["resampler.latents"]
    state["resampler.latent"] = torch.zeros(3)
    state["language_model.norm.weight"] = torch.zeros(5)
    save_file(state, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        CheckpointSource(checkpoint)
    message = str(caught.value)
    assert "missing resampler.latents" in message
    assert "unknown resampler.latent (3,) (nearest: resampler.latents)" in message
    assert "language_model.norm.weight has shape (5,), expected (32,)" in message


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointSource(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CheckpointSource(tmp_path)


def test_impossible_sizes_are_refused(tiny_config: ModelConfig) -> None:
    lm = msgspec.structs.replace(tiny_config.language_model, width=33)
    with pytest.raises(CheckpointError, match="33"):
        RandomSource(msgspec.structs.replace(tiny_config, language_model=lm), 0)


def test_open_source(tiny_config: ModelConfig, tiny_model: Flamingo, checkpoint: Path) -> None:
    assert isinstance(open_source(RandomWeights(config=tiny_config)), RandomSource)
    assert isinstance(open_source(CheckpointFolder(path=checkpoint)), CheckpointSource)
    assert isinstance(open_source(LiveModel(model=tiny_model)), LiveSource)


# What a live model may not have. Each change alters, or could alter, what the model computes, and none shows in the config.


@pytest.fixture
def model(tiny_model: Flamingo) -> Flamingo:
    return copy.deepcopy(tiny_model)


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _subclass_forward(model: Flamingo) -> None:
    class LouderNorm(type(model.language_model.norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model.language_model.norm.__class__ = LouderNorm


def _lora(model: Flamingo) -> None:
    layer: Any = model.language_model.layers[1]
    layer.q_proj = nn.Sequential(layer.q_proj, nn.Identity())


def _parametrized(model: Flamingo) -> None:
    from torch.nn.utils import parametrize

    class Symmetric(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0

    resampler: Any = model.resampler
    layer = resampler.layers[0]
    parametrize.register_parametrization(layer.ffw_up, "weight", Symmetric())


def _own_forward(model: Flamingo) -> None:
    gated: Any = model.cross_attention[0]
    gated.forward = lambda hidden, *rest: hidden


def _own_method(model: Flamingo) -> None:
    layer: Any = model.language_model.layers[2]
    layer.attend = lambda *args: 0


def _hooked_seam(model: Flamingo) -> None:
    layer: Any = model.language_model.layers[2]
    layer.operands.register_forward_hook(lambda module, arguments, operands: tuple(x * 2 for x in operands))


def _meta(model: Flamingo) -> None:
    model.language_model.norm.weight = nn.Parameter(torch.empty(32, device="meta"))


def _extra(model: Flamingo) -> None:
    model.resampler.register_parameter("extra", nn.Parameter(torch.zeros(2)))


def _missing(model: Flamingo) -> None:
    layer: Any = model.language_model.layers[0]
    layer.q_proj.weight = None


def _misshapen(model: Flamingo) -> None:
    model.resampler.latents = nn.Parameter(torch.zeros(7, 24))


def _buffer(model: Flamingo) -> None:
    model.vision_encoder.register_buffer("scale", torch.ones(1), persistent=False)


def _eps(model: Flamingo) -> None:
    model.language_model.norm.eps = 1e-2


def _layer_dropped(model: Flamingo) -> None:
    model.language_model.layers = model.language_model.layers[:2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_subclass_forward, r"language_model\.norm is a .*LouderNorm, expected RMSNorm"),
        (_lora, r"language_model\.layers\.1\.q_proj is a Sequential, expected Linear"),
        (_parametrized, r"resampler\.layers\.0\.ffw_up is a ParametrizedLinear"),
        (_own_forward, r"cross_attention\.0 has its own forward"),
        (_own_method, r"language_model\.layers\.2 has its own attend"),
        (_hooked_seam, r"language_model\.layers\.2\.operands has forward hooks"),
        (_meta, r"language_model\.norm\.weight is on the meta device"),
        (_extra, r"parameter resampler\.extra is not known"),
        (_missing, r"parameter language_model\.layers\.0\.q_proj\.weight is missing"),
        (_misshapen, r"resampler\.latents has shape \(7, 24\), expected \(6, 24\)"),
        (_buffer, r"buffer vision_encoder\.scale is not known"),
        (_eps, r"language_model\.norm\.eps is 0\.01, the config gives 1e-06"),
        (_layer_dropped, r"module language_model\.layers\.2 is missing"),
        (lambda m: m.resampler.register_forward_hook(nothing), r"resampler has forward hooks"),
        (
            lambda m: m.cross_attention[0].q_proj.register_forward_pre_hook(nothing),
            r"cross_attention\.0\.q_proj has forward pre",
        ),
        (lambda m: m.language_model.register_full_backward_hook(nothing), r"language_model has backward hooks"),
        (lambda m: m.language_model.register_full_backward_pre_hook(nothing), r"language_model has backward pre hooks"),
    ],
)
def test_changed_models_are_refused(change: Callable[[Flamingo], Any], named: str, model: Flamingo) -> None:
    LiveSource(model)
    change(model)
    with pytest.raises(UnsupportedModel, match=named):
        LiveSource(model)


def test_all_offenders_are_named(model: Flamingo) -> None:
    _lora(model)
    _buffer(model)
    _eps(model)
    with pytest.raises(UnsupportedModel) as caught:
        LiveSource(model)
    assert all(name in str(caught.value) for name in ("layers.1.q_proj", "vision_encoder.scale", "norm.eps"))


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks_are_refused(register: str, model: Flamingo) -> None:
    handle = getattr(nn.modules.module, register)(nothing)
    try:
        with pytest.raises(UnsupportedModel, match="torch has global forward"):
            LiveSource(model)
    finally:
        handle.remove()
    LiveSource(model)


def test_a_forward_put_in_a_classs_place_is_refused(model: Flamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_attention.GatedCrossAttention, "forward", nothing)
    monkeypatch.setattr(nn.LayerNorm, "forward", nothing)
    with pytest.raises(UnsupportedModel) as caught:
        LiveSource(model)
    assert "cross_attention.0: the forward of GatedCrossAttention was replaced by" in str(caught.value)
    assert "resampler.norm: the forward of LayerNorm was replaced" in str(caught.value)


def test_other_classes_are_refused(model: Flamingo, tiny_config: ModelConfig) -> None:
    class Mine(Flamingo):
        pass

    for other in (Mine(tiny_config), nn.DataParallel(model), nn.Linear(2, 2), "a model"):
        with pytest.raises(UnsupportedModel, match=r"expected flamingo_reference\.model\.Flamingo itself"):
            LiveSource(other)  # type: ignore[arg-type]


def test_training_mode_and_frozen_parameters_are_fine(model: Flamingo) -> None:
    model.train()
    model.vision_encoder.requires_grad_(False)
    assert LiveSource(model).shape("resampler.latents") == (6, 24)


def test_a_wrapped_forward_is_refused_though_it_bears_the_old_name(model: Flamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    norm: Any = type(model.language_model.norm)
    original = norm.forward

    @functools.wraps(original)
    def louder(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * original(self, x)

    monkeypatch.setattr(norm, "forward", louder)
    with pytest.raises(UnsupportedModel, match="the forward of RMSNorm was replaced"):
        LiveSource(model)
    del louder.__wrapped__
    with pytest.raises(UnsupportedModel, match="the forward of RMSNorm was replaced"):
        LiveSource(model)
