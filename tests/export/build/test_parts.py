"""`--parts`: what is in the bundle, builds that stop in the middle, refits, parity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from recorder import Recorder

from flamingo_export import BuildResult, api
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.cli import main
from flamingo_export.errors import BuildError
from flamingo_export.pipeline import plan as build_plan
from flamingo_export.pipeline import run as pipeline
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.sources.choice import RandomWeights
from flamingo_export.validate import check_bundle
from flamingo_reference.config import ModelConfig

from .conftest import contents


def make(config: ModelConfig, out: Path, **options: Any) -> BuildResult:
    return api.build(RandomWeights(config=config, seed=5), out=out, parity="skip", **options)


def test_the_bundle_and_its_plan(spoken_config: ModelConfig, tmp_path: Path) -> None:
    """As a whole and in parts: the same weights, other graphs."""
    whole = make(spoken_config, tmp_path / "1.bundle")
    cut = make(spoken_config, tmp_path / "2.bundle", parts=2)
    assert open_bundle(cut.path) == cut.manifest
    ours, theirs = contents(cut.path), contents(whole.path)
    assert {path: digest for path, digest in ours.items() if path.startswith("weights/")} == {
        path: digest for path, digest in theirs.items() if path.startswith("weights/")
    }
    assert {path for path in ours if path.startswith("decoder")} == {"decoder.0.onnx", "decoder.1.onnx"}
    request = BuildRequest(source=RandomWeights(config=spoken_config, seed=5), out=tmp_path / "p.bundle", parts=2)
    planned = build_plan.plan(request)
    assert [(graph.name, graph.layers) for graph in planned.graphs] == [
        (graph.name, graph.layers) for graph in cut.manifest.graphs
    ]
    assert all(graph.engine_memory is None for graph in planned.graphs)


def test_another_number_of_parts_goes_on_with_the_weights(
    spoken_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    """A build that stopped after its graphs leaves none of them in one with other parts, and no weight is made twice."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_compile", stop)
        with pytest.raises(KeyboardInterrupt):
            make(spoken_config, tmp_path / "b.bundle", parts=3)
    assert (tmp_path / ".b.bundle.building" / "decoder.2.onnx").is_file()
    result = make(spoken_config, tmp_path / "b.bundle", parts=2, progress=recorder)
    assert any("resuming the interrupted build" in note for note in recorder.notes)
    anew = make(spoken_config, tmp_path / "anew.bundle", parts=2)
    found, expected = contents(result.path), contents(anew.path)
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected


def test_so_many_parts_there_cannot_be(spoken_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for parts in (0, 4):
        with pytest.raises(
            BuildError, match=rf"cannot be cut into {parts} parts: .* spoken has 3 of them\. Choose --parts from 1 to 3"
        ):
            make(spoken_config, tmp_path / "x.bundle", parts=parts)
        request = BuildRequest(source=RandomWeights(config=spoken_config), out=tmp_path / "x.bundle", parts=parts)
        with pytest.raises(BuildError, match=f"cannot be cut into {parts} parts"):
            build_plan.plan(request)
    out = str(tmp_path / "x.bundle")
    assert main(["build", "--size", "nano", "--parts", "7", "--parity", "skip", "--out", out]) == 1
    assert "Choose --parts from 1 to 6" in capsys.readouterr().err
    assert main(["build", "--size", "nano", "--parts", "0", "--parity", "skip", "--out", out]) == 2
    assert main(["build", "--size", "nano", "--parts", "7", "--plan", "--out", out]) == 1
    assert not list(tmp_path.iterdir())


def test_a_refit_keeps_the_parts(checkpoint: Path, tmp_path: Path) -> None:
    limits = ShapeLimits(max_length=80, chunk=16, bank_rows=4)
    base = api.build(checkpoint, out=tmp_path / "base.bundle", limits=limits, parts=2, parity="skip")
    refitted = api.refit(base.path, checkpoint, out=tmp_path / "refitted.bundle", parity="skip")
    assert refitted.manifest.graphs == base.manifest.graphs
    found, expected = contents(refitted.path), contents(base.path)
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected
    with api.load(refitted.path, backend="onnxruntime", threads=1) as model:
        assert model.generate([1, 5, 6], max_new_tokens=2).token_ids


@pytest.mark.slow
def test_parity_layer_by_layer_and_as_a_whole(tmp_path: Path) -> None:
    """Nano in parts during its build, and once more on golden values alone."""
    from flamingo_export.sources.choice import source_for_size

    built = api.build(source_for_size("nano"), out=tmp_path / "n.bundle", parts=4)
    assert built.parity is not None
    assert built.parity.verdict == "passed"
    assert [point.layer for point in built.parity.layers] == list(range(6))
    assert len(built.parity.traces) > 0
    assert {row.level for row in built.parity.rows} >= {"subgraph", "layer", "phi", "end_to_end", "trace"}
    assert check_bundle(built.path).verdict == "passed"


@pytest.mark.slow
def test_parity_fails_where_a_part_is_another(tmp_path: Path) -> None:
    """Two parts in each other's place fit together, and compute something else."""
    from flamingo_export.bundle.manifest import write_manifest
    from flamingo_export.sources.choice import source_for_size

    bundle = api.build(source_for_size("nano"), out=tmp_path / "n.bundle", parts=6, parity="skip").path
    manifest = read_manifest(bundle)
    graph = bundle / "decoder.2.onnx"
    # Weights of layer 2 are read from where layer 4's lie, both gated or both not: the same shapes.
    assert (2 in manifest.config.gated_layers) == (4 in manifest.config.gated_layers)
    data = graph.read_bytes()
    assert b"weights/decoder.layer.002.safetensors" in data
    graph.write_bytes(data.replace(b"weights/decoder.layer.002.safetensors", b"weights/decoder.layer.004.safetensors"))
    from flamingo_export.bundle.verify import file_record

    files = tuple(
        file_record(bundle, bundle / record.path) if record.path == graph.name else record for record in manifest.files
    )
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    report = check_bundle(bundle)
    assert report.verdict == "failed"
    assert report.first_diverging_layer == "decoder/layer.2"


def test_inspect_shows_the_parts(spoken_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make(spoken_config, tmp_path / "b.bundle", parts=2).path
    layers = [graph.layers for graph in read_manifest(bundle).graphs if graph.layers]
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "decoder    in 2 parts, language model layers " in text
    for word in ("decoder.0: decoder.0.onnx", "decoder.1: decoder.1.onnx", "hidden_out"):
        assert word in text
    assert main(["inspect", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [tuple(graph["layers"]) for graph in found["manifest"]["graphs"] if graph["layers"]] == layers
    assert {"decoder.0", "decoder.1"} <= found["graphs"].keys()
