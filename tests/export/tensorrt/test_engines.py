"""Real engines by TensorRT for RTX on any machine: every subgraph of nano, and a block of 3b, 9b and 80b in their real sizes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

import flamingo_export
from flamingo_export.backends.tensorrt.backend import TensorRTBackend
from flamingo_export.backends.tensorrt.library import RTX
from flamingo_export.bundle.manifest import GraphRecord, Manifest, ShapeLimits, SourceRecord, read_manifest
from flamingo_export.estimates import engine_building
from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.precision import Precision
from flamingo_export.sources.choice import source_for_size
from flamingo_export.specs import SUBGRAPHS
from flamingo_export.weights import WeightIndex, bundle_weights, group_file, groups, layout, stored_bytes
from flamingo_export.weights.decoder_cuts import graph_bytes
from flamingo_reference.config import SIZES
from flamingo_reference.contrastive_config import Readout

TARGET = "sm89"

pytestmark = pytest.mark.tensorrt


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", SUBGRAPHS)
def test_every_subgraph_of_nano(rtx, nano_bundles, name, storage):
    bundle = nano_bundles[storage]
    manifest = read_manifest(bundle)
    backend = TensorRTBackend(RTX, target=TARGET, module=rtx)
    record = backend.build(bundle, manifest, manifest.graph(name))
    engine = bundle / record.file
    assert record.file == f"engines/tensorrt-rtx-sm89/{name}.engine"
    assert record.sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert (record.size, record.tool_version, record.compute) == (engine.stat().st_size, rtx.__version__, storage)
    assert not list(engine.parent.glob("*.part"))
    summary, lm = record.summary, manifest.config.language_model
    assert summary is not None
    assert summary.plugin_layers == 0
    assert summary.cache_updates == (2 * lm.num_layers if name == "decoder" else 0)
    gated = len(manifest.config.gated_layers)
    contrastive = manifest.config.contrastive
    assert contrastive is not None
    assert isinstance(contrastive.pooling, Readout)
    attentions = {
        "decoder": lm.num_layers + gated,
        "resampler": manifest.config.resampler.num_layers,
        "vision_encoder": contrastive.pooling.num_layers,  # of the image head, which reads features
    }.get(name, 0)
    assert summary.attentions == attentions
    assert summary.attentions_with_lengths == (lm.num_layers if name == "decoder" else 0)
    assert summary.fused_attentions == (0 if storage == "fp32" else attentions)  # TensorRT has no fused one in fp32
    assert [profile.name for profile in summary.profiles] == {
        "decoder": ["prefill", "decode.8", "decode.1"],
        "resampler": ["videos", "images"],
    }.get(name, ["encode"])
    assert all(profile.activation_bytes for profile in summary.profiles)
    # Kernels write the compute type; fp32 is for what is inside of a normalisation or a convolution's epilogue.
    written = summary.output_types
    own = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}[storage]
    assert own == "Float" or written[own] > 5 * written.get("Float", 0)
    assert written.keys() & {"Float", "Half", "BFloat16"} <= {own, "Float"}


@pytest.mark.slow
def test_every_part_of_nano(rtx, tmp_path):
    """As `build --parts` has them compiled: the first, one in the middle, the last; together they are the whole decoder."""
    limits = ShapeLimits(max_length=512, chunk=64, bank_rows=16)
    bundle, parts = tmp_path / "nano.bundle", 3
    flamingo_export.build(source_for_size("nano"), out=bundle, storage="fp16", limits=limits, parts=parts, parity="skip")
    manifest = read_manifest(bundle)
    backend = TensorRTBackend(RTX, target=TARGET, module=rtx)
    records = [backend.build(bundle, manifest, graph) for graph, _ in manifest.decoder_graphs()]
    assert [record.file for record in records] == [f"engines/tensorrt-rtx-sm89/decoder.{k}.engine" for k in range(parts)]
    summaries = [record.summary for record in records if record.summary is not None]
    lm = manifest.config.language_model
    assert [summary.cache_updates for summary in summaries] == [2 * len(layers) for _, layers in manifest.decoder_graphs()]
    attentions = lm.num_layers + len(manifest.config.gated_layers)
    assert sum(summary.attentions for summary in summaries) == sum(each.fused_attentions for each in summaries) == attentions
    assert sum(summary.attentions_with_lengths for summary in summaries) == lm.num_layers
    sizes = WeightIndex.read(bundle).sizes()
    for summary, (graph, _) in zip(summaries, manifest.decoder_graphs(), strict=True):
        assert summary.weight_bytes == graph_bytes(manifest.config, sizes, graph)
        assert [profile.name for profile in summary.profiles] == ["prefill", "decode.8", "decode.1"]
        assert ("K" in summary.profiles[0].bounds) == (graph.name == "decoder.2")


def block_bundle(name: str, layer: int, folder: Path) -> Path:
    """A bundle that holds one LM layer with its gated block, in fp16, of random numbers of magnitude 2^-7."""
    config, precision = SIZES[name], Precision(storage="fp16")
    rng = np.random.default_rng(0)
    (folder / "weights").mkdir()
    wanted = (f"decoder.layer.{layer:03d}", f"decoder.cross_attention.{config.gated_layers.index(layer):03d}")
    for group, weights in groups(bundle_weights(config)).items():
        if group not in wanted:
            continue
        header, _ = layout(weights, precision)
        with (folder / group_file(group)).open("wb") as file:
            file.write(header)
            for weight in weights:
                count = stored_bytes(weight, precision) // (4 if weight.full_precision else 2)
                if weight.full_precision:
                    file.write(rng.standard_normal(count, np.float32).tobytes())
                else:
                    bits = rng.integers(0, 1 << 16, count, np.uint16)
                    bits &= 0x83FF
                    bits |= 0x2000
                    file.write(bits.data)
    part = f"decoder.{layer}"
    save_graph(build_graph(config, part, WeightIndex.read(folder), layers=range(layer, layer + 1)), folder / f"{part}.onnx")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("3b", 1), ("9b", 4), ("80b", 7)])
def test_a_block_in_its_real_size(rtx, tmp_path, name, layer):
    """A part of the decoder, as a host with little memory would build it."""
    config = SIZES[name]
    lm = config.language_model
    weights = 2 * (12 * lm.width**2 + lm.width * lm.max_positions + 10 * lm.width**2)
    needed = engine_building(weights) + weights  # the files, in the page cache or in a folder in memory
    if psutil.virtual_memory().available < needed:
        pytest.skip(f"{name}'s block needs {needed / 2**30:.1f} GiB of free memory")
    bundle = block_bundle(name, layer, tmp_path)
    manifest = Manifest(
        config=config,
        precision=Precision(storage="fp16"),
        limits=ShapeLimits(max_length=2048),
        source=SourceRecord(kind="random", seed=0),
        graphs=(GraphRecord(name=f"decoder.{layer}", file=f"decoder.{layer}.onnx", layers=(layer, layer + 1)),),
        files=(),
    )
    record = TensorRTBackend(RTX, target=TARGET, module=rtx).build(bundle, manifest, manifest.graphs[0])
    summary = record.summary
    assert summary is not None
    assert (summary.cache_updates, summary.attentions, summary.fused_attentions) == (2, 2, 2)
    assert summary.attentions_with_lengths == 1
    assert weights <= summary.weight_bytes <= 1.01 * weights
    assert weights <= record.size <= 1.1 * weights + 30e6
    assert msgspec.json.decode(msgspec.json.encode(record), type=type(record)) == record
