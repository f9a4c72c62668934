"""Engines that compute in 16 bits: judged by PyTorch's error in that type, honest ones pass and spoilt ones do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_card import FakeCard
from gpu import nano
from gpu.torch_backend import TorchBackend

import flamingo_export
from flamingo_export.bundle.manifest import read_manifest, write_manifest
from flamingo_export.bundle.verify import file_record
from flamingo_export.sources.choice import source_for_size
from flamingo_export.sources.origin import find_origin
from flamingo_export.validate import ParityReport, check_bundle
from flamingo_export.validate.expected.golden import load_goldens, save_goldens
from flamingo_export.validate.expected.recording import record
from flamingo_export.weights import WeightIndex

GOLDEN = ("golden/cases.json", "golden/tensors.safetensors")


def list_goldens(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    kept = [each for each in manifest.files if each.path not in GOLDEN]
    files = (*kept, *(file_record(bundle, bundle / name) for name in GOLDEN))
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def recorded(request, tmp_path_factory) -> Path:
    """Nano in a 16-bit type, with golden values that have PyTorch's errors in it."""
    bundle = tmp_path_factory.mktemp("recorded") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=bundle, storage=request.param, limits=nano.LIMITS, parity="skip")
    manifest = read_manifest(bundle)
    tokenizer = bundle / "tokenizer" / "tokenizer.json"
    source = find_origin(manifest, None)
    assert manifest.source.sha256 is not None
    found = record(
        source, manifest, manifest.source.sha256, tokenizer=tokenizer, memory=8 << 30, arithmetic=manifest.precision.storage
    )
    save_goldens(bundle / "golden", found)
    list_goldens(bundle)
    return bundle


def judged(bundle: Path) -> ParityReport:
    return check_bundle(bundle, backend=TorchBackend(FakeCard()), against="golden")  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_honest_engine_passes(recorded):
    report = judged(recorded)
    assert report.verdict == "passed", report.summary
    assert report.arithmetic == read_manifest(recorded).precision.storage
    assert report.not_run == ()


@pytest.mark.slow
def test_limits_of_fp32_arithmetic_would_fail_it_which_is_said(recorded, tmp_path):
    """As golden values of a build without engines have them: what the rule for 16 bits is there for."""
    bundle = Path(shutil.copytree(recorded, tmp_path / "copy.bundle"))
    goldens = load_goldens(bundle / "golden")
    assert goldens is not None
    goldens.computed = {}
    save_goldens(bundle / "golden", goldens)
    list_goldens(bundle)
    report = judged(bundle)
    assert report.verdict == "failed"
    (said,) = report.not_run
    assert said.name == f"limits for {report.arithmetic} arithmetic"
    assert "Run parity where PyTorch" in said.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["decoder/layer.2/ffw_down", "media_kv/layer.0/v_proj", "decoder/layer.2/self_attention/distances"]
)
def test_a_spoilt_weight_fails(name, recorded, tmp_path):
    """A sixteenth more in fp16, half as much again in bf16, of a matrix; distances that are not there."""
    more = {"fp16": 2.0**-4, "bf16": 0.5}[read_manifest(recorded).precision.storage]
    factor = 0.0 if name.endswith("distances") else 1 + more
    bundle = Path(shutil.copytree(recorded, tmp_path / "copy.bundle"))
    index = WeightIndex.read(bundle)
    placed, values = index[name], np.array(index.read_tensor(bundle, name))
    with (bundle / placed.file).open("r+b") as file:
        file.seek(placed.offset)
        file.write((values.astype(np.float32) * factor).astype(values.dtype).tobytes())
    manifest = read_manifest(bundle)
    files = tuple(file_record(bundle, bundle / each.path) if each.path == placed.file else each for each in manifest.files)
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    report = judged(bundle)
    assert report.verdict == "failed", report.summary
