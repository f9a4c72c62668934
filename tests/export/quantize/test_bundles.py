"""Quantised bundles of the trained nano model: built as a user builds them, run by ONNX Runtime, proven against the reference."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from flamingo_export import api
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.onnxruntime import session_options
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.errors import BackendError, BuildError, CalibrationError, CheckpointError, ParityError
from flamingo_export.pipeline import run as pipeline
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.precision import Policy, Quantisation
from flamingo_export.quantize.matrices import dequantised, quantised
from flamingo_export.quantize.policies import POLICIES, for_model, preset
from flamingo_export.sources.choice import RandomWeights, nano_checkpoint, source_for_size
from flamingo_export.validate import check_bundle
from flamingo_export.weights import INPUT_SCALE, SCALE, WeightIndex
from flamingo_export.weights.calibration_table import CALIBRATION_FILE, METHODS, read_table, write_table

pytestmark = pytest.mark.slow

IMAGE = Path(__file__).parents[3] / "examples" / "a.png"


FP8 = pytest.mark.parametrize("built", ["fp8"], indirect=True)


@pytest.fixture(scope="session", params=POLICIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pipeline.BuildResult:
    """Nano under each preset, parity included."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("quantised") / f"nano-{request.param}.bundle"
    return pipeline.build(BuildRequest(source=source_for_size("nano"), out=out, policy=preset(request.param)))


def edited(bundle: Path, to: Path, name: str, factor: float) -> Path:
    """A copy of a bundle in which a tensor of fp32 is multiplied, digests seen to."""
    shutil.copytree(bundle, to)
    placed = WeightIndex.read(to)[name]
    with (to / placed.file).open("r+b") as file:
        file.seek(placed.offset)
        values = np.frombuffer(file.read(placed.length), np.float32) * np.float32(factor)
        file.seek(placed.offset)
        file.write(values.tobytes())
    from flamingo_export.bundle.manifest import write_manifest
    from flamingo_export.bundle.verify import file_record

    manifest = read_manifest(to)
    files = tuple(file_record(to, to / record.path) if record.path == placed.file else record for record in manifest.files)
    write_manifest(to, msgspec.structs.replace(manifest, files=files))
    return to


def optimised(bundle: Path, graph: str, tmp_path: Path) -> onnx.GraphProto:
    """What ONNX Runtime makes of a graph."""
    options = session_options(SessionOptions(), read_manifest(bundle).precision.policy)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(bundle / f"{graph}.onnx", options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph


def test_parity_passes_and_the_manifest_tells_of_policy_and_calibration(built: pipeline.BuildResult) -> None:
    assert built.parity is not None
    assert built.parity.verdict == "passed", built.parity.summary
    manifest = read_manifest(built.path)
    policy = manifest.precision.policy
    assert policy is not None
    assert policy == for_model(preset(policy.name), manifest.config)
    assert manifest.calibration is not None
    if policy is not None and policy.name == "fp8":
        assert manifest.calibration.origin == "shipped"
        assert manifest.calibration.tokens >= 400
        assert manifest.calibration.images > 0
        assert any(file.path == CALIBRATION_FILE for file in manifest.files)
    else:
        assert manifest.calibration.origin == "none"


def test_onnx_runtime_makes_one_kernel_of_each_quantised_product(built: pipeline.BuildResult, tmp_path: Path) -> None:
    name = built.path.name
    for graph, products in (("decoder", 6 * 4 + 3 * 4 + 1), ("media_kv", 6), ("resampler", 11)):
        nodes = optimised(built.path, graph, tmp_path).node
        found = Counter(node.op_type for node in nodes)
        if "fp8" in name:  # of activations alone; weights were widened when opening
            quantised = {node.output[0] for node in nodes if node.op_type == "QuantizeLinear"}
            assert {node.input[0] for node in nodes if node.op_type == "DequantizeLinear"} == quantised != set()
        else:
            assert found["MatMulNBits"] == products
            assert found["DequantizeLinear"] == 0


def test_stored_codes_are_those_of_the_folded_matrices(built: pipeline.BuildResult) -> None:
    """Read back from the files and widened: the gated projection, from the checkpoint's tensors by hand."""
    from safetensors.numpy import load_file

    name = "decoder/layer.2/cross_attention/ffw_down"
    index = WeightIndex.read(built.path)
    tensors = load_file(nano_checkpoint() / "model.safetensors")
    folded = tensors["cross_attention.1.ffw_down.weight"].T * np.tanh(np.float64(tensors["cross_attention.1.ffw_gate"]))
    element = index[name].storage
    how = Quantisation(element=element, block=128 if element != "fp8" else 0)  # type: ignore[arg-type]
    found = dequantised(index.read_tensor(built.path, name), index.read_tensor(built.path, name + SCALE), how)
    relative = np.sqrt(((found - folded) ** 2).mean() / (folded**2).mean())
    assert 1e-4 < relative < {"fp8": 0.04, "int8": 0.01, "int4": 0.13}[element]


def test_it_captions_a_picture(built: pipeline.BuildResult) -> None:
    with api.load(built.path, backend="onnxruntime", threads=1) as model:
        said = model.generate("<image>Output:", images=[IMAGE], beams=3)
    assert said.text == (IMAGE.parent / "truth_captions.jsonl").read_text().splitlines()[4].split('"caption":"')[1].rstrip('"}')


# The second hides below what int4 itself costs, and numbers alone would pass it.
@pytest.mark.parametrize(
    ("name", "factor"), [("layer.3/self_attention/qkv_proj", 1.25), ("layer.2/cross_attention/q_proj", 1.05)]
)
def test_a_wrong_scale_of_a_weight_fails_parity(built: pipeline.BuildResult, tmp_path: Path, name: str, factor: float) -> None:
    wrong = edited(built.path, tmp_path / "w.bundle", f"decoder/{name}{SCALE}", factor)
    report = check_bundle(wrong)
    assert report.verdict == "failed"
    layer = name.partition("/")[0]
    assert report.first_diverging_layer == f"decoder/{layer}"
    (row,) = (row for row in report.rows if row.level == "weights" and not row.passed)
    assert row.note.endswith(f"give: decoder/{name}")
    assert check_bundle(wrong, against="golden").first_diverging_layer == f"decoder/{layer}"


@FP8
def test_a_wrong_scale_of_an_activation_fails_parity(built: pipeline.BuildResult, tmp_path: Path) -> None:
    name = "decoder/layer.3/ffw_up" + INPUT_SCALE
    report = check_bundle(edited(built.path, tmp_path / "w.bundle", name, 1 / 32))
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.3"


@FP8
def test_a_wrong_table_fails_the_build_though_reference_and_engine_agree(built: pipeline.BuildResult, tmp_path: Path) -> None:
    table = read_table(built.path / CALIBRATION_FILE)
    name = "decoder/layer.3/ffw_up"
    ranges = {method: getattr(table.tensors[name], method) / 64 for method in METHODS}
    broken = msgspec.structs.replace(table.tensors[name], **ranges)
    write_table(tmp_path / "c.json", msgspec.structs.replace(table, tensors={**table.tensors, name: broken}))
    request = BuildRequest(
        source=source_for_size("nano"), out=tmp_path / "w.bundle", policy=preset("fp8"), calibration=tmp_path / "c.json"
    )
    with pytest.raises(ParityError, match=r"first diverging layer: decoder/layer\.3"):
        pipeline.build(request)


@FP8
def test_a_table_of_other_weights_is_refused_and_nothing_is_left(built: pipeline.BuildResult, tmp_path: Path) -> None:
    request = BuildRequest(
        source=source_for_size("nano", seed=1),
        out=tmp_path / "n.bundle",
        policy=preset("fp8"),
        calibration=built.path / CALIBRATION_FILE,
        parity="skip",
    )
    with pytest.raises(CalibrationError, match="of other weights"):
        pipeline.build(request)
    assert not list(tmp_path.iterdir())


def test_without_torch_fp8_stops_and_says_so_unless_uncalibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    request = BuildRequest(source=source_for_size("nano"), out=tmp_path / "n.bundle", policy=preset("fp8"))
    with pytest.raises(BuildError, match=r"PyTorch is not installed.*--calibration.*--uncalibrated"):
        pipeline.build(request)
    assert not list(tmp_path.iterdir())
    result = pipeline.build(msgspec.structs.replace(request, uncalibrated=True))
    assert result.manifest.calibration is not None
    assert result.manifest.calibration.origin == "none"
    assert result.manifest.parity.state == "not_run"
    assert any("without knowing the ranges" in note for note in result.notes)


def test_a_calibration_without_a_policy_is_refused(tmp_path: Path) -> None:
    request = BuildRequest(source=source_for_size("nano"), out=tmp_path / "n.bundle", calibration=tmp_path / "c.json")
    with pytest.raises(BuildError, match="add --fp8, --int8 or --int4"):
        pipeline.build(request)


def test_refit_keeps_the_policy_and_its_layout(built: pipeline.BuildResult, tmp_path: Path) -> None:
    other = RandomWeights(config=built.manifest.config, seed=3)
    result = api.refit(built.path, other, out=tmp_path / "r.bundle", parity="skip")
    assert result.manifest.precision == built.manifest.precision
    first, second = WeightIndex.read(built.path), WeightIndex.read(result.path)
    assert {name: first[name] for name in first} == {name: second[name] for name in second}


def test_matrices_that_no_block_divides_stay_as_they_are(tmp_path: Path, tiny_config) -> None:
    """Inputs of 24 and 40 channels have no block of 16 or more: the bundle runs all the same."""
    policy = Policy(name="all", rules=preset("int4").rules)
    request = BuildRequest(source=RandomWeights(config=tiny_config), out=tmp_path / "t.bundle", policy=policy, parity="skip")
    result = pipeline.build(request)
    index = WeightIndex.read(result.path)
    assert index["resampler/layer.0/q_proj"].storage == "fp32"
    assert index["decoder/layer.0/ffw_up"].storage == "int4"
    with api.load(result.path, backend="onnxruntime", threads=1) as model:
        assert model.generate([1, 5, 6], max_new_tokens=3).token_ids


def test_weights_that_are_not_finite_are_still_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(nano_checkpoint(), folder, ignore=shutil.ignore_patterns("golden"))
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.layers.1.ffw_up.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")
    from flamingo_export.sources.choice import CheckpointFolder

    request = BuildRequest(
        source=CheckpointFolder(path=folder), out=tmp_path / "n.bundle", policy=preset("int4"), parity="skip"
    )
    with pytest.raises(CheckpointError, match=r"language_model\.layers\.1\.ffw_up\.weight"):
        pipeline.build(request)


def test_quantised_matrices_do_not_depend_on_the_order_of_tiles() -> None:
    """A wide matrix is worked on in tiles; each column's codes are its own."""
    given = np.random.default_rng(0).standard_normal((128, 1500)).astype(np.float32)
    how = Quantisation(element="int4", block=64)
    codes, scales = quantised(given, how)
    part_codes, part_scales = quantised(np.ascontiguousarray(given[:, 700:900]), how)
    np.testing.assert_array_equal(codes[:, 350:450], part_codes)
    np.testing.assert_array_equal(scales[:, 700:900], part_scales)


@pytest.mark.parametrize("given", [{"calibration": Path("calibration.json")}, {"uncalibrated": True}])
def test_ranges_without_a_policy_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="only applies to quantised builds; add --fp8"):
        pipeline.build(BuildRequest(source=source_for_size("nano"), out=tmp_path / "b.bundle", **given))
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_memory_does_not_hold_is_refused(built: pipeline.BuildResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its weights take once they are open: codes of blocks stay as they are, all else is fp32, but for tables read from their files."""
    index = WeightIndex.read(built.path)
    codes = [name.removesuffix(SCALE) for name in index if name.endswith(SCALE)]
    kept = [index[name].length for name in codes if index[name].storage != "fp8"]
    tables = {"text_tower/embedding"} | (
        {"decoder/embedding"} if "decoder/head" in index else set()
    )  # else it is the head, too
    needed = sum(kept) + sum(
        4 * int(np.prod(index[name].shape))
        for name in index
        if (name not in codes or index[name].storage == "fp8") and name not in tables
    )
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": needed - 1})())
    advice = "Build it with --int4" if not kept else "Free some, or run it on a GPU"
    with pytest.raises(BackendError, match=rf"nano-.*\.bundle take \d+ MiB of memory on a CPU.*{advice}"):
        api.load(built.path, backend="onnxruntime")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": needed})())
    api.load(built.path, backend="onnxruntime").close()
