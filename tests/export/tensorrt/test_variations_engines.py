"""Engines of every kind of model by TensorRT for RTX, ahead of time: each operator that the variations bring is taken and typed."""

from __future__ import annotations

import pytest
from variations import VARIATIONS, drawn_model

from flamingo_export.backends.tensorrt.backend import TensorRTBackend
from flamingo_export.backends.tensorrt.library import RTX
from flamingo_export.manifest import read_manifest
from flamingo_export.precision import Precision
from flamingo_export.sources import LiveSource
from flamingo_export.specs import SUBGRAPHS

pytestmark = pytest.mark.tensorrt


@pytest.mark.slow
@pytest.mark.parametrize("kind", VARIATIONS)
def test_every_subgraph(rtx, bundle_writer, tmp_path, kind):
    config = VARIATIONS[kind]
    bundle = bundle_writer(LiveSource(drawn_model(config)), tmp_path / "v.bundle", precision=Precision(storage="fp16"))
    manifest = read_manifest(bundle)
    backend = TensorRTBackend(RTX, target="sm89", module=rtx)
    vision_layers = getattr(config.vision, "num_layers", 0)
    attentions = {
        "vision_encoder": vision_layers,
        "resampler": config.resampler.num_layers,
        "decoder": config.language_model.num_layers + len(config.gated_layers),
    }
    for name in SUBGRAPHS:
        summary = backend.build(bundle, manifest, manifest.graph(name)).summary
        assert summary.attentions == attentions.get(name, 0)
        assert summary.cache_updates == (2 * config.language_model.num_layers if name == "decoder" else 0)
