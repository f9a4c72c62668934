"""Engines of the towers by TensorRT for RTX, ahead of time on any machine: nano's in each type, each kind's, and CLIP's ViT-L/14 in its size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

import msgspec
import psutil
import pytest
import trt_wheels
from kinds import CLIP, PAPER, READ
from variations import drawn_model

import flamingo_export
from flamingo_export.backends.tensorrt import library
from flamingo_export.backends.tensorrt.backend import TensorRTBackend
from flamingo_export.bundle.manifest import EngineSummary, ShapeLimits, read_manifest
from flamingo_export.estimates import engine_building
from flamingo_export.precision import StorageType
from flamingo_export.quantize.policies import POLICIES
from flamingo_export.sources.choice import RandomWeights, source_for_size
from flamingo_export.specs import TEXT_TOWER, towers_of
from flamingo_export.weights import WeightIndex, bundle_weights
from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import ClassToken, ContrastiveConfig, TextConfig
from flamingo_reference.names import parameter_counts

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]
LIMITS = ShapeLimits(max_length=512, chunk=64, bank_rows=16)
OWN = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}


@pytest.fixture
def rtx() -> ModuleType:
    """TensorRT for RTX, or a skip with a reason."""
    return trt_wheels.rtx()


def compiled(rtx: ModuleType, bundle: Path, name: str, target: str = "sm89") -> EngineSummary:
    """What a subgraph's engine holds, whose file is what its record says."""
    manifest = read_manifest(bundle)
    record = TensorRTBackend(library.RTX, target=target, module=rtx).build(bundle, manifest, manifest.graph(name))
    assert record.file == f"engines/tensorrt-rtx-{target}/{name}.engine"
    assert record.sha256 == hashlib.sha256((bundle / record.file).read_bytes()).hexdigest()
    assert record.summary is not None
    assert record.summary.plugin_layers == 0
    return record.summary


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_nanos_towers(rtx: ModuleType, storage: StorageType, tmp_path: Path) -> None:
    bundle = flamingo_export.build(
        source_for_size("nano"), out=tmp_path / "n.bundle", storage=storage, limits=LIMITS, parity="skip"
    ).path
    config = read_manifest(bundle).config
    assert towers_of(config) == ("image_tower", "text_tower")
    assert config.contrastive is not None
    assert config.contrastive.text is not None
    for name in towers_of(config):
        summary = compiled(rtx, bundle, name)
        layers = config.contrastive.text.num_layers if name == TEXT_TOWER else 0
        assert summary.attentions == layers
        assert summary.fused_attentions == (0 if storage == "fp32" else layers)  # TensorRT has no fused one in fp32
        assert [profile.name for profile in summary.profiles] == [{"text_tower": "texts", "image_tower": "encode"}[name]]
        # Kernels write the compute type; fp32 is for what is inside of a normalisation.
        assert summary.output_types.keys() & {"Float", "Half", "BFloat16"} <= {OWN[storage], "Float"}
        assert summary.output_types.get(OWN[storage], 0) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_nanos_quantised_towers(rtx: ModuleType, policy: str, tmp_path: Path) -> None:
    bundle = flamingo_export.build(
        source_for_size("nano"), out=tmp_path / "q.bundle", storage="fp16", policy=policy, uncalibrated=policy == "fp8",
        limits=LIMITS, parity="skip",
    ).path  # fmt: skip
    config, index = read_manifest(bundle).config, WeightIndex.read(bundle)
    for name in towers_of(config):
        stored = {index[weight.name].storage for weight in bundle_weights(config) if weight.product and weight.group == name}
        assert stored == {"fp8" if policy == "fp8" else "int8"}
        summary = compiled(rtx, bundle, name)
        assert summary.weight_bytes <= 1.05 * sum(index[weight].length for weight in index if weight.startswith(f"{name}/"))


@pytest.mark.parametrize("config", [CLIP, PAPER, READ], ids=lambda config: config.name)
def test_every_kind(rtx: ModuleType, config: ModelConfig, tmp_path: Path) -> None:
    """CLIP's is read at its last token, BERT's is post-norm and read by the mean, the third at its first token. Heads are of 64 numbers."""
    assert config.contrastive is not None
    assert config.contrastive.text is not None
    text = msgspec.structs.replace(config.contrastive.text, width=128, num_heads=2, ffw_width=256)
    config = msgspec.structs.replace(config, contrastive=msgspec.structs.replace(config.contrastive, text=text))
    bundle = flamingo_export.build(
        drawn_model(config), out=tmp_path / "k.bundle", storage="fp16", limits=LIMITS, parity="skip"
    ).path
    for name in towers_of(config):
        summary = compiled(rtx, bundle, name)
        assert summary.attentions == summary.fused_attentions == (text.num_layers if name == TEXT_TOWER else 0)


def test_clips_towers_in_their_real_size(rtx: ModuleType, tmp_path: Path) -> None:
    """The text tower and projections of CLIP's ViT-L/14, random numbers: 12 layers of 768, 49,408 tokens, beside a small model."""
    text = TextConfig(num_layers=12, width=768, num_heads=12, ffw_width=3072, vocab_size=49408, max_positions=77)
    contrastive = ContrastiveConfig(joint_width=768, pooling=ClassToken(), image_norm=True, text=text)
    vision = msgspec.structs.replace(CLIP.vision, width=1024, num_heads=16, ffw_width=64, num_layers=1)
    resampler = msgspec.structs.replace(CLIP.resampler, width=1024)
    config = msgspec.structs.replace(CLIP, name="clip-vit-l-14", vision=vision, resampler=resampler, contrastive=contrastive)
    weights = 2 * parameter_counts(config)["contrastive"]
    if psutil.virtual_memory().available < 2 * engine_building(weights):
        pytest.skip(f"the text tower needs {2 * engine_building(weights) / 2**30:.1f} GiB of free memory")
    bundle = flamingo_export.build(
        RandomWeights(config=config), out=tmp_path / "l.bundle", storage="fp16", limits=LIMITS, parity="skip"
    ).path
    text_tower, image_tower = (compiled(rtx, bundle, name) for name in ("text_tower", "image_tower"))
    assert text_tower.attentions == text_tower.fused_attentions == 12
    assert 0.98 * weights <= text_tower.weight_bytes + image_tower.weight_bytes <= 1.02 * weights
    assert text_tower.profiles[0].bounds["S"] == (1, 16, 77)
