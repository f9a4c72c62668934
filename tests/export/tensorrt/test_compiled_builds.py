"""Builds with engines, a stand-in for the compiler: parts, refusals before work, plans, and what an interrupted build goes on with."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from fake_gpu import fake_library

import flamingo_export
from flamingo_export import estimates
from flamingo_export.backends.tensorrt import backend as backend_module
from flamingo_export.backends.tensorrt import estimate, library
from flamingo_export.backends.tensorrt.engine_builder import Built
from flamingo_export.backends.tensorrt.engine_contract import rebuild_command
from flamingo_export.backends.tensorrt.lowering.lint import Expected
from flamingo_export.backends.tensorrt.summary import summarise
from flamingo_export.bundle import verify
from flamingo_export.bundle.manifest import CalibrationRecord, ShapeLimits, SourceRecord, read_manifest, write_manifest
from flamingo_export.errors import BuildError
from flamingo_export.estimates import ENGINE_RATIO
from flamingo_export.pipeline import plan as build_plan
from flamingo_export.pipeline import run as pipeline
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.precision import Policy, Precision
from flamingo_export.quantize.policies import preset, read_policy
from flamingo_export.sources.choice import source_for_size

pytestmark = pytest.mark.usefixtures("own_cache")


class FakeBuilds:
    """Stands for the compiler: writes a few bytes, counts, and is interrupted where it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.built: list[str] = []
        self.stop_at = stop_at

    def __call__(self, trt, task, *, progress):
        if len(self.built) == self.stop_at:
            raise KeyboardInterrupt
        self.built.append(task.spec.name)
        task.engine.parent.mkdir(parents=True, exist_ok=True)
        data = task.spec.name.encode()
        task.engine.write_bytes(data)
        expected = Expected(plugin_layers=0, cache_updates=0, attentions=0, weights={}, kernels={})
        summary = summarise([], expected, Counter(), task.profiles)
        return Built(size=len(data), sha256=hashlib.sha256(data).hexdigest(), summary=summary)


@pytest.fixture
def compile_with(monkeypatch, tmp_path):
    """Builds random nano with a stand-in for the compiler."""
    monkeypatch.setattr(library, "load", lambda which: fake_library())

    def run(builds, *, target="sm89", backend="tensorrt-rtx", overwrite=False, parts=1, policy=None, limits=None):
        monkeypatch.setattr(backend_module, "build", builds)
        request = BuildRequest(
            source=source_for_size("nano", seed=3),
            out=tmp_path / "n.bundle",
            parity="skip",
            backend=backend,
            target=target,
            overwrite=overwrite,
            parts=parts,
            policy=policy,
            limits=limits,
            uncalibrated=policy is not None,
        )
        return pipeline.build(request)

    return run


def test_python_builds_engines_as_the_command_line_does(compile_with, monkeypatch, tmp_path):
    expected = compile_with(FakeBuilds())
    monkeypatch.setattr(backend_module, "build", FakeBuilds())
    source = source_for_size("nano", seed=3)
    found = flamingo_export.build(source, out=tmp_path / "m.bundle", parity="skip", backend="tensorrt-rtx", target="sm89")
    assert found.manifest.engines == expected.manifest.engines
    with pytest.raises(BuildError, match="target is 'sm89', but only engines have one"):
        flamingo_export.build(source, out=tmp_path / "o.bundle", parity="skip", target="sm89")


def test_an_engine_finished_before_a_kill_is_not_built_again(compile_with, tmp_path):
    first = FakeBuilds(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        compile_with(first)
    assert first.built == ["vision_encoder", "resampler"]
    assert not (tmp_path / "n.bundle").exists()
    second = FakeBuilds()
    result = compile_with(second)
    assert second.built == ["media_kv", "decoder"]
    bundle, manifest = result.path, read_manifest(result.path)
    assert [engine.graph for engine in manifest.engines] == ["vision_encoder", "resampler", "media_kv", "decoder"]
    verify.open_bundle(bundle)  # every file as recorded, engines too
    listed = {file.path for file in manifest.files}
    for engine in manifest.engines:
        assert engine.file in listed
        assert engine.lowered in listed
        assert engine.sha256 == hashlib.sha256((bundle / engine.file).read_bytes()).hexdigest()
    stray = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} - listed
    assert stray == {"manifest.json"}


@pytest.mark.slow
def test_parts_are_engines_of_their_own(compile_with, capsys):
    """Finished ones outlive a kill; those of another number of parts are not taken for them."""
    from flamingo_export.cli import main

    first = FakeBuilds(stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        compile_with(first, parts=2)
    assert first.built[3:] == ["decoder.0"]
    second = FakeBuilds()
    result = compile_with(second, parts=2)
    assert second.built == ["decoder.1"]
    assert [engine.graph for engine in result.manifest.engines][3:] == ["decoder.0", "decoder.1"]
    verify.open_bundle(result.path)
    with pytest.raises(KeyboardInterrupt):
        compile_with(FakeBuilds(stop_at=5), parts=3, overwrite=True)
    third = FakeBuilds()
    result = compile_with(third, parts=2, overwrite=True)
    assert third.built == ["decoder.0", "decoder.1"]
    assert sorted(path.name for path in result.path.rglob("decoder*.engine")) == ["decoder.0.engine", "decoder.1.engine"]
    assert " --parts 2 " in rebuild_command(result.path, result.manifest, "tensorrt-rtx", "sm89")

    assert main(["inspect", str(result.path), "--engine", "decoder", "--json"]) == 0
    assert [record["graph"] for record in json.loads(capsys.readouterr().out)] == ["decoder.0", "decoder.1"]
    assert main(["inspect", str(result.path), "--engine", "decoder.1", "--json"]) == 0
    assert [record["graph"] for record in json.loads(capsys.readouterr().out)] == ["decoder.1"]


@pytest.mark.slow
def test_too_little_memory_is_said_before_anything_is_written(compile_with, monkeypatch, tmp_path):
    """In as many parts as the message says it is built."""
    (whole,) = (graph.weight_bytes for graph in planned(tmp_path, parts=1) if graph.layers)
    monkeypatch.setattr(estimates, "BUILD_BASE", 0)
    monkeypatch.setattr(backend_module, "available_memory", lambda: int(0.7 * estimates.BUILD_RATIO * whole))
    refused = FakeBuilds()
    with pytest.raises(BuildError, match=r"engine of decoder .* In 2 parts it fits: --parts 2\."):
        compile_with(refused)
    assert not refused.built
    assert not list(tmp_path.iterdir())
    assert len(compile_with(FakeBuilds(), parts=2).manifest.engines) == 5


def test_limits_that_no_engine_can_have_are_said_before_anything_is_written(compile_with, tmp_path):
    with pytest.raises(BuildError, match="max_length 8 leaves no room beside a chunk of 1 or 8 beams"):
        compile_with(FakeBuilds(), limits=ShapeLimits(max_length=8, chunk=1))
    assert not list(tmp_path.iterdir())


def test_this_machines_gpu_is_asked_for_fp8_too(compile_with, monkeypatch, tmp_path):
    """Where no target was named. Refused before anything is written; with media in FP8 the plugin's graph is what is compiled."""
    media = read_policy(Path(__file__).parents[3] / "scripts" / "gpu" / "fp8_media.toml")

    def on(target):
        ready = backend_module.Prepared(trt=fake_library(), target=target, plugin_sha256="0" * 64)
        monkeypatch.setattr(backend_module.TensorRTBackend, "prepare", lambda self: ready)
        return compile_with(FakeBuilds(), target=None, backend="tensorrt", policy=media)

    with pytest.raises(BuildError, match="computes products in FP8, which sm80 has no units for"):
        on("sm80")
    assert not list(tmp_path.iterdir())
    manifest = on("sm90").manifest
    assert manifest.precision.media == "fp8"
    assert len(manifest.engines) == 4


def planned(folder: Path, *, parts: int) -> tuple[build_plan.PlannedGraph, ...]:
    request = BuildRequest(source=source_for_size("nano", seed=3), out=folder / "n.bundle", backend="tensorrt-rtx", parts=parts)
    return build_plan.plan(request).graphs


def test_the_plan_says_what_each_part_takes(tmp_path, monkeypatch, capsys):
    from flamingo_export.cli import main

    graphs = planned(tmp_path, parts=3)
    assert [graph.name for graph in graphs][3:] == ["decoder.0", "decoder.1", "decoder.2"]
    assert [layer for graph in graphs[3:] for layer in range(*(graph.layers or ()))] == list(range(6))
    assert all(
        (graph.engine_memory, graph.engine_seconds)
        == (estimate.estimate(graph.weight_bytes).memory, estimate.estimate(graph.weight_bytes).seconds)
        for graph in graphs
    )
    command = ["build", "--size", "nano", "--backend", "tensorrt-rtx", "--target", "sm89", "--parts", "3", "--plan"]
    assert main([*command, "--out", str(tmp_path / "n.bundle")]) == 0
    text = capsys.readouterr().out
    for word in ("decoder.2", "4 to 5", "memory to build its engine"):
        assert word in text


def test_another_target_is_built_anew_and_leaves_nothing_of_the_old(compile_with, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compile_with(FakeBuilds(stop_at=3))
    again = FakeBuilds()
    result = compile_with(again, target="sm120")
    assert len(again.built) == 4
    assert [path.name for path in (result.path / "engines").iterdir() if any(path.iterdir())] == ["tensorrt-rtx-sm120"]


def test_without_engines_after_an_interrupted_build_with_them(compile_with):
    with pytest.raises(KeyboardInterrupt):
        compile_with(FakeBuilds(stop_at=1))
    result = compile_with(FakeBuilds(), backend="onnxruntime", target=None)
    assert result.manifest.engines == ()
    assert not any(path.is_file() for path in result.path.rglob("*.engine"))
    assert not any("tensorrt" in file.path for file in result.manifest.files)


def test_the_bundle_with_engines_still_generates_on_the_cpu(compile_with):
    result = compile_with(FakeBuilds())
    with flamingo_export.load(result.path, backend="onnxruntime") as model:
        assert model.generate([5, 6, 7], max_new_tokens=2).token_ids


def test_the_plan_counts_the_engines(tmp_path):
    sizes = []
    for name in ("onnxruntime", "tensorrt-rtx"):
        request = BuildRequest(source=source_for_size("nano", seed=3), out=tmp_path / "n.bundle", backend=name)
        sizes.append(build_plan.plan(request))
    assert sizes[1].disk_bytes - sizes[0].disk_bytes == int(ENGINE_RATIO * sizes[0].weight_bytes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--size nano --seed 3 --storage fp32 --max-length 2048 --max-batch 8"),
        ({"source": SourceRecord(kind="checkpoint", sha256="1")}, "--checkpoint FOLDER --storage fp32"),
        ({"precision": Precision(storage="fp16", policy=preset("int4"))}, "--storage fp16 --int4 --max-length"),
        (
            {"precision": Precision(storage="fp16", policy=preset("fp8")), "calibration": CalibrationRecord(origin="none")},
            "--storage fp16 --fp8 --uncalibrated --max-length",
        ),
        (
            {"precision": Precision(storage="bf16", policy=preset("fp8")), "calibration": CalibrationRecord(origin="given")},
            "--storage bf16 --fp8 --calibration 'a b/calibration.json' --max-length",
        ),
        ({"precision": Precision(storage="fp16", policy=Policy(name="int4"))}, "--storage fp16 --policy FILE --max-length"),
    ],
)
def test_the_command_that_rebuilds_makes_the_same_bundle(compile_with, changes, words):
    """Same weights, types and limits: with --overwrite it takes the bundle's place."""
    manifest = msgspec.structs.replace(compile_with(FakeBuilds()).manifest, **changes)
    command = rebuild_command(Path("a b"), manifest, "tensorrt-rtx", "sm89")
    assert words in command
    assert command.endswith(" --backend tensorrt-rtx --target sm89 --out 'a b' --overwrite")


def test_the_command_that_rebuilds_nano_names_the_trained_one(tmp_path):
    result = flamingo_export.build(source_for_size("nano"), out=tmp_path / "n.bundle", parity="skip")
    assert "build --size nano --storage" in rebuild_command(result.path, result.manifest, "tensorrt-rtx", "sm89")


def test_inspect_prints_the_engine(compile_with, capsys):
    from flamingo_export.cli import main

    bundle = compile_with(FakeBuilds()).path
    assert main(["inspect", str(bundle), "--engine", "decoder"]) == 0
    text = capsys.readouterr().out
    for word in ("engines/tensorrt-rtx-sm89/decoder.engine", "1.7.1.116", "prefill", "decode", "no plugin library needed"):
        assert word in text
    assert main(["inspect", str(bundle), "--engine", "decoder", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["graph"], record["target"]) == ("decoder", "sm89")
    assert main(["inspect", str(bundle), "--engine", "other"]) == 1
    assert "it has engines of vision_encoder, resampler, media_kv, decoder" in capsys.readouterr().err
    assert main(["inspect", "--size", "nano", "--engine", "decoder"]) == 2
    manifest = read_manifest(bundle)
    (decoder,) = (engine for engine in manifest.engines if engine.graph == "decoder")
    assert decoder.summary is not None
    counts = {"attentions": 9, "fused_attentions": 8, "attentions_with_lengths": 6, "plugin_layers": 3}
    decoder = msgspec.structs.replace(decoder, summary=msgspec.structs.replace(decoder.summary, **counts))
    write_manifest(bundle, msgspec.structs.replace(manifest, engines=(decoder,)))
    capsys.readouterr()
    assert main(["inspect", str(bundle), "--engine", "decoder"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in ("fused attention 8 of 9", "attention that knows the slots in use 6", "plugin layers 3"):
        assert row.split() in rows
    write_manifest(bundle, msgspec.structs.replace(manifest, engines=()))
    assert main(["inspect", str(bundle), "--engine", "decoder"]) == 1
    assert "has no engines, only portable graphs. Build them: flamingo-export build" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["SM86", None])
def test_fp8_is_refused_for_the_gpu_that_engines_are_built_for(compile_with, monkeypatch, target):
    """However the target is written, and this machine's where none is named."""
    monkeypatch.setattr(library, "device", lambda index=0: library.Device(target="sm86"))
    builds = FakeBuilds()
    with pytest.raises(BuildError, match="in FP8, which sm86 has no units for"):
        compile_with(builds, target=target, policy=preset("fp8"))
    assert not builds.built


def test_a_target_wants_a_compiler(capsys):
    from flamingo_export.cli import main

    assert main(["build", "--size", "nano", "--target", "sm89"]) == 2
    assert "--backend tensorrt-rtx" in capsys.readouterr().err
