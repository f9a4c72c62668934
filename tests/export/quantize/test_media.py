"""Keys and values of media in FP8: nano built with the bank in E4M3, run by ONNX Runtime, and lowered for the plugin."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch

from flamingo_export import api
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.onnxruntime import HostBuffer, OnnxRuntimeBackend
from flamingo_export.backends.registry import get_compiler
from flamingo_export.backends.tensorrt.dtypes import element_type, encode
from flamingo_export.backends.tensorrt.lowering.lint import check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.errors import BuildError, InputError, ParityError
from flamingo_export.pipeline import plan as build_plan
from flamingo_export.pipeline import run as pipeline
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.precision import Policy, Precision
from flamingo_export.quantize.matrices import FP8, range_scale
from flamingo_export.quantize.policies import read_policy
from flamingo_export.sources.choice import source_for_size
from flamingo_export.specs import subgraph_specs
from flamingo_export.validate import check_bundle
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.calibration_table import CALIBRATION_FILE, METHODS, read_table, write_table
from flamingo_reference.config import SIZES
from tests.export.quantize.test_bundles import IMAGE, edited

pytestmark = pytest.mark.slow

POLICY = Policy(name="media in fp8", media="fp8")
CAPACITY = 64
PLUGIN = frozenset({"PhiCrossAttention"})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pipeline.BuildResult:
    """Nano with nothing but its media quantised, parity included."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("media") / "nano.bundle"
    return pipeline.build(BuildRequest(source=source_for_size("nano"), out=out, policy=POLICY))


def lowered(bundle: Path, native: frozenset[str] = PLUGIN) -> ir.Model:
    return lower(ir.load(bundle / "decoder.onnx"), compute="bf16", capacity=CAPACITY, native_functions=native)


def lint(model: ir.Model, native: frozenset[str] = PLUGIN) -> int:
    """Plugin layers that TensorRT is to make of a lowered decoder."""
    spec = subgraph_specs(SIZES["nano"], media="fp8")["decoder"]
    return check_graph(model, spec, compute="bf16", capacity=CAPACITY, native_functions=native).plugin_layers


def test_parity_passes_and_keys_are_felt_to_be_rounded(built: pipeline.BuildResult) -> None:
    assert built.parity is not None
    assert built.parity.verdict == "passed", built.parity.summary
    errors = {row.tensor: row.error for row in built.parity.rows if row.subgraph == "media_kv" and row.level == "subgraph"}
    assert len(errors) == 6
    # Half an ulp of E4M3 is at most 1/16 of a number, and the largest is a few times the rms.
    assert all(error is not None and 0.02 < error < 0.5 for error in errors.values())


def test_it_captions_a_picture(built: pipeline.BuildResult) -> None:
    with api.load(built.path, backend="onnxruntime", threads=1) as model:
        said = model.generate("<image>Output:", images=[IMAGE], beams=3)
    assert said.text == (IMAGE.parent / "truth_captions.jsonl").read_text().splitlines()[4].split('"caption":"')[1].rstrip('"}')


def test_the_bank_is_a_byte_a_number(built: pipeline.BuildResult) -> None:
    manifest = read_manifest(built.path)
    shape = (5, *subgraph_specs(manifest.config)["decoder"].input("media_k.0").shape[1:])
    session = OnnxRuntimeBackend().open(built.path, manifest, manifest.graph("decoder"), SessionOptions(threads=1))
    buffer = session.allocate("media_v.2", tuple(map(int, shape)))
    session.close()
    assert isinstance(buffer, HostBuffer)
    assert buffer.array.nbytes == math.prod(map(int, shape))
    assert (element_type("float", "fp32").size, element_type("float", "fp16").size, element_type("fp8", "fp16").size) == (
        4,
        2,
        1,
    )


def test_scales_are_those_of_the_table_by_name(built: pipeline.BuildResult) -> None:
    table, index = read_table(built.path / CALIBRATION_FILE), WeightIndex.read(built.path)
    names = [f"media_kv/layer.{i}/{kind}" for i in range(3) for kind in "kv"]
    assert {name for name in index if name.startswith("media_kv/") and name.endswith("scale")} == {
        f"{name}.input_scale" for name in names
    }
    for name in names:
        stored = index.read_tensor(built.path, f"{name}.input_scale")
        assert (stored.shape, float(stored)) == ((), range_scale(table.threshold(name)))


@pytest.mark.parametrize("factor", [2.0, 1 / 64])
def test_a_wrong_scale_fails_parity(built: pipeline.BuildResult, tmp_path: Path, factor: float) -> None:
    report = check_bundle(edited(built.path, tmp_path / "w.bundle", "media_kv/layer.1/v.input_scale", factor))
    assert report.verdict == "failed"
    failed = {(row.subgraph, row.tensor) for row in report.failures}
    assert ("media_kv", "media_v.1") in failed
    assert ("media_kv", "media_k.1") not in failed
    assert any(subgraph.startswith("decoder") for subgraph, _ in failed)


def test_a_wrong_table_fails_the_build_though_reference_and_engine_agree(built: pipeline.BuildResult, tmp_path: Path) -> None:
    table = read_table(built.path / CALIBRATION_FILE)
    name = "media_kv/layer.2/k"
    ranges = {method: getattr(table.tensors[name], method) / 64 for method in METHODS}
    broken = msgspec.structs.replace(table.tensors[name], **ranges)
    write_table(tmp_path / "c.json", msgspec.structs.replace(table, tensors={**table.tensors, name: broken}))
    request = BuildRequest(
        source=source_for_size("nano"), out=tmp_path / "w.bundle", policy=POLICY, calibration=tmp_path / "c.json"
    )
    with pytest.raises(ParityError, match="media_kv"):
        pipeline.build(request)


def test_the_plugins_call_has_keys_and_values_as_codes_and_both_scales(built: pipeline.BuildResult) -> None:
    """Order, types and field as docs/plugin.md says; the scales stay fp32 in an engine of bf16."""
    model = lowered(built.path)
    assert lint(model) == 3
    calls = [node for node in model.graph if node.op_type == "PhiCrossAttention"]
    for i, call in enumerate(calls):
        names = [value.name if value is not None else None for value in call.inputs]
        scales = [f"media_kv/layer.{i}/{kind}.input_scale" for kind in "kv"]
        assert names[1:] == [f"media_k.{i}", f"media_v.{i}", "media_rows", "phi", *scales]
        types = [value.dtype for value in call.inputs if value is not None][1:]
        assert types == [ir.DataType.FLOAT8E4M3FN] * 2 + [ir.DataType.INT64] * 2 + [ir.DataType.FLOAT] * 2
        assert call.attributes["kv_scales"].as_int() == 1
        assert [tuple(value.shape or ()) for value in call.inputs[5:] if value is not None] == [(), ()]


def test_a_call_without_its_scales_is_refused(built: pipeline.BuildResult) -> None:
    for spoil in (
        lambda call: call.attributes.pop("kv_scales"),
        lambda call: call.resize_inputs(6),
        lambda call: call.resize_inputs(5),
    ):
        model = lowered(built.path)
        spoil(next(node for node in model.graph if node.op_type == "PhiCrossAttention"))
        with pytest.raises(BuildError, match="expected both in FP8 with two scales in fp32"):
            lint(model)


def test_tensorrt_without_the_plugin_is_refused_with_the_nearest(built: pipeline.BuildResult) -> None:
    """Its network takes FP8 into DequantizeLinear alone, and not into one in a function that is called more than once."""
    with pytest.raises(BuildError, match=r'tensorrt-rtx runs without one.*media = "storage".*--backend tensorrt'):
        get_compiler("tensorrt-rtx").check_policy(POLICY, "sm89")
    get_compiler("tensorrt").check_policy(POLICY, None)
    with pytest.raises(BuildError, match=r"reads media_k\.0, media_v\.0 in FP8, which TensorRT takes only in a plugin"):
        lint(lowered(built.path, frozenset()), frozenset())


def test_a_file_says_so_and_the_key_tells_it_apart(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('extends = "fp8"\nmedia = "fp8"\n')
    policy = read_policy(path)
    assert (policy.media, policy.needs_ranges, POLICY.needs_ranges) == ("fp8", True, True)
    stored, plain = (
        Precision(storage="bf16", policy=each) for each in (policy, msgspec.structs.replace(policy, media="storage"))
    )
    assert (stored.media, plain.media) == ("fp8", "float")
    assert stored.key != plain.key


def test_engines_take_codes_and_no_floats() -> None:
    element = element_type("fp8", "bf16")
    assert (element.trt, element.code, element.bits, element.size) == ("FP8", 10, 8, 1)
    into = np.zeros(3, FP8)
    encode(np.array([1.0, -448.0, 0.0], FP8), into, element)
    assert into.astype(np.float32).tolist() == [1.0, -448.0, 0.0]
    with pytest.raises(InputError, match="float32 was given"):
        encode(np.ones(3, np.float32), into, element)
    with pytest.raises(InputError, match="float8_e4m3fn was given"):
        encode(np.ones(3, FP8), np.zeros(3, np.float32), element_type("float", "fp32"))


def test_plan_and_inspect_count_a_byte_a_number(built: pipeline.BuildResult, tmp_path: Path) -> None:
    from flamingo_export.cli.inspect import _summary

    assert "keys and values kept in FP8, a byte a number" in _summary(built.path, built.manifest)
    plain = msgspec.structs.replace(POLICY, media="storage")
    requests = [
        BuildRequest(source=source_for_size("nano"), out=tmp_path / "n.bundle", policy=each) for each in (POLICY, plain)
    ]
    coded, floats = (build_plan.plan(request).device_bytes for request in requests)
    block, limits = SIZES["nano"].cross_attention, read_manifest(built.path).limits
    numbers = 2 * 3 * block.num_heads * SIZES["nano"].resampler.num_latents * block.head_size * limits.bank_rows
    # The scales beside the weights are six numbers more.
    assert floats - coded == pytest.approx(3 * numbers, abs=100)
