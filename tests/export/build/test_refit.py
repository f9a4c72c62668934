"""refit: other weights in a bundle's graphs, and nothing else."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from recorder import Recorder
from safetensors.numpy import save_file

from flamingo_export import api
from flamingo_export.bundle.manifest import EngineRecord, ShapeLimits, read_manifest, write_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.cli import main
from flamingo_export.errors import BuildError, BundleError, CheckpointError
from flamingo_export.pipeline import run as pipeline
from flamingo_export.pipeline.build_request import refit_request
from flamingo_export.sources.choice import CheckpointFolder, RandomWeights
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo

from .conftest import contents, in_child, wait


@pytest.fixture
def tuned(tiny_model: Flamingo, tmp_path: Path) -> Path:
    """The tiny model after some training: every number moved, the gates through zero."""
    model = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        first, second = cast("list[Any]", model.cross_attention)
        first.attention_gate.zero_()
        second.ffw_gate.neg_()
    model.save(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def bundle(checkpoint: Path, tmp_path: Path) -> Path:
    limits = ShapeLimits(max_length=80, chunk=16, bank_rows=4)
    return api.build(checkpoint, out=tmp_path / "base.bundle", storage="bf16", limits=limits, parity="skip").path


def test_a_refit_is_what_building_the_checkpoint_gives(bundle: Path, tuned: Path, tmp_path: Path) -> None:
    """Every file of weights and graphs, byte for byte: gates, distances and standardised kernels are folded anew."""
    limits = read_manifest(bundle).limits
    refitted = api.refit(bundle, tuned, out=tmp_path / "refitted.bundle", parity="skip")
    built = api.build(tuned, out=tmp_path / "built.bundle", storage="bf16", limits=limits, parity="skip")
    assert open_bundle(refitted.path) == refitted.manifest
    assert (refitted.manifest.limits, refitted.manifest.precision) == (limits, built.manifest.precision)
    assert refitted.manifest.source == built.manifest.source
    ours, anew, base = (contents(folder) for folder in (refitted.path, built.path, bundle))
    for found in (ours, anew, base):
        del found["manifest.json"]
    assert ours == anew
    assert {name for name in base if base[name] != ours[name]} == {name for name in base if name.startswith("weights/")}


def test_graphs_are_copied_not_built(bundle: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "build_graph", None)
    assert api.refit(bundle, tuned, out=tmp_path / "b.bundle", parity="skip").path.is_dir()


@pytest.mark.slow
def test_parity_of_the_new_weights_is_proved(checkpoint: Path, tuned: Path, tmp_path: Path) -> None:
    base = api.build(checkpoint, out=tmp_path / "base.bundle", parity="skip").path
    result = api.refit(base, tuned, out=tmp_path / "b.bundle")
    assert result.manifest.parity.state == "passed"
    assert (result.path / "golden" / "cases.json").is_file()


def test_another_model_is_refused_by_every_setting(bundle: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    lm = msgspec.structs.replace(tiny_config.language_model, width=40, vocab_size=71)
    resampler = msgspec.structs.replace(tiny_config.resampler, num_latents=5)
    other = msgspec.structs.replace(tiny_config, name="other", language_model=lm, resampler=resampler)
    with pytest.raises(CheckpointError) as caught:
        api.refit(bundle, RandomWeights(config=other), out=tmp_path / "b.bundle")
    message = str(caught.value)
    for part in (
        "language_model.width is 40, the bundle has 32",
        "language_model.vocab_size is 71, the bundle has 70",
        "resampler.num_latents is 5, the bundle has 6",
        "flamingo-export build --checkpoint",
    ):
        assert part in message
    assert "other" not in message.replace("another", "")
    assert not (tmp_path / "b.bundle").exists()


def test_a_damaged_bundle_is_refused(bundle: Path, tuned: Path, tmp_path: Path) -> None:
    (bundle / "decoder.onnx").write_bytes((bundle / "decoder.onnx").read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        api.refit(bundle, tuned, out=tmp_path / "b.bundle", parity="skip")


def test_graphs_that_read_weights_elsewhere_are_refused(bundle: Path, tuned: Path, tmp_path: Path) -> None:
    """As a bundle of another version may."""
    from flamingo_export.bundle.verify import file_record

    path = bundle / "weights" / "media_kv.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first, *rest = header
    text = json.dumps({name: header[name] for name in (*rest, first)}).encode().ljust(length + 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    manifest = read_manifest(bundle)
    records = [file_record(bundle, path) if each.path == "weights/media_kv.safetensors" else each for each in manifest.files]
    write_manifest(bundle, msgspec.structs.replace(manifest, files=tuple(records)))
    with pytest.raises(BuildError, match=r"read weights where this version does not put them \(media_kv/"):
        api.refit(bundle, tuned, out=tmp_path / "b.bundle", parity="skip")


def test_the_bundles_tokenizer_is_kept_and_its_engines_are_not(spoken_config: ModelConfig, tmp_path: Path) -> None:
    base = api.build(RandomWeights(config=spoken_config, seed=1), out=tmp_path / "base.bundle", parity="skip").path
    engine = EngineRecord(graph="decoder", file="decoder.onnx", backend="tensorrt-rtx", target="sm89", tool_version="1")
    write_manifest(base, msgspec.structs.replace(read_manifest(base), engines=(engine,)))
    result = api.refit(base, RandomWeights(config=spoken_config, seed=2), out=tmp_path / "b.bundle", parity="skip")
    assert (result.path / "tokenizer" / "tokenizer.json").read_bytes() == (base / "tokenizer" / "tokenizer.json").read_bytes()
    assert result.manifest.engines == ()
    assert any("that of base.bundle is kept" in note for note in result.notes)
    assert any("are not taken over" in note for note in result.notes)


def test_in_place_and_published_in_one_step(bundle: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="exists"):
        api.refit(bundle, tuned, out=bundle, parity="skip")
    before = read_manifest(bundle)
    result = api.refit(bundle, tuned, out=bundle, parity="skip", overwrite=True)
    assert result.manifest.source != before.source
    assert open_bundle(bundle) == result.manifest
    assert not list(tmp_path.glob(".base.bundle*"))


def test_killed_it_goes_on_where_it_was(
    bundle: Path, tuned: Path, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.bundle"
    request = refit_request(bundle, CheckpointFolder(path=tuned), out, parity="skip")
    journal = tmp_path / ".b.bundle.building.json"

    def slowly() -> None:
        from flamingo_export.pipeline import write_weights

        make = write_weights._make

        def waiting(*args: Any) -> Any:
            time.sleep(0.01)
            return make(*args)

        monkeypatch.setattr(write_weights, "_make", waiting)
        pipeline.build(request)

    with in_child(slowly) as child:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if journal.is_file() and len(json.loads(journal.read_text())["groups"]) > 2:
                break
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
    assert not out.exists()
    result = pipeline.build(request, progress=recorder)
    assert any("resuming the interrupted build" in note for note in recorder.notes)
    assert open_bundle(out) == result.manifest


def test_the_command(bundle: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    module = "base_model.model.language_model.layers.0.out_proj"
    halves = {f"{module}.lora_A.weight": np.ones((1, 40), np.float32), f"{module}.lora_B.weight": np.ones((32, 1), np.float32)}
    save_file(halves, adapter / "adapter_model.safetensors")
    arguments = ["refit", str(bundle), "--checkpoint", str(tuned), "--parity", "skip", "--out"]
    assert main([*arguments, str(tmp_path / "a.bundle")]) == 0
    assert "weights of the checkpoint, stored in bf16" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "b.bundle"), "--lora", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["source"]["family"] == "native"
    plain, merged = (contents(tmp_path / f"{name}.bundle") for name in "ab")
    assert {name for name in plain if plain[name] != merged[name]} == {"manifest.json", "weights/decoder.layer.000.safetensors"}
    assert main([*arguments, str(tmp_path / "a.bundle")]) == 1
    assert "--overwrite" in capsys.readouterr().err
