"""A tiny model with every kind of part, and its bundle: what most tests of the exporter need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flamingo_export.bundle.manifest import Manifest, ShapeLimits, SourceRecord, write_manifest
from flamingo_export.bundle.verify import file_record
from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.precision import Precision
from flamingo_export.sources import LiveSource, WeightSource
from flamingo_export.weights import STORAGE_DTYPES, WeightIndex, bundle_weights, group_file, groups, layout
from flamingo_export.weights.decoder_cuts import graph_records
from flamingo_reference.config import (
    CrossAttentionConfig,
    LanguageModelConfig,
    ModelConfig,
    NFNetConfig,
    ResamplerConfig,
    TokenIds,
)
from flamingo_reference.model import Flamingo


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Two vision stages, three LM layers of which the first and last are gated; no two sizes are equal that could be mixed up."""
    return ModelConfig(
        name="tiny",
        vision=NFNetConfig(
            image_size=24, widths=(16, 32), depths=(1, 2), stem_widths=(4, 8, 8, 16), feature_width=20, group_width=8
        ),
        resampler=ResamplerConfig(num_layers=2, width=24, num_heads=2, head_size=8, ffw_width=40, num_latents=6),
        cross_attention=CrossAttentionConfig(every=2, num_heads=2, head_size=12, ffw_width=48),
        language_model=LanguageModelConfig(
            num_layers=3, width=32, num_heads=4, head_size=10, ffw_width=56, vocab_size=70, max_positions=96
        ),
        tokens=TokenIds(pad=0, bos=1, eoc=2, image=3),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: ModelConfig) -> Flamingo:
    """Seeded weights; gates of both signs, biases and skip gains that are not zero. Do not change it: copy it."""
    generator = torch.Generator().manual_seed(7)
    model = Flamingo(tiny_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("gate", "skip_gain")):
                parameter.copy_(0.3 + 0.4 * drawn.abs())
            elif name.endswith(("bias", "gain")) or "norm" in name:
                parameter.copy_(parameter + 0.2 * drawn)
            elif parameter.dim() > 1:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
        gated: Any = model.cross_attention[1]
        gated.attention_gate.neg_()
    return model.eval()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Flamingo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle in fp32, without tokenizer, reports or golden values. Do not change it: copy it."""
    return write_bundle(LiveSource(tiny_model), tmp_path_factory.mktemp("tiny") / "tiny.bundle")


@pytest.fixture(scope="session")
def bundle_writer() -> Callable[..., Path]:
    """`write_bundle`, for tests that need the bundle of another source."""
    return write_bundle


def write_bundle(source: WeightSource, bundle: Path, *, precision: Precision | None = None, parts: int = 1) -> Path:
    """The smallest complete bundle of a source: graphs, the decoder's in parts, weights, manifest."""
    precision = precision or Precision(storage="fp32")
    (bundle / "weights").mkdir(parents=True)
    for group, weights in groups(bundle_weights(source.config)).items():
        header, _ = layout(weights, precision)
        with (bundle / group_file(group)).open("wb") as file:
            file.write(header)
            for weight in weights:
                made = weight.make([source.read(name) for name in weight.sources])
                file.write(made.astype(STORAGE_DTYPES[weight.storage(precision)]).tobytes())
    index = WeightIndex.read(bundle)
    records = graph_records(source.config, index.sizes(), parts)
    for record in records:
        layers = range(*record.layers) if record.layers else None
        save_graph(build_graph(source.config, record.name, index, layers=layers), bundle / record.file)
    write_manifest(
        bundle,
        Manifest(
            config=source.config,
            precision=precision,
            limits=ShapeLimits(max_length=source.config.language_model.max_positions, chunk=16, bank_rows=8),
            source=SourceRecord(kind="live", sha256="0" * 64),
            graphs=records,
            files=tuple(file_record(bundle, path) for path in sorted(bundle.rglob("*")) if path.is_file()),
        ),
    )
    return bundle
