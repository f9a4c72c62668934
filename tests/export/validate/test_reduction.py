"""`debug --reduce` with Polygraphy's own tool, on nano: a fault that is planted is what is left of the graph."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import trt_wheels

import flamingo_export
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest, write_manifest
from flamingo_export.bundle.verify import file_record
from flamingo_export.cli import main
from flamingo_export.errors import ParityError
from flamingo_export.sources.choice import source_for_size
from flamingo_export.validate import reduction
from flamingo_export.validate.reduction import MODEL, REDUCED, VALUES, reduce
from flamingo_export.validate.reduction_check import difference
from flamingo_export.weights import WeightIndex

onnx = pytest.importorskip("onnx")
pytest.importorskip("polygraphy", reason="Polygraphy is not installed (extra debug)")
pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed (extra debug)")

COMPARE = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
right = np.load(sys.argv[1])
try:
    session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {value.name: right[value.name] for value in session.get_inputs()})
except Exception as error:
    sys.exit(f"does not run: {error}" if "not run" in sys.argv else 0)
wrong = [name for name, value in zip(names, found) if not np.allclose(value, right[name], atol=1e-3)]
print("wrong:", *wrong)
sys.exit(1 if wrong else 0)
"""
"""A comparator of its own: a graph's results against those of a sound one, tensors by name."""


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "nano.bundle"
    limits = ShapeLimits(max_length=64, chunk=8, bank_rows=2, branches=2)
    return flamingo_export.build(source_for_size("nano"), out=out, limits=limits, parity="skip").path


@pytest.fixture
def altered(nano: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the bundle whose decoder was changed by a function, and which is intact by its manifest."""

    def made(change: Callable[[object], None]) -> Path:
        bundle = tmp_path / "altered.bundle"
        shutil.copytree(nano, bundle)
        model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
        change(model)
        onnx.save(model, bundle / "decoder.onnx")
        manifest, changed = read_manifest(bundle), file_record(bundle, bundle / "decoder.onnx")
        files = tuple(changed if file.path == changed.path else file for file in manifest.files)
        write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
        return bundle

    return made


def test_a_sound_graph_has_nothing_to_reduce(nano: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    assert main(["debug", str(nano), "--reduce", "decoder", "--layer", "1", "--out", str(out)]) == 0
    assert "decoder.layer1: the check passes the whole graph" in capfd.readouterr().out
    model = onnx.load(out / MODEL)
    assert not model.functions
    assert {tensor.name for tensor in model.graph.initializer}
    with np.load(out / VALUES) as values:
        assert set(values) == {name for node in model.graph.node for name in node.output if name} | {
            value.name for value in model.graph.input
        }


@pytest.mark.slow
def test_a_divergence_that_was_planted_is_what_is_left(nano: Path, altered: Callable[..., Path], tmp_path: Path) -> None:
    """The epsilon of one norm of six layers: of 300 nodes that one is left, found by a comparator of the user's own."""
    assert not reduce(nano, "decoder", out=tmp_path / "right").failing
    planted: list[str] = []

    def change(model) -> None:
        node = [node for node in model.graph.node if node.op_type == "LayerNormalization"][5]
        next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1.0
        planted.append(node.name)

    compare = tmp_path / "compare.py"
    compare.write_text(COMPARE)
    check = f"{sys.executable} {compare} {tmp_path / 'right' / VALUES}"
    found = reduce(altered(change), "decoder", out=tmp_path / "found", check=check)
    assert found.failing
    assert found.nodes[0] > 250
    assert found.operators == {"LayerNormalization": 1}
    assert found.file == tmp_path / "found" / REDUCED
    (node,) = onnx.load(found.file).graph.node
    assert node.name == planted[0]
    assert found.said.startswith("wrong:")
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["bisect.log", MODEL, REDUCED, VALUES]


@pytest.mark.slow
def test_what_a_parser_refuses_is_what_is_left(
    altered: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An operator that TensorRT does not have, parsed for real by TensorRT for RTX on a CPU."""
    trt_wheels.rtx()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # its wheels, for the check's process

    def change(model) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Gelu" or node.name.endswith("/ffw_residual"))
        name = node.output[0]
        node.output[0] = f"{name}/before"
        place = list(model.graph.node).index(node)
        model.graph.node.insert(place + 1, onnx.helper.make_node("Det", [f"{name}/square"], [f"{name}/det"], name="planted"))
        model.graph.node.insert(
            place + 1, onnx.helper.make_node("MatMul", [f"{name}/before", f"{name}/turned"], [f"{name}/square"], name="square")
        )
        model.graph.node.insert(
            place + 1, onnx.helper.make_node("Transpose", [f"{name}/before"], [f"{name}/turned"], name="turn", perm=[0, 2, 1])
        )
        model.graph.node.insert(place + 4, onnx.helper.make_node("Add", [f"{name}/before", f"{name}/det"], [name], name="join"))

    out = tmp_path / "found"
    assert main(["debug", str(altered(change)), "--reduce", "decoder", "--check", "parser", "--out", str(out), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["operators"] == {"Det": 1}
    assert "planted" in found["said"]


def test_what_fails_is_printed_with_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, Path, str, int | None]] = []

    def found(bundle: Path, graph: str, *, out: Path, check: str, layer: int | None, progress: object) -> reduction.Reduction:
        asked.append((graph, out, check, layer))
        return reduction.Reduction(
            graph="decoder.layer2",
            file=out / REDUCED,
            nodes=(52, 3),
            operators={"Gelu": 1, "Add": 2},
            said="y[0] differs by 0.5",
        )

    monkeypatch.setattr(reduction, "reduce", found)
    assert main(["debug", "b", "--reduce", "decoder", "--layer", "2"]) == 1
    folder = Path("decoder.layer2.reduced")
    assert asked == [("decoder", folder, "onnxruntime", 2)]
    assert capfd.readouterr().out.splitlines() == [
        "decoder.layer2: of 52 nodes 3 still fail: Gelu, 2 Add",
        "y[0] differs by 0.5",
        f"{folder / REDUCED}; every tensor of the whole graph by name is in {folder / VALUES}",
    ]


def test_what_is_too_large_is_refused_with_its_estimate(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of 9b in place of nano's: the decoder is refused, and a layer offered."""
    from flamingo_export.precision import Precision
    from flamingo_reference.config import SIZES

    manifest = read_manifest(nano)
    graphs = tuple(msgspec.structs.replace(each, layers=(0, 40)) if each.layers else each for each in manifest.graphs)
    manifest = msgspec.structs.replace(manifest, config=SIZES["9b"], graphs=graphs)
    monkeypatch.setattr(reduction, "open_bundle", lambda bundle: manifest)
    monkeypatch.setattr(
        WeightIndex, "read", classmethod(lambda cls, bundle: cls.planned(SIZES["9b"], Precision(storage="bf16")))
    )
    words = r"decoder reads 1\d\.\d GiB of weights.*it would want about \d+ GiB.*LM layers reads 0\.\d\d GiB: --layer 0"
    with pytest.raises(ParityError, match=words):
        reduce(nano, "decoder", out=tmp_path / "found")
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize(
    ("graph", "layer", "check", "words"),
    [
        ("encoder", None, "onnxruntime", r"no graph 'encoder'. It has vision_encoder, resampler, media_kv, .*decoder"),
        ("decoder", 6, "onnxruntime", "there is no LM layer 6: nano has 0 to 5"),
        ("decoder", 0, "'", "is not a command"),
        ("decoder", 0, " ", "the check is empty"),
        ("decoder", 0, "no-such-command-here", "no-such-command-here cannot be run"),
    ],
)
def test_bad_input(nano: Path, tmp_path: Path, graph: str, layer: int | None, check: str, words: str) -> None:
    with pytest.raises(ParityError, match=words):
        reduce(nano, graph, out=tmp_path / "found", check=check, layer=layer)


@pytest.mark.parametrize("missing", ["polygraphy", "onnx_graphsurgeon"])
def test_without_the_extra_it_says_what_to_install(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else there(name))
    with pytest.raises(ParityError, match=r"is not installed: pip install .*debug"):
        reduce(nano, "decoder", out=tmp_path / "found")


def test_a_check_that_cannot_be_run_is_no_failure(nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser's library is missing: that is said, and nothing is reduced."""
    if importlib.util.find_spec("tensorrt_rtx") or importlib.util.find_spec("tensorrt_rtx_bindings"):
        pytest.skip("TensorRT for RTX is installed")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ParityError, match=r"the check parser could not be run: TensorRT for RTX is not installed"):
        reduce(nano, "decoder", out=tmp_path / "found", check="parser", layer=0)


@pytest.mark.slow
def test_a_check_that_fails_by_chance_is_no_result(nano: Path, tmp_path: Path) -> None:
    """It fails on the whole graph only."""
    script = tmp_path / "once.py"
    script.write_text("import sys; sys.exit(1 if sys.argv[1].endswith('model.onnx') else 0)")
    with pytest.raises(ParityError, match=r"Polygraphy did not reduce the graph|not on what Polygraphy reduced it to"):
        reduce(nano, "decoder", out=tmp_path / "found", check=f"{sys.executable} {script}", layer=0)


def test_differences() -> None:
    one = np.array([1.0, -2.0], np.float32)
    assert difference(one, one) is None
    assert difference(one + np.float32(1e-4), one) is None
    assert "differs by 0.5" in (difference(one * np.float32(1.5), one) or "")
    assert "shape" in (difference(one[:1], one) or "")
    assert difference(np.array([np.nan], np.float32), np.array([1.0], np.float32)) == "infinities or NaN"
    odd = np.array([np.inf, -np.inf, np.nan], np.float32)
    assert difference(odd, odd) is None
    for place in range(3):
        assert difference(np.roll(odd, place + 1)[:2], odd[:2]) == (None if place == 2 else "infinities or NaN")
    assert difference(np.array([1, 2]), np.array([1, 3])) == "other numbers"
