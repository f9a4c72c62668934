"""What TensorRT is given of the towers: lowered graphs that are linted, in one type throughout, with the reference's numbers in fp16; the
profiles; and quantised bundles that pass parity."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from kinds import CLIP, KEPT, KINDS, PAPER, READ
from variations import MPT, drawn_model

import flamingo_export
from flamingo_calibration import calibrate, shipped_samples
from flamingo_export.backends.tensorrt.lowering.lint import check_graph
from flamingo_export.backends.tensorrt.lowering.lower import lower, save_lowered
from flamingo_export.backends.tensorrt.lowering.shapes import TEXTS, Bounds, profiles
from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import BuildError, CalibrationError
from flamingo_export.precision import Policy, Rule, StorageType
from flamingo_export.quantize.matrices import range_scale
from flamingo_export.quantize.policies import for_model, preset
from flamingo_export.sources import LiveSource
from flamingo_export.specs import subgraph_specs, towers_of
from flamingo_export.validate import check_bundle
from flamingo_export.validate.report.parity_report import read_report
from flamingo_export.weights import WeightIndex, bundle_weights
from flamingo_export.weights.calibration_table import CALIBRATION_FILE, check_fits, read_table, write_table
from flamingo_export.weights.layout import INPUT_SCALE
from flamingo_reference.config import ModelConfig
from flamingo_reference.model.subgraphs import subgraphs_of
from tests.export.quantize.test_bundles import edited

each = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
NONE: frozenset[str] = frozenset()
ELEMENTS = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}


@pytest.mark.slow
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


@pytest.mark.parametrize(("name", "element"), [("int8", "int8"), ("int4", "int8"), ("fp8", "fp8")])
def test_which_policies_towers_take(name: str, element: str) -> None:
    made = for_model(preset(name), CLIP)
    assert made.rules[:-2] == preset(name).rules
    assert [(rule.weights, rule.format) for rule in made.rules[-2:]] == [("text_tower/*", element), ("image_tower/*", element)]
    assert for_model(made, CLIP) == made  # a refit says it again
    assert [rule.weights for rule in for_model(preset(name), KEPT).rules[len(preset(name).rules) :]] == ["image_tower/*"]
    assert for_model(preset(name), MPT) == preset(name)
    mine = Policy(name="mine", rules=preset(name).rules)
    assert for_model(mine, CLIP) == mine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "policy"),
    [
        *((config, policy) for config in (CLIP, PAPER) for policy in ("int8", "int4", "fp8", "towers")),
        *((config, policy) for config in (KEPT, READ) for policy in ("int8", "towers")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_quantised_bundles_pass_parity(config: ModelConfig, policy: str, tmp_path: Path) -> None:
    """fp8 with the ranges that the build measures itself, of the towers as of all else. `towers`: nothing but these in fp8."""
    out = tmp_path / "q.bundle"
    wide = widened(config)
    of_towers = ("text_tower/", "image_tower/", *(("vision_encoder/readout/",) if policy == "towers" else ()))
    rules = tuple(Rule(weights=f"{tower}*", format="fp8") for tower in of_towers)
    present = tuple(
        rule for rule in rules if any(w.product and w.name.startswith(rule.weights[:-1]) for w in bundle_weights(wide))
    )
    flamingo_export.build(
        drawn_model(wide), out=out, policy=Policy(name="mine", rules=present) if policy == "towers" else policy
    )
    report = read_report(out)
    assert report is not None
    towers = [row for row in report.rows if row.subgraph in ("image_tower", "text_tower") and row.level == "subgraph"]
    assert len(towers) == (1 if config is KEPT else 3)
    assert all(row.passed for row in towers), towers
    index = WeightIndex.read(out)
    products = [weight.name for weight in bundle_weights(wide) if weight.product and weight.name.startswith(of_towers)]
    stored = {name: index[name].storage for name in products}
    widths = {weight.name: weight.shape[0] for weight in bundle_weights(wide)}
    if policy in ("fp8", "towers"):
        assert set(stored.values()) == {"fp8"}
        table = read_table(out / CALIBRATION_FILE)
        for name in products:
            assert float(index.read_tensor(out, name + INPUT_SCALE)) == range_scale(table.threshold(name))
    else:
        assert stored == {name: "int8" if widths[name] % 16 == 0 else "fp32" for name in products}


def widened(config: ModelConfig) -> ModelConfig:
    """With a text tower whose widths have blocks."""
    assert config.contrastive is not None
    if config.contrastive.text is None:
        return config
    text = msgspec.structs.replace(config.contrastive.text, width=48, num_heads=3, ffw_width=64)
    return msgspec.structs.replace(config, contrastive=msgspec.structs.replace(config.contrastive, text=text))


@pytest.mark.slow
def test_a_wrong_range_of_a_tower_fails_parity(tmp_path: Path) -> None:
    built = flamingo_export.build(drawn_model(CLIP), out=tmp_path / "q.bundle", policy="fp8").path
    for number, name in enumerate(("text_tower/layer.1/ffw_down", "image_tower/proj")):
        report = check_bundle(edited(built, tmp_path / f"{number}.bundle", f"{name}{INPUT_SCALE}", 4.0))
        failed = {row.subgraph for row in report.rows if not row.passed}
        assert failed == {name.split("/")[0]}


@pytest.mark.slow
def test_tables_with_and_without_towers(tmp_path: Path) -> None:
    """A table of the model without its towers serves where no tower is in fp8, and one with them serves the model without."""
    table = calibrate(LiveSource(drawn_model(CLIP)), shipped_samples(CLIP, None), tokenizer=None)
    assert table.towers_sha256 is not None
    bare = msgspec.structs.replace(
        table, tensors={name: each for name, each in table.tensors.items() if "tower/" not in name}, towers_sha256=None
    )
    digest = table.weights_sha256
    check_fits(bare, CLIP, digest, table.towers_sha256)
    check_fits(table, msgspec.structs.replace(CLIP, contrastive=None), digest)
    with pytest.raises(CalibrationError, match=r"of another contrastive encoder \("):
        check_fits(table, CLIP, digest, "0" * 64)
    tensors = {name: each for name, each in table.tensors.items() if name != "text_tower/proj"}
    short = msgspec.structs.replace(table, tensors=tensors)
    with pytest.raises(CalibrationError, match=r"it lacks text_tower/proj"):
        check_fits(short, CLIP, digest, table.towers_sha256)
    write_table(tmp_path / "bare.json", bare)
    with pytest.raises(
        BuildError, match=r"keeps image_tower/proj in fp8, and the table .*bare.json has no ranges of a contrastive"
    ):
        flamingo_export.build(
            drawn_model(CLIP), out=tmp_path / "q.bundle", policy="fp8", calibration=tmp_path / "bare.json", parity="skip"
        )
    assert not (tmp_path / "q.bundle").exists()
    mine = Policy(name="mine", rules=preset("fp8").rules)
    out = flamingo_export.build(
        drawn_model(CLIP), out=tmp_path / "q.bundle", policy=mine, calibration=tmp_path / "bare.json", parity="skip"
    ).path
    assert WeightIndex.read(out)["text_tower/proj"].storage == "fp32"
