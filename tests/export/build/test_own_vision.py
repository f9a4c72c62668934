"""A vision encoder that is not ours: traced into the bundle, held to its contract, proved by parity. And our own ones traced: the second,
independent description of the graphs that are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import flamingo_export
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.registry import get_backend
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.errors import BuildError, CheckpointError, UnsupportedModel
from flamingo_export.pipeline.traced_vision import WEIGHTS_FILE, trace_vision_encoder
from flamingo_export.sources.choice import RandomWeights
from flamingo_export.validate import check_bundle
from flamingo_export.validate.checks.case_runs import opened
from flamingo_reference.config import ModelConfig, OwnVisionConfig, ViTConfig
from flamingo_reference.model import Flamingo

pytestmark = pytest.mark.slow


class Theirs(nn.Module):
    """A convolution, attention of torch's own, a buffer: nothing of it is known here."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.dropout = nn.Dropout(0.5)  # must be silent
        self.register_buffer("places", torch.linspace(-1, 1, 9 * width).reshape(9, width))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.places
        return x + self.dropout(self.attention(x, x, x, need_weights=False)[0])


@pytest.fixture(scope="module")
def own(tiny_model: Flamingo) -> Flamingo:
    """The tiny model behind another encoder."""
    torch.manual_seed(3)
    vision = OwnVisionConfig(image_size=24, num_patches=9, feature_width=20)
    model = Flamingo(msgspec.structs.replace(tiny_model.config, name="own", vision=vision))
    model.load_state_dict({name: tensor for name, tensor in tiny_model.state_dict().items() if "vision_encoder" not in name})
    model.vision_encoder = Theirs()
    return model.eval()


@pytest.fixture(scope="module")
def bundle(own: Flamingo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flamingo_export.build(own, out=tmp_path_factory.mktemp("own") / "own.bundle").path


def features(bundle: Path, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    manifest = open_bundle(bundle)
    graph = manifest.graph("vision_encoder")
    with opened(get_backend("onnxruntime"), bundle, manifest, graph, SessionOptions(threads=1)) as session:
        return np.array(session.run({"pixels": pixels})["features"])


def test_a_live_model_is_built_and_proved(own: Flamingo, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.parity.state == "passed"
    assert WEIGHTS_FILE in {file.path for file in manifest.files}
    onnx.checker.check_model(str(bundle / "vision_encoder.onnx"), full_check=True)
    graph = onnx.load(bundle / "vision_encoder.onnx", load_external_data=False).graph
    assert [[side.name for side in sides] for sides in (graph.input, graph.output)] == [["pixels"], ["features"]]
    assert all(node.name.startswith("vision_encoder/") for node in graph.node)
    pixels = torch.randn(5, 3, 24, 24)  # not the two frames that it was traced with
    with torch.no_grad():
        exact = own.vision_encoder.double()(pixels.double()).numpy()
    own.vision_encoder.float()
    np.testing.assert_allclose(features(bundle, pixels.numpy()), exact, atol=1e-5)
    with flamingo_export.load(bundle, threads=1) as model:
        picture = np.full((30, 40, 3), 90, np.uint8)
        assert model.generate([1, 3, 8, 9], images=[picture], max_new_tokens=4).token_ids
    assert check_bundle(bundle, backend="onnxruntime").against == "golden"


def test_a_changed_encoder_fails_parity(own: Flamingo, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle / WEIGHTS_FILE
    before = path.read_bytes()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("patches.weight"))
    tensors[name].reshape(-1)[7] += 0.05
    try:
        save_file(tensors, path)
        monkeypatch.setattr(
            "flamingo_export.bundle.verify.open_bundle", read_manifest
        )  # which sees by the digest that it is damaged
        report = check_bundle(bundle, backend="onnxruntime")
    finally:
        path.write_bytes(before)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "vision_encoder"


def test_a_checkpoint_and_its_encoder(own: Flamingo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    own.save(tmp_path / "m")
    assert not any("vision" in name for name in load_file(tmp_path / "m" / "model.safetensors"))
    with pytest.raises(CheckpointError, match="a module of your own, which no file holds"):
        flamingo_export.build(tmp_path / "m", out=tmp_path / "b.bundle")
    from flamingo_export.cli import main

    torch.save(own.vision_encoder.state_dict(), tmp_path / "theirs.pt")
    lines = (
        "import torch",
        "from tests.export.build.test_own_vision import Theirs",
        "def make():",
        "    module = Theirs()",
        f"    module.load_state_dict(torch.load({str(tmp_path / 'theirs.pt')!r}))",
        "    return module",
    )
    (tmp_path / "my_encoder.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    line = ["build", "--checkpoint", str(tmp_path / "m"), "--out", str(tmp_path / "b.bundle"), "--vision-module"]
    assert main([*line, "my_encoder:make"]) == 0
    assert read_manifest(tmp_path / "b.bundle").parity.state == "passed"
    pixels = np.random.default_rng(1).standard_normal((2, 3, 24, 24)).astype(np.float32)
    np.testing.assert_array_equal(features(tmp_path / "b.bundle", pixels), features(bundle, pixels))
    assert main([*line, "my_encoder:absent", "--overwrite"]) == 2
    assert main([*line, "no_such_module:make", "--overwrite"]) == 2
    assert main([*line, "my_encoder:make", "--plan"]) == 2
    with pytest.raises(BuildError, match="has a traced vision encoder"):
        flamingo_export.refit(tmp_path / "b.bundle", own, out=tmp_path / "c.bundle")


def test_an_encoder_that_is_not_wanted(tmp_path: Path, tiny_model: Flamingo, own: Flamingo) -> None:
    tiny_model.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="has a vision encoder of its own"):
        flamingo_export.build(tmp_path / "m", vision_encoder=Theirs(), out=tmp_path / "b.bundle")
    with pytest.raises(CheckpointError, match="a live model has it as its vision_encoder already"):
        flamingo_export.build(own, vision_encoder=Theirs(), out=tmp_path / "b.bundle")
    with pytest.raises(UnsupportedModel, match="is your own by its config, and not set"):
        flamingo_export.build(Flamingo(own.config), out=tmp_path / "b.bundle")
    with pytest.raises(CheckpointError, match="a module of your own"):
        flamingo_export.build(RandomWeights(config=own.config), out=tmp_path / "b.bundle")


class _Fixed(Theirs):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).reshape(2, 9, 20)


class _Two(Theirs):
    def forward(self, pixels: Tensor) -> Any:
        return super().forward(pixels), pixels


class _Branching(Theirs):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) if pixels.sum() > 0 else super().forward(-pixels)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Theirs(width=24), r"makes torch.float32 \(2, 9, 24\) of pixels \(2, 3, 24, 24\), expected torch.float32 \(2, 9, 20\)"),
        (_Two(), r"makes tuple of pixels"),
        (nn.Linear(4, 4), r"does not take pixels"),
        (_Fixed(), r"Look for a shape that its code fixes|cannot trace"),
        (_Branching(), r"torch.onnx cannot trace the vision encoder _Branching"),
    ],
    ids=["width", "outputs", "inputs", "fixed batch", "branches on numbers"],
)
def test_what_breaks_the_contract(own: Flamingo, module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        trace_vision_encoder(module, own.config)


@pytest.mark.parametrize("kind", ["nfnet", "clip"])
def test_our_own_encoders_traced_are_the_graphs_that_are_built(
    tiny_config: ModelConfig, tiny_model: Flamingo, kind: str, bundle_writer: Any, tmp_path: Path
) -> None:
    """Two ways to a graph that share nothing: torch's tracer on the reference's code, and the builder on the config."""
    import onnxruntime

    from flamingo_export.sources import LiveSource

    model = tiny_model
    if kind == "clip":
        vision = ViTConfig(image_size=30, patch_size=7, width=40, num_layers=2, num_heads=5, ffw_width=72, class_token=True)
        torch.manual_seed(2)
        model = Flamingo(msgspec.structs.replace(tiny_config, vision=vision)).eval()
        with torch.no_grad():
            for parameter in model.vision_encoder.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    traced = trace_vision_encoder(model.vision_encoder, model.config)
    import onnx_ir as ir

    session = onnxruntime.InferenceSession(ir.serde.serialize_model(traced).SerializeToString())
    side = model.config.vision.image_size
    pixels = np.random.default_rng(4).standard_normal((3, 3, side, side)).astype(np.float32)
    (found,) = session.run(None, {"pixels": pixels})
    built = features(bundle_writer(LiveSource(model), tmp_path / "b.bundle"), pixels)
    rms = float(np.sqrt(np.mean(built.astype(np.float64) ** 2)))
    assert rms > 0.01
    assert np.abs(found - built).max() < 2e-5 * rms
