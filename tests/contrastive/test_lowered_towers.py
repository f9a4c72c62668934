"""What TensorRT is given of the towers: lowered graphs that are linted, in one type throughout, with the reference's numbers in fp16; the
profiles; and quantised bundles that pass parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from kinds import CLIP, KINDS, PAPER, READ
from variations import MPT, drawn_model

import flamingo_export
from flamingo_export.backends.tensorrt.lowering.lint import check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.backends.tensorrt.lowering.shapes import TEXTS, Bounds, profiles
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest
from flamingo_export.errors import BuildError
from flamingo_export.precision import Policy, Rule, StorageType
from flamingo_export.quantize.policies import for_model, preset
from flamingo_export.specs import subgraph_specs, towers_of
from flamingo_export.validate.report.parity_report import read_report
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.calibration_table import calibrated_tensors
from flamingo_reference.config import ModelConfig
from flamingo_reference.model.subgraphs import subgraphs_of

each = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
NONE: frozenset[str] = frozenset()
ELEMENTS = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}


@each
def test_lowered_graphs(config: ModelConfig, tmp_path: Path) -> None:
    kinds: tuple[StorageType, ...] = ("fp16", "bf16", "fp32")
    for compute in kinds:
        bundle = flamingo_export.build(
            drawn_model(config), out=tmp_path / f"{compute}.bundle", storage=compute, parity="skip"
        ).path
        for name in ("vision_encoder", *towers_of(config)):
            lowered = lower(ir.load(bundle / f"{name}.onnx"), compute=compute, capacity=32, native_functions=NONE)
            check_graph(lowered, subgraph_specs(config)[name], compute=compute, capacity=32)
            proto = ir.serde.serialize_model(lowered)
            for node in proto.graph.node:
                for attribute in [each for each in node.attribute if each.name == "TRT_decomposable"]:
                    node.attribute.remove(attribute)
            inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
            norms = {"LayerNormalization", "RMSNormalization"}
            wide = {n for node in proto.graph.node if node.op_type in norms for n in (node.input[0], node.output[0])}
            stored = {value.name for value in proto.graph.initializer}
            for value in inferred.graph.value_info:
                if value.name not in stored | wide and value.type.tensor_type.elem_type in ELEMENTS.values():
                    assert value.type.tensor_type.elem_type == ELEMENTS[compute], value.name
            if compute == "fp16":
                save_lowered(lowered, bundle / f"{name}.lowered.onnx")
                assert_numbers(bundle / f"{name}.lowered.onnx", config, name)


def assert_numbers(path: Path, config: ModelConfig, name: str) -> None:
    """In fp16 against the reference in fp64: twice the error of PyTorch in fp16, or 4 of its units in the last place."""
    rng, model = np.random.default_rng(3), drawn_model(config)
    sizes = {"F": 2, "B": 3, "S": 7}
    feeds = {}
    for tensor in subgraph_specs(config)[name].inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
        if tensor.name == "lengths":
            feeds[tensor.name] = np.array([7, 1, 4])
        elif tensor.kind == "int64":
            feeds[tensor.name] = rng.integers(0, 60, shape)
        else:
            feeds[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    narrow = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in feeds.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(outputs, narrow), strict=True))

    def reference(dtype: torch.dtype) -> dict[str, np.ndarray]:
        module = subgraphs_of(drawn_model(config, dtype=dtype))[name]
        given = {k: torch.from_numpy(v).to(dtype) if v.dtype == np.float32 else torch.from_numpy(v) for k, v in feeds.items()}
        with torch.no_grad():
            return {key: value.double().numpy() for key, value in module(given).items()}

    exact, eager = reference(torch.float64), reference(torch.float16)
    assert model.config == config
    assert found.keys() == exact.keys()
    for key, value in exact.items():
        scale = float(np.abs(value).max())
        error = float(np.abs(found[key].astype(np.float64) - value).max()) / scale
        own = float(np.abs(eager[key] - value).max()) / scale
        assert error <= max(2 * own, 4 * 2.0**-11), (key, error, own)


def test_profiles() -> None:
    specs, limits = subgraph_specs(CLIP), ShapeLimits(max_length=512)
    (texts,) = profiles(specs["text_tower"], limits)
    assert texts.bounds == {"B": Bounds(1, 1, TEXTS), "S": Bounds(1, 11, 11)}
    (images,) = profiles(specs["image_tower"], limits)
    assert images.bounds == {"F": Bounds(1, 1, limits.frames)}


def test_which_policies_a_text_tower_takes() -> None:
    for name in ("int8", "int4"):
        made = for_model(preset(name), CLIP)
        assert made.rules[:-1] == preset(name).rules
        assert (made.rules[-1].weights, made.rules[-1].format) == ("text_tower/*", "int8")
        assert for_model(made, CLIP) == made  # a refit says it again
        assert for_model(preset(name), MPT) == preset(name)
    assert for_model(preset("fp8"), CLIP) == preset("fp8")
    mine = Policy(name="mine", rules=preset("int8").rules)
    assert for_model(mine, CLIP) == mine
    assert not any(
        name.startswith(("text_tower", "image_tower", "vision_encoder/readout")) for name in calibrated_tensors(READ)
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("config", [CLIP, PAPER], ids=["clip", "paper"])
def test_quantised_bundles_pass_parity(config: ModelConfig, policy: str, tmp_path: Path) -> None:
    out = tmp_path / "q.bundle"
    wide = widened(config)
    flamingo_export.build(drawn_model(wide), out=out, policy=policy, uncalibrated=policy == "fp8")
    report = read_report(out)
    assert report is not None
    towers = [row for row in report.rows if row.subgraph in ("image_tower", "text_tower") and row.level == "subgraph"]
    assert len(towers) == 3
    assert all(row.passed for row in towers), towers
    index = WeightIndex.read(out)
    stored = {index[name].storage for name in index if name.startswith("text_tower/") and name.endswith("ffw_up")}
    assert stored == {"fp32" if policy == "fp8" else "int8"}


def widened(config: ModelConfig) -> ModelConfig:
    """With a text tower whose widths have blocks."""
    import msgspec

    assert config.contrastive is not None
    assert config.contrastive.text is not None
    text = msgspec.structs.replace(config.contrastive.text, width=48, num_heads=3, ffw_width=64)
    return msgspec.structs.replace(config, contrastive=msgspec.structs.replace(config.contrastive, text=text))


def test_towers_in_fp8_are_refused_by_name(tmp_path: Path) -> None:
    policy = Policy(name="all", rules=(Rule(weights="*", format="fp8"),))
    with pytest.raises(BuildError, match=r"keeps image_tower/proj in fp8, and ranges .* are not measured"):
        flamingo_export.build(drawn_model(CLIP), out=tmp_path / "q.bundle", policy=policy, parity="skip")
    assert not (tmp_path / "q.bundle").exists()
    manifest = read_manifest(flamingo_export.build(drawn_model(MPT), out=tmp_path / "m.bundle", parity="skip").path)
    assert manifest.config.contrastive is None
