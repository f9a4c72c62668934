"""Engines of every kind of model by TensorRT for RTX, ahead of time: each operator that the variations bring is taken and typed."""

from __future__ import annotations

import msgspec
import pytest
from variations import VARIATIONS, drawn_model

from flamingo_export.backends.tensorrt.backend import TensorRTBackend
from flamingo_export.backends.tensorrt.library import RTX
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.precision import Precision
from flamingo_export.sources import LiveSource
from flamingo_export.specs import SUBGRAPHS
from flamingo_reference.config import ModelConfig, RotaryPositions, TiledViTConfig, ViTConfig

# Heads of the published models: TensorRT has no kernels for the tiny ones of other tests. Vision (0: NFNet), resampler, gated block, LM.
HEADS = {
    "idefics-like": (80, 96, 128, 128),
    "openflamingo-mpt-like": (64, 64, 64, 128),
    "openflamingo-neox-like": (64, 64, 64, 80),
    "grouped-heads": (0, 96, 128, 64),
    "llama-vision-like": (80, 0, 128, 128),
}

pytestmark = pytest.mark.tensorrt


def with_real_heads(config: ModelConfig, sizes: tuple[int, int, int, int]) -> ModelConfig:
    """The config with heads of other sizes; widths follow where they must."""
    replace = msgspec.structs.replace
    vision, resampler, block, lm = config.vision, config.resampler, config.cross_attention, config.language_model
    if isinstance(vision, ViTConfig):
        vision = replace(vision, width=vision.num_heads * sizes[0])
        resampler = replace(resampler, width=vision.width)
    elif isinstance(vision, TiledViTConfig):
        vision = replace(vision, width=vision.num_heads * sizes[0])
    positions = lm.positions
    if isinstance(positions, RotaryPositions):
        positions = replace(positions, size=positions.size * sizes[3] // lm.head_size)
    return replace(
        config,
        vision=vision,
        resampler=replace(resampler, head_size=sizes[1]),
        cross_attention=replace(block, head_size=sizes[2]),
        language_model=replace(lm, head_size=sizes[3], positions=positions),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", VARIATIONS)
def test_every_subgraph(rtx, bundle_writer, tmp_path, kind):
    config = with_real_heads(VARIATIONS[kind], HEADS[kind])
    bundle = bundle_writer(LiveSource(drawn_model(config)), tmp_path / "v.bundle", precision=Precision(storage="fp16"))
    manifest = read_manifest(bundle)
    backend = TensorRTBackend(RTX, target="sm89", module=rtx)
    vision_layers = getattr(config.vision, "num_layers", 0) + getattr(config.vision, "num_global_layers", 0)
    attentions = {
        "vision_encoder": vision_layers,
        "resampler": config.resampler.num_layers,
        "decoder": config.language_model.num_layers + len(config.gated_layers),
    }
    for name in SUBGRAPHS:
        summary = backend.build(bundle, manifest, manifest.graph(name)).summary
        assert summary is not None
        assert summary.attentions == attentions.get(name, 0)
        assert summary.cache_updates == (2 * config.language_model.num_layers if name == "decoder" else 0)
