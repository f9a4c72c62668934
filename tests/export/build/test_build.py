"""build(): what is published, what is refused, and that it needs no PyTorch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import pytest
from recorder import Recorder

from flamingo_export import api
from flamingo_export.bundle.bundled_tokenizer import placeholder_tokenizer
from flamingo_export.bundle.manifest import ShapeLimits, default_limits
from flamingo_export.bundle.verify import file_record, open_bundle
from flamingo_export.errors import BuildError, CheckpointError, ParityError, UnsupportedModel
from flamingo_export.pipeline import plan as build_plan
from flamingo_export.pipeline import run as pipeline
from flamingo_export.pipeline.build_request import BuildRequest, default_out
from flamingo_export.precision import Rule
from flamingo_export.quantize.policies import preset
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sources.choice import CheckpointFolder, LiveModel, RandomWeights, nano_checkpoint, source_for_size
from flamingo_export.validate.expected.golden import Goldens, save_goldens
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import SIZES, ModelConfig
from flamingo_reference.model import Flamingo

from .conftest import contents


def test_a_bundle_of_random_weights(spoken_config: ModelConfig, tmp_path: Path) -> None:
    result = api.build(RandomWeights(config=spoken_config, seed=11), out=tmp_path / "deep" / "b.bundle", parity="skip")
    manifest = open_bundle(result.path)
    assert manifest == result.manifest
    assert (manifest.config, manifest.source.kind, manifest.source.seed) == (spoken_config, "random", 11)
    assert manifest.precision.storage == "fp32"
    assert manifest.parity.state == "not_run"
    assert {"flamingo-export", "numpy", "python"} <= set(manifest.tools)
    assert any("random numbers" in note for note in manifest.notes)
    assert any("stand-in" in note for note in manifest.notes)
    listed = {record.path for record in manifest.files}
    assert listed == set(contents(result.path)) - {"manifest.json"}
    for record in manifest.files:
        assert file_record(result.path, result.path / record.path) == record
    assert [path.name for path in result.path.parent.iterdir()] == ["b.bundle"]


def test_graphs_point_at_what_the_files_hold(tiny_model: Flamingo, tmp_path: Path) -> None:
    bundle = api.build(tiny_model, out=tmp_path / "b.bundle", storage="bf16", parity="skip").path
    index = WeightIndex.read(bundle)
    placed = {(index[name].file, index[name].offset, index[name].length) for name in index}
    assert set(index) == set(WeightIndex.planned(tiny_model.config, open_bundle(bundle).precision))
    for path in bundle.glob("*.onnx"):
        assert path.stat().st_size < 100_000
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                data = {entry.key: entry.value for entry in tensor.external_data}
                assert (data["location"], int(data["offset"]), int(data["length"])) in placed


@pytest.mark.slow
def test_builds_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from flamingo_export import api\n"
        f"result = api.build({str(checkpoint)!r}, out={str(tmp_path / 'b.bundle')!r})\n"
        "print(result.manifest.parity.state)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "not_run"
    assert open_bundle(tmp_path / "b.bundle").source.kind == "checkpoint"


@pytest.mark.parametrize(
    ("weights", "storage", "handed_on"), [("own", "fp32", True), ("own", "bf16", False), ("other", "fp32", False)]
)
def test_golden_values_are_handed_on_where_they_are_of_the_same_weights(
    weights: str, storage: str, handed_on: bool, checkpoint: Path, tmp_path: Path, recorder: Recorder
) -> None:
    digest = api.build(checkpoint, out=tmp_path / "first.bundle", parity="skip").manifest.source.sha256
    assert digest is not None
    goldens = Goldens(weights_sha256=digest if weights == "own" else "0" * 64, storage=storage, model="tiny")
    save_goldens(checkpoint / "golden", goldens)
    result = api.build(checkpoint, out=tmp_path / "b.bundle", parity="skip", progress=recorder)
    listed = {record.path for record in open_bundle(result.path).files}
    assert ({"golden/cases.json", "golden/tensors.safetensors"} <= listed) == handed_on
    assert any("golden values are left out" in note for note in recorder.notes) != handed_on
    assert result.manifest.parity.state == "not_run"


def test_parity_runs_before_publishing(tiny_model: Flamingo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are listed, its verdict is in the manifest, and it is given the very model."""
    from flamingo_export import validate

    seen = []

    class Report(msgspec.Struct):
        verdict: str
        summary: str = "layer 1 diverges"
        backend: str = "onnxruntime"

    def check(folder, manifest, source, *, progress):
        seen.append((folder, source.model, (folder / "decoder.onnx").is_file(), (folder / "manifest.json").exists()))
        for name in ("golden/cases.json", "reports/parity.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        return Report("passed" if len(seen) > 1 else "failed")

    monkeypatch.setattr(validate, "check_build", check)
    out = tmp_path / "b.bundle"
    with pytest.raises(
        ParityError, match=r"layer 1 diverges\. Nothing was published; the report is in .*\.b\.bundle\.building/reports"
    ):
        api.build(tiny_model, out=out)
    assert not out.exists()
    result = api.build(tiny_model, out=out)
    assert seen == [(tmp_path / ".b.bundle.building", tiny_model, True, False)] * 2
    assert (result.manifest.parity.state, result.manifest.parity.backends) == ("passed", ("onnxruntime",))
    listed = {record.path for record in open_bundle(out).files}
    assert "golden/cases.json" in listed
    assert "reports/parity.json" not in listed


@pytest.mark.slow
def test_parity_of_a_tiny_live_model_passes_and_a_tampered_one_fails(
    tiny_model: Flamingo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing: the reference function that no check of modules can see is changed, so only parity can tell."""
    result = api.build(tiny_model, out=tmp_path / "b.bundle")
    assert result.manifest.parity.state == "passed"
    from flamingo_reference.model import cross_attention

    attend = cross_attention.phi_cross_attention
    monkeypatch.setattr(cross_attention, "phi_cross_attention", lambda *args: 1.01 * attend(*args))
    with pytest.raises(ParityError, match="Nothing was published"):
        api.build(tiny_model, out=tmp_path / "c.bundle")
    assert not (tmp_path / "c.bundle").exists()


def test_output_taken(spoken_config: ModelConfig, tmp_path: Path) -> None:
    source = RandomWeights(config=spoken_config, seed=1)
    out = api.build(source, out=tmp_path / "b.bundle", parity="skip").path
    before = contents(out)
    with pytest.raises(BuildError, match=r"b\.bundle exists.*--overwrite"):
        api.build(source, out=out, parity="skip")
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["b.bundle"]
    api.build(RandomWeights(config=spoken_config, seed=2), out=out, parity="skip", overwrite=True)
    assert open_bundle(out).source.seed == 2


def test_what_is_no_bundle_is_never_replaced(spoken_config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    real = api.build(RandomWeights(config=spoken_config), out=tmp_path / "real.bundle", parity="skip").path
    (tmp_path / "link").symlink_to(real)
    for name in ("thesis", "file", "link"):
        with pytest.raises(BuildError, match="is not a bundle; it will not be overwritten"):
            api.build(RandomWeights(config=spoken_config), out=tmp_path / name, parity="skip", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    open_bundle(real)


def test_output_where_nothing_can_be_written(spoken_config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BuildError, match="cannot be written"):
        api.build(RandomWeights(config=spoken_config), out=tmp_path / "file" / "b.bundle", parity="skip")


def test_a_failed_check_leaves_nothing(checkpoint: Path, tmp_path: Path, tiny_model: Flamingo) -> None:
    (checkpoint / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        api.build(checkpoint, out=tmp_path / "b.bundle", parity="skip")
    changed = copy.deepcopy(tiny_model)
    changed.resampler.register_forward_hook(lambda *args: None)
    with pytest.raises(UnsupportedModel, match="resampler has forward hooks"):
        api.build(changed, out=tmp_path / "b.bundle", parity="skip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_the_models_own_tokenizer_is_copied(spoken_config: ModelConfig, tokenizer_file: Path, tmp_path: Path) -> None:
    model = Flamingo(spoken_config)
    result = api.build(model, out=tmp_path / "b.bundle", tokenizer=tokenizer_file, parity="skip")
    assert (result.path / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    assert not result.notes
    model.save(tmp_path / "saved", tokenizer=tokenizer_file)
    again = api.build(tmp_path / "saved", out=tmp_path / "c.bundle", parity="skip")
    assert (again.path / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()


def test_a_tokenizer_of_another_vocabulary_is_refused(spoken_config: ModelConfig, tokenizer_file: Path, tmp_path: Path) -> None:
    larger = msgspec.structs.replace(spoken_config.language_model, vocab_size=301)
    tokens = msgspec.structs.replace(spoken_config.tokens, eoc=3, image=2)
    for config, complaint in (
        (msgspec.structs.replace(spoken_config, language_model=larger), "has 300 tokens, the model's vocabulary has 301"),
        (msgspec.structs.replace(spoken_config, tokens=tokens), "<EOC> is 2, expected 3; <image> is 3, expected 2"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            api.build(LiveModel(model=Flamingo(config), tokenizer=tokenizer_file), out=tmp_path / "b.bundle", parity="skip")
    tokenizer_file.write_text("{")
    with pytest.raises(CheckpointError, match=r"is not a tokenizer\.json"):
        api.build(LiveModel(model=Flamingo(spoken_config), tokenizer=tokenizer_file), out=tmp_path / "b.bundle", parity="skip")


def test_the_placeholder_spells_any_text(spoken_config: ModelConfig, tmp_path: Path) -> None:
    bundle = api.build(RandomWeights(config=spoken_config), out=tmp_path / "b.bundle", parity="skip").path
    tokenizer = Tokenizer.open(bundle, spoken_config)
    ids = tokenizer.encode("<BOS><image>Output: Zażółć 😀<EOC>")
    assert ids[:2] == [spoken_config.tokens.bos, spoken_config.tokens.image]
    assert ids[-1] == spoken_config.tokens.eoc
    assert tokenizer.decode(ids) == "Output: Zażółć 😀"
    paper = json.loads(placeholder_tokenizer(SIZES["9b"]) or "")
    assert len(paper["model"]["vocab"]) == 32000


def test_too_small_a_vocabulary_gets_no_placeholder(tiny_config: ModelConfig, tmp_path: Path) -> None:
    result = api.build(RandomWeights(config=tiny_config), out=tmp_path / "b.bundle", parity="skip")
    assert any("no tokenizer" in note for note in result.manifest.notes)
    assert not (result.path / "tokenizer").exists()


def test_where_things_go_and_come_from(tmp_path: Path) -> None:
    assert source_for_size("9B") == RandomWeights(config=SIZES["9b"], seed=0)
    assert source_for_size("nano", seed=4) == RandomWeights(config=SIZES["nano"], seed=4)
    assert default_out(source_for_size("9b")) == Path("flamingo-9b.bundle")
    assert default_out(CheckpointFolder(path=nano_checkpoint())) == Path("flamingo-nano.bundle")
    assert default_out(CheckpointFolder(path=tmp_path / "mine")) == Path("mine.bundle")
    with pytest.raises(BuildError, match="'7b' is not a size; there are nano, 3b, 9b, 80b"):
        source_for_size("7b")


def test_a_plan_writes_nothing_and_is_right(spoken_config: ModelConfig, tmp_path: Path) -> None:
    request = BuildRequest(source=RandomWeights(config=spoken_config), out=tmp_path / "b.bundle", storage="bf16", parity="skip")
    plan = build_plan.plan(request)
    assert not list(tmp_path.iterdir())
    recorder = Recorder()
    result = pipeline.build(request, progress=recorder)
    assert plan.weight_bytes == recorder.stages["weights"] == sum(plan.bytes_per_component.values())
    assert set(plan.bytes_per_component) == {"vision_encoder", "resampler", "media_kv", "decoder"}
    assert sum(record.size for record in result.manifest.files) < plan.disk_bytes
    paper = build_plan.plan(BuildRequest(source=source_for_size("9b"), out=tmp_path / "9b.bundle"))
    assert paper.precision.storage == "bf16"
    assert 21e9 < paper.weight_bytes < 24e9


@pytest.mark.slow
def test_a_plan_tells_of_steps_and_cards(tmp_path: Path) -> None:
    """Of 80b in FP8: the bytes by hand, each step bounded, fewer GPUs the larger they are."""
    request = BuildRequest(source=source_for_size("80b"), out=tmp_path / "b.bundle", policy=preset("fp8"))
    plan = build_plan.plan(request)
    assert not list(tmp_path.iterdir())
    assert [step.name for step in plan.steps] == ["calibration, on the shipped set", "weights"]
    assert plan.steps[1].disk == plan.weight_bytes
    assert max(step.memory for step in plan.steps) < 8 << 30
    assert plan.steps[1].memory < 4 << 30
    counts = [card.count or 99 for card in plan.cards]
    assert counts == sorted(counts, reverse=True)
    lm = SIZES["80b"].language_model
    caches = 2 * lm.num_layers * lm.width * 4096 * 8 * 2  # keys and values of 8 requests of 4096 slots in bf16
    assert plan.weight_bytes + caches < plan.device_bytes < 1.2 * (plan.weight_bytes + caches)
    given = build_plan.plan(msgspec.structs.replace(request, uncalibrated=True, backend="tensorrt-rtx", target="sm89"))
    assert given.steps[0].name == "weights"
    assert [step.name for step in given.steps[1:]] == [f"engine of {graph.name}" for graph in given.graphs]


def test_a_plan_refuses_the_policy_that_a_build_would_refuse(tmp_path: Path) -> None:
    idle = msgspec.structs.replace(preset("fp8"), rules=(Rule(weights="decoder/layers.0/*", format="fp8"),))
    request = BuildRequest(source=source_for_size("nano"), out=tmp_path / "b.bundle", policy=idle)
    with pytest.raises(BuildError, match="match no matrix of this model"):
        build_plan.plan(request)
    engines = msgspec.structs.replace(request, policy=preset("fp8"), backend="tensorrt-rtx", target="sm86")
    with pytest.raises(BuildError, match="sm86 has no units for"):
        build_plan.plan(engines)


def test_limits_and_storage_are_as_asked(spoken_config: ModelConfig, tmp_path: Path) -> None:
    limits = ShapeLimits(max_length=128, chunk=16, bank_rows=4)
    source = RandomWeights(config=spoken_config)
    manifest = api.build(source, out=tmp_path / "b.bundle", storage="fp16", limits=limits, parity="skip").manifest
    assert (manifest.limits, manifest.precision.storage) == (limits, "fp16")
    assert default_limits(spoken_config).max_length == 2048
    assert default_limits(SIZES["9b"]).max_length == 4096


@pytest.mark.parametrize("out", [".", "/", "a\0b"])
def test_paths_that_cannot_be_a_bundle(out: str, spoken_config: ModelConfig) -> None:
    with pytest.raises(BuildError, match="cannot be the name of a bundle"):
        api.build(RandomWeights(config=spoken_config), out=out, parity="skip")
