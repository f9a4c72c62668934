"""Ranges of a contrastive encoder's towers: the table against the whole fp64 model, the texts they are measured on, bounds, sensitivity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from kinds import CLIP, KEPT, KINDS, READ
from recorder import Recorder
from variations import drawn_model

import flamingo_export
from flamingo_calibration import calibrate, shipped_samples
from flamingo_calibration.samples import check_samples
from flamingo_calibration.tower_texts import DRAWN_TEXTS, tower_texts
from flamingo_export.errors import CalibrationError
from flamingo_export.precision import Precision
from flamingo_export.quantize.policies import for_model, preset
from flamingo_export.runtime.media import load_medium
from flamingo_export.sensitivity.measure import measure
from flamingo_export.sources import CheckpointSource, LiveSource, RandomSource
from flamingo_export.weights.calibration_table import CalibrationTable, Statistics, calibrated_tensors, write_table
from flamingo_export.weights.range_checks import check_ranges
from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import Readout
from flamingo_reference.model import Flamingo
from flamingo_reference.model.contrastive import features_and_pooled
from tests.contrastive.test_using import BEGIN, END, saved, text_tokenizer

FP32_DRIFT = 2e-5
each = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table_of(config: ModelConfig) -> CalibrationTable:
    return calibrate(LiveSource(drawn_model(config)), shipped_samples(config, None), tokenizer=None)


def inputs_of(model: Flamingo) -> Iterator[tuple[str, Any]]:
    """The table's names of the towers' products, each with a module that has this input, written out."""
    towers = model.contrastive
    assert towers is not None
    yield "image_tower/proj", towers.image.proj
    for i, layer in enumerate(getattr(towers.readout, "layers", ())):
        name = f"vision_encoder/readout/layer.{i}"
        yield from ((f"{name}/q_proj", layer.q_proj), (f"{name}/kv_proj", layer.v_proj), (f"{name}/out_proj", layer.out_proj))
        yield from ((f"{name}/ffw_up", layer.ffw_up), (f"{name}/ffw_down", layer.ffw_down))
    if towers.readout is not None and towers.readout.input_proj is not None:
        yield "vision_encoder/readout/input_proj", towers.readout.input_proj
    if towers.text is None:
        return
    for i, layer in enumerate(towers.text.layers):
        name = f"text_tower/layer.{i}"
        yield from ((f"{name}/qkv_proj", layer.k_proj), (f"{name}/out_proj", layer.out_proj))
        yield from ((f"{name}/ffw_up", layer.ffw_up), (f"{name}/ffw_down", layer.ffw_down))
    yield "text_tower/proj", towers.text.proj


@pytest.mark.slow
@each
def test_the_table_is_the_whole_models(config: ModelConfig) -> None:
    """Largest numbers of the fp64 model on the same media and texts, and the root mean squares of its channels."""
    samples, table = shipped_samples(config, None), table_of(config)
    assert set(table.tensors) == set(calibrated_tensors(config))
    model = drawn_model(config, dtype=torch.float64)
    towers, contrastive = model.contrastive, config.contrastive
    assert towers is not None
    assert contrastive is not None
    found: dict[str, list[np.ndarray]] = {}

    def keep(name: str) -> Any:
        return lambda _, given: found.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]).numpy().copy())

    for name, module in inputs_of(model):
        module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for medium in (medium for sample in samples for medium in sample.media):
            pixels = torch.from_numpy(load_medium(medium, config).pixels).double()
            _, pooled = features_and_pooled(model.vision_encoder, pixels, contrastive, towers.readout)
            towers.image(pooled)
        texts = check_samples(samples, LiveSource(drawn_model(config)), None).texts
        assert len(texts) == (DRAWN_TEXTS if contrastive.text else 0)
        for ids in texts:
            assert towers.text is not None
            towers.text(torch.from_numpy(ids[None]), torch.tensor([len(ids)]))
    named = {name for name in table.tensors if name.startswith(("image_tower", "text_tower", "vision_encoder/readout"))}
    assert found.keys() == named
    assert ("vision_encoder/readout/layer.1/ffw_up" in named) == isinstance(contrastive.pooling, Readout)
    for name, pieces in found.items():
        seen = np.concatenate(pieces)
        assert table.tensors[name].amax == pytest.approx(np.abs(seen).max(), rel=FP32_DRIFT), name
        rms = np.sqrt(np.square(seen).mean(0) / np.square(seen).mean())
        np.testing.assert_allclose(table.tensors[name].channels(), rms, rtol=1e-3, atol=1e-3, err_msg=name)


def test_texts_are_the_prompts_own(tmp_path: Path) -> None:
    """What stands between tags, by the tower's own tokenizer, which ends each; a text that is too long in halves; none drawn."""
    saved(CLIP, tmp_path / "c", text_tokenizer())
    source = CheckpointSource(tmp_path / "c")
    long = " ".join(f"w{number}" for number in range(14))
    found, note = tower_texts(source, [f"<image>w3 w4<EOC><image> w5 {long}<EOC>", "<image><EOC>"])
    assert [ids.tolist() for ids in found] == [
        [BEGIN, 3, 4, END],
        [BEGIN, 5, *range(6), END],
        [BEGIN, *range(6, 14), END],
    ]
    assert not note
    found, note = tower_texts(source, ["<image><EOC>"])
    assert len(found) == DRAWN_TEXTS
    assert note == "the text tower is calibrated on random tokens: the samples have no text"


@pytest.mark.parametrize(("config", "why"), [(CLIP, "there is no tokenizer for it"), (KEPT, "")], ids=["clip", "no text"])
def test_random_tokens_are_said(config: ModelConfig, why: str) -> None:
    recorder = Recorder()
    found = check_samples(shipped_samples(config, None), RandomSource(config, seed=1), None, progress=recorder)
    assert any(why in note for note in recorder.notes) == bool(why)
    assert bool(found.texts) == bool(why)
    if why:
        assert {len(ids) for ids in found.texts} == set(range(1, 12))


@pytest.mark.slow
@each
def test_wrong_ranges_are_refused_without_parity(config: ModelConfig, tmp_path: Path) -> None:
    table = table_of(config)
    write_table(tmp_path / "t.json", table)
    made = flamingo_export.build(
        drawn_model(config), out=tmp_path / "b.bundle", policy="fp8", calibration=tmp_path / "t.json", parity="skip"
    )
    manifest = made.manifest
    caught = set()
    towers = [name for name in table.tensors if name.startswith(("image_tower", "text_tower", "vision_encoder/readout"))]
    for name in towers:
        scaled = table.tensors[name]
        scaled = Statistics(
            **{key: getattr(scaled, key) * 64 for key in ("amax", "percentile", "mse", "entropy")},
            channel_rms=scaled.channel_rms,
        )
        wrong = msgspec.structs.replace(table, tensors={**table.tensors, name: scaled})
        try:
            check_ranges(made.path, manifest.config, manifest.precision, wrong)
        except CalibrationError:
            caught.add(name)
    expected = {name for name in towers if name.startswith("text_tower") or name.endswith(("/q_proj", "ffw_up"))}
    if config in (CLIP, KEPT):
        expected.add("image_tower/proj")
    if config is READ:  # its first layer's input follows a norm too, but what leaves the last one does not
        expected.discard("text_tower/proj")
    assert expected <= caught


@pytest.mark.slow
@pytest.mark.parametrize("config", [CLIP, READ], ids=["clip", "readout"])
def test_sensitivity_measures_the_towers(config: ModelConfig) -> None:
    source = LiveSource(drawn_model(config))
    precision = Precision(storage="fp32", policy=for_model(preset("fp8"), config))
    found = measure(source, shipped_samples(config, None), tokenizer=None, precision=precision)
    layers = {layer.name: layer for layer in found.layers}
    for tower in ("image_tower", "text_tower"):
        assert 1e-3 < layers[tower].error < 0.5
        assert layers[tower].kl == 0.0
    assert {each.layer for each in found.matrices if each.name.startswith("text_tower/")} == {"text_tower"}
    assert layers["decoder/layer.0"].kl
