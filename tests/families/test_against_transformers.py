"""parity --against transformers: the engines of a bundle beside transformers' own model of the checkpoint's files."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from idefics_models import IMAGE, their_config, their_logits, their_model
from safetensors.numpy import save_file

import flamingo_export
from flamingo_export.bundle.manifest import PlaceRecord, read_manifest
from flamingo_export.cli import main
from flamingo_export.errors import CheckpointError, ParityError
from flamingo_export.sources import CheckpointSource
from flamingo_export.validate import check_bundle
from flamingo_export.validate.expected.cases import RESET_CASE, decoder_cases, encoder_cases, phi_cases, pixel_cases
from flamingo_export.validate.expected.decoder_calls import plan_case
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.oracle import encoder_feeds, record_numbers
from flamingo_export.validate.expected.transformers.transformers_parts import TransformersParts
from flamingo_export.validate.expected.transformers.whole import record_whole
from flamingo_reference.checkpoints.files.safetensors_file import open_header

pytestmark = pytest.mark.slow


def write(folder: Path, *, seed: int = 3, dtype: torch.dtype = torch.float32, **kind: bool) -> Any:
    """A folder as on the hub, in shards with an index; returns the model that it holds."""
    theirs = their_model(their_config(**kind), seed=seed).to(dtype)
    theirs.save_pretrained(folder, max_shard_size="100KB")
    return theirs


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint's folder, and a bundle of it."""
    place = tmp_path_factory.mktemp("against")
    write(place / "idefics", vector=True)
    return place / "idefics", flamingo_export.build(place / "idefics", out=place / "idefics.bundle", parity="skip").path


@pytest.fixture
def copy(hub: tuple[Path, Path], tmp_path: Path) -> Path:
    """The bundle, to be spoilt or written to."""
    return Path(shutil.copytree(hub[1], tmp_path / "copy.bundle"))


def test_whole(hub: tuple[Path, Path], copy: Path) -> None:
    report = check_bundle(copy, backend="onnxruntime", checkpoint=hub[0], against="transformers")
    assert report.verdict == "passed", report.summary
    assert report.not_run == ()
    config = read_manifest(copy).config
    cases = {row.case for row in report.rows}
    assert {*phi_cases(config), *(case.name for case in pixel_cases(config))} <= cases
    assert f"{RESET_CASE}, from pixels" in cases
    assert {row.subgraph for row in report.rows if row.level == "layer"} == {f"decoder/layer.{layer}" for layer in range(6)}
    assert {(trace.search, trace.outcome) for trace in report.traces} == {("greedy", "equal"), ("beam", "equal")}
    assert {trace.case for trace in report.traces} >= {"one image", "the end of a text, then another image"}
    assert "against transformers" in report.summary
    record = read_manifest(copy).parity
    assert (record.state, record.against, record.backends) == ("passed", "transformers", ("onnxruntime",))
    assert not (copy / "golden").exists()  # golden values are the reference's


def test_layer_by_layer_where_the_whole_does_not_fit(hub: tuple[Path, Path], copy: Path) -> None:
    report = check_bundle(copy, backend="onnxruntime", checkpoint=hub[0], against="transformers", memory=1)
    assert report.verdict == "passed", report.summary
    assert [left_out.name for left_out in report.not_run] == ["token traces"]
    assert not report.traces
    notes = {row.case: row.note for row in report.rows if row.tensor == "logits"}
    assert notes.keys() >= {case.name for case in pixel_cases(read_manifest(copy).config)}
    assert set(notes.values()) == {"layer by layer, for want of memory"}
    assert len(report.layers) == 6


@pytest.mark.parametrize(("qk_norm", "vector", "tied"), [(False, False, False), (True, True, True)])
def test_stored_in_16_bits_as_it_is_published(tmp_path: Path, qk_norm: bool, vector: bool, tied: bool) -> None:
    """Every weight is exact in bf16 but for those that gates are folded into, which transformers keeps apart."""
    write(tmp_path / "m", seed=5, dtype=torch.bfloat16, qk_norm=qk_norm, vector=vector, tied=tied)
    bundle = flamingo_export.build(tmp_path / "m", out=tmp_path / "b.bundle", parity="skip", storage="bf16").path
    report = check_bundle(bundle, backend="onnxruntime", checkpoint=tmp_path / "m", against="transformers", memory=1)
    assert report.verdict == "passed", report.summary


def test_parts_one_after_the_other_are_the_whole(hub: tuple[Path, Path]) -> None:
    """Keys and values put in, masks made for one layer, weights read as they are used: the logits are the whole model's."""
    source = CheckpointSource(hub[0])
    parts = TransformersParts(source, "fp32")
    cases = (*decoder_cases(source.config), *pixel_cases(source.config))
    joined, whole = (Goldens(weights_sha256="", storage="fp32", model="") for _ in range(2))
    record_numbers(parts, joined, cases=cases)
    record_whole(parts.fp64, parts.rounded, source.config, cases, whole)
    assert len(whole.expected) == 5
    for key, expected in whole.expected.items():
        assert np.abs(joined.expected[key].values - expected.values).max() < 1e-12 * expected.peak
    assert not any(parameter.device.type != "meta" for parameter in parts.fp64.model.parameters())


def test_whole_logits_are_those_of_the_model_that_was_saved(tmp_path: Path) -> None:
    """In fp64 but for what transformers computes in fp32 whatever the type, which the reference here does not."""
    theirs = write(tmp_path, seed=9).double()
    source = CheckpointSource(tmp_path)
    parts = TransformersParts(source, "fp32")
    goldens = Goldens(weights_sha256="", storage="fp32", model="")
    record_whole(parts.fp64, parts.rounded, source.config, pixel_cases(source.config), goldens)
    pixels = torch.from_numpy(encoder_feeds(source.config, encoder_cases(source.config)[0])["pixels"]).double()
    for case in pixel_cases(source.config):
        (sequence,) = plan_case(source.config, case).sequences
        wanted = their_logits(theirs, list(sequence.tokens), pixels[list(sequence.media)][None]).numpy()
        found = goldens.expected[f"{case.name}|logits"].values.reshape(wanted.shape)
        error = np.abs(found - wanted).max() / np.sqrt(np.mean(wanted**2))
        assert 1e-9 < error < 4e-6
        assert sequence.tokens.count(IMAGE) == len(sequence.media)


@contextmanager
def within(bundle: Path, weight: str) -> Iterator[np.ndarray[Any, Any]]:
    """One of a bundle's weights, to be changed where it lies: graphs know the place of each."""
    (path,) = (path for path in (bundle / "weights").glob("*.safetensors") if weight in open_header(path))
    entry = open_header(path)[weight]
    flat = np.memmap(path, dtype=entry.dtype, mode="r+", offset=entry.start, shape=(math.prod(entry.shape),))
    yield flat
    flat.flush()


def damaged(bundle: Path, weight: str, change: float) -> None:
    """One number of one of the bundle's weights moved by `change` times the largest."""
    with within(bundle, weight) as flat:
        flat[flat.size // 3] += change * np.abs(flat).max()


@pytest.mark.parametrize(
    ("weight", "diverging"),
    [
        ("vision_encoder/layer.1/ffw_up", "vision_encoder"),
        ("resampler/layer.0/kv_proj", "resampler"),
        ("media_kv/layer.2/k_proj", "media_kv"),
        ("decoder/layer.2/cross_attention/q_proj", "decoder/layer.2"),
        ("decoder/layer.3/ffw_up", "decoder/layer.3"),
    ],
)
def test_a_damaged_weight_fails(
    hub: tuple[Path, Path], copy: Path, weight: str, diverging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(copy, weight, 0.05)
    monkeypatch.setattr(
        "flamingo_export.bundle.verify.open_bundle", read_manifest
    )  # which sees by the digest that it is damaged
    report = check_bundle(copy, backend="onnxruntime", checkpoint=hub[0], against="transformers", memory=1)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == diverging
    assert read_manifest(copy).parity.state == "failed"


def test_another_checkpoint_is_refused(copy: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", seed=8, vector=True)
    with pytest.raises(CheckpointError, match="has other weights"):
        check_bundle(copy, checkpoint=tmp_path / "other", against="transformers")
    with pytest.raises(CheckpointError, match="--checkpoint DIR"):
        check_bundle(copy, against="transformers")


def test_a_checkpoint_beside_the_bundle_is_found(hub: tuple[Path, Path], tmp_path: Path) -> None:
    """flamingo-export parity idefics.bundle --against transformers, as long as the checkpoint lies where it was built from."""
    shutil.copytree(hub[0].parent, tmp_path / "place")
    bundle = tmp_path / "place" / "idefics.bundle"
    assert read_manifest(bundle).source.place == PlaceRecord(path="idefics")
    assert main(["parity", str(bundle), "--against", "transformers"]) == 0
    record = read_manifest(bundle).parity
    assert (record.state, record.against) == ("passed", "transformers")
    moved = bundle.rename(tmp_path / "idefics.bundle")
    with pytest.raises(CheckpointError, match="--checkpoint DIR"):
        check_bundle(moved, against="transformers")
    # A manifest that leads elsewhere is not followed.
    raw = json.loads((moved / "manifest.json").read_text())
    for path in ("place/../place/idefics", str(tmp_path / "place" / "idefics")):
        raw["source"]["place"] = {"path": path}
        (moved / "manifest.json").write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match="--checkpoint DIR"):
            check_bundle(moved, against="transformers")
    raw["source"]["place"] = {"path": "place/idefics"}
    (moved / "manifest.json").write_text(json.dumps(raw))
    assert check_bundle(moved, against="reference").against == "reference"


def test_what_lies_elsewhere_is_not_told(hub: tuple[Path, Path], tmp_path: Path) -> None:
    built = flamingo_export.build(hub[0], out=tmp_path / "b.bundle", parity="skip")
    assert built.manifest.source.place is None


@pytest.mark.parametrize("half", ["cross_attention/out_proj", "ffw_down"])
def test_a_gate_that_is_a_little_wrong_fails_in_16_bits(tmp_path: Path, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That expected values are rounded as the bundle's are leaves no room for a wrong gate: 3 % of it are seen."""
    write(tmp_path / "m", seed=5, dtype=torch.bfloat16)
    bundle = flamingo_export.build(tmp_path / "m", out=tmp_path / "b.bundle", parity="skip", storage="bf16").path
    name = f"decoder/layer.2/{half}" if "/" in half else f"decoder/layer.2/cross_attention/{half}"
    with within(bundle, name) as flat:
        flat[:] = (flat.astype(np.float32) * 1.03).astype(flat.dtype)
    monkeypatch.setattr(
        "flamingo_export.bundle.verify.open_bundle", read_manifest
    )  # which sees by the digest that it is damaged
    report = check_bundle(bundle, backend="onnxruntime", checkpoint=tmp_path / "m", against="transformers", memory=1)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.2"


def test_a_bundle_of_another_family_is_refused(copy: Path, hub: tuple[Path, Path]) -> None:
    raw = json.loads((copy / "manifest.json").read_text())
    raw["source"]["family"] = "openflamingo"
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(
        ParityError,
        match=r"a checkpoint of openflamingo, and transformers' own model is known for IDEFICS and Llama 3\.2 Vision",
    ):
        check_bundle(copy, checkpoint=hub[0], against="transformers")


def test_transformers_is_missing(copy: Path, hub: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ParityError, match=r"has no IdeficsForVisionText2Text.*pip install '\.\[transformers\]'"):
        check_bundle(copy, checkpoint=hub[0], against="transformers")

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.6")
    with pytest.raises(
        ParityError, match=r"transformers 4\.57\.6 is too old to compare with: 5\.5 or later is needed.*pip install"
    ):
        check_bundle(copy, checkpoint=hub[0], against="transformers")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ParityError, match=r"transformers is not installed.*pip install"):
        check_bundle(copy, checkpoint=hub[0], against="transformers")


def test_an_adapter_is_merged_for_both(hub: tuple[Path, Path], tmp_path: Path) -> None:
    from flamingo_export.sources.choice import CheckpointFolder

    generator = torch.Generator().manual_seed(4)
    halves = {
        f"base_model.model.model.layers.3.mlp.up_proj.lora_{half}.weight": torch.randn(shape, generator=generator).numpy() * 0.1
        for half, shape in (("A", (2, 48)), ("B", (88, 2)))
    }
    save_file(halves, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    files = CheckpointFolder(path=hub[0], adapters=(tmp_path,))
    bundle = flamingo_export.build(files, out=tmp_path / "b.bundle", parity="skip").path
    assert check_bundle(bundle, backend="onnxruntime", checkpoint=files, against="transformers", memory=1).verdict == "passed"


def test_golden_values_are_asked_for_by_name(hub: tuple[Path, Path], copy: Path) -> None:
    with pytest.raises(ParityError, match="has no golden values"):
        check_bundle(copy, against="golden")
    with pytest.raises(ParityError, match="golden values lie in the bundle"):
        check_bundle(copy, checkpoint=hub[0], against="golden")
    report = check_bundle(copy, backend="onnxruntime", checkpoint=hub[0], against="reference")
    assert (report.verdict, report.against) == ("passed", "reference")
    assert msgspec.structs.replace(report, rows=()).against == "reference"
    assert check_bundle(copy, backend="onnxruntime", against="golden").against == "golden"
