"""build: defaults, what is said of random weights, and an output that is taken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flamingo_export.bundle.manifest import Manifest, PlaceRecord, ShapeLimits, SourceRecord, read_manifest
from flamingo_export.cli.build import parity_hint
from flamingo_export.pipeline import plan
from flamingo_export.pipeline.run import BuildResult
from flamingo_export.precision import Precision
from flamingo_reference.config import SIZES


def test_default_name_and_what_is_said(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("build", "--size", "nano", "--seed", 5, "--parity", "skip", "--storage", "fp16", "--max-length", 256)
    assert outcome.code == 0, outcome.err
    assert "flamingo-nano.bundle" in outcome.out
    assert "random weights, seed 5" in outcome.out
    assert "fp16" in outcome.out
    assert "parity not run; where PyTorch is installed: flamingo-export parity flamingo-nano.bundle\n" in outcome.out
    manifest = read_manifest(tmp_path / "flamingo-nano.bundle")
    assert manifest.limits.max_length == 256
    assert manifest.precision.storage == "fp16"
    assert manifest.parity.state == "not_run"


def test_a_taken_output_is_kept_unless_forced(cli, tmp_path):
    out = tmp_path / "x.bundle"
    line = ["build", "--size", "nano", "--seed", 5, "--parity", "skip", "--out", out]
    assert cli(*line).code == 0
    before = (out / "manifest.json").read_bytes()
    refused = cli("build", "--size", "nano", "--seed", 6, "--parity", "skip", "--out", out)
    assert refused.code == 1
    assert "--overwrite" in refused.err
    assert (out / "manifest.json").read_bytes() == before
    forced = cli("build", "--size", "nano", "--seed", 6, "--parity", "skip", "--out", out, "--overwrite", "--json")
    assert forced.code == 0
    data = json.loads(forced.out)
    assert data["bundle"] == str(out)
    assert any("random" in note for note in data["notes"])
    assert data["manifest"]["source"]["seed"] == 6


def test_a_checkpoint_that_is_none(cli, tmp_path):
    outcome = cli("build", "--checkpoint", tmp_path, "--out", tmp_path / "x.bundle")
    assert outcome.code == 1
    assert "config.json" in outcome.err
    assert not (tmp_path / "x.bundle").exists()


def test_inspecting_a_bundle(cli, bundle):
    text, data = cli("inspect", bundle), json.loads(cli("inspect", bundle, "--json").out)
    assert text.code == 0
    assert f"not run: flamingo-export parity {bundle}" in text.out
    for word in ("random numbers, seed 3", "past_k.0 ... past_k.5", "decoder.onnx", "not run", "weights/"):
        assert word in text.out
    assert data["bytes"] == sum(
        file.stat().st_size for file in bundle.rglob("*") if file.is_file() and file.name != "manifest.json"
    )
    assert {"pixels", "features"} <= {tensor["name"] for graph in data["graphs"].values() for tensor in graph["inputs"]}


def test_names_of_the_last_release_keep_working(cli, tmp_path):
    out = tmp_path / "x.bundle"
    line = ["build", "--size", "nano", "--parity", "skip", "--out", out]
    for seed, more in ((5, []), (6, ["--force", "--precision=fp16"])):
        outcome = cli(*line, "--seed", seed, *more)
        assert outcome.code == 0, outcome.err
        assert ("--force is called --overwrite now" in outcome.err) == bool(more)
        assert ("--precision is called --storage now" in outcome.err) == bool(more)
    assert (read_manifest(out).source.seed, read_manifest(out).precision.storage) == (6, "fp16")


def test_an_empty_folder_is_a_fine_place(cli, tmp_path):
    out = tmp_path / "made"
    out.mkdir()
    outcome = cli("build", "--size", "nano", "--seed", 5, "--parity", "skip", "--out", out)
    assert outcome.code == 0, outcome.err
    assert read_manifest(out).source.seed == 5
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="needs a mounted folder that can be written: Linux's /dev/shm")
def test_a_mounted_folder_is_refused_with_a_place_in_it(cli):
    outcome = cli("build", "--size", "nano", "--parity", "skip", "--out", "/dev/shm")
    assert outcome.code == 1
    assert "cannot be replaced. Choose a folder in it: --out /dev/shm/NAME.bundle" in outcome.err


@pytest.mark.parametrize(("disk", "memory"), [(100 << 30, 10 << 30), (10 << 30, 10 << 30), (100 << 30, 1 << 30)])
def test_a_plan_says_whether_this_machine_can_do_it(cli, tmp_path, monkeypatch, disk, memory):
    monkeypatch.setattr("flamingo_export.pipeline.plan.shutil.disk_usage", lambda folder: SimpleNamespace(free=disk))
    monkeypatch.setattr(plan, "available_memory", lambda: memory)
    line = ["build", "--size", "9b", "--out", tmp_path / "nine.bundle", "--plan"]
    text, data = cli(*line), cli(*line, "--json")
    fits = disk > 50 << 30 and memory > 5 << 30
    assert text.code == data.code == (0 if fits else 1)
    machine = json.loads(data.out)["machine"]
    assert (machine["disk_free"], machine["memory_available"]) == (disk, memory)
    assert (machine["disk_suffices"], machine["memory_suffices"]) == (disk > 50 << 30, memory > 5 << 30)
    assert machine["memory_needed"] == max(step["memory"] for step in json.loads(data.out)["steps"])
    assert text.out.count("too little") == (not fits)
    assert re.search(r"needs [\d.]+ GiB of memory; [\d.]+ GiB are available", text.out)
    assert re.findall(r"[0-9.]+ (?:[KMGT]B)\b", text.out) == []  # one unit throughout, that of powers of two


def test_the_plan_writes_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("flamingo_export.pipeline.plan.shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 40))
    line = ["build", "--size", "9b", "--out", tmp_path / "nine.bundle", "--plan"]
    text, data = cli(*line), json.loads(cli(*line, "--json").out)
    assert text.code == 0, text.err
    assert list(tmp_path.iterdir()) == []
    # 11.27 billion parameters in 16 bits, relative projections folded into tables
    assert 18e9 < data["weight_bytes"] < 24e9
    assert sum(data["bytes_per_component"].values()) == data["weight_bytes"]
    assert "bf16" in text.out


def test_a_plan_says_that_its_output_would_be_refused(cli, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    line = ["build", "--size", "nano", "--out", out, "--plan"]

    def said(*extra) -> tuple[str, str | None]:
        text, data = cli(*line, *extra), cli(*line, *extra, "--json")
        assert text.code == data.code == 0, text.err  # the machine's check alone
        return text.out.replace("\n", " "), json.loads(data.out)["out_refused"]

    text, refused = said()
    assert "exists" not in text  # an empty folder is a fine output
    assert refused is None
    (out / "manifest.json").write_text("{}")
    text, refused = said()
    assert refused == f"{out} exists. Choose another --out, or replace it with --overwrite."
    assert refused in text
    assert refused in cli(*line[:-1]).err  # the build itself
    assert said("--overwrite")[1] is None
    (out / "manifest.json").rename(out / "notes.txt")
    text, refused = said("--overwrite")
    assert refused is not None
    assert "is not a bundle" in refused
    assert refused in text


@pytest.mark.slow
def test_the_parity_command_that_is_named_works(cli, tmp_path):
    outcome = cli("build", "--size", "nano", "--parity", "skip", "--out", tmp_path / "nano.bundle")
    (hint,) = (line for line in outcome.out.replace("\n", " ").split("parity not run; ")[1:])
    assert hint.startswith("golden values to compare with are in the bundle: ")
    words = hint.split("flamingo-export ", 1)[1].split()
    assert words == ["parity", str(tmp_path / "nano.bundle")]
    outcome = cli(*words, "--against", "golden")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(("place", "named"), [(PlaceRecord(path="here"), "--against reference"), (None, "--checkpoint DIR")])
def test_the_parity_command_names_the_checkpoint(place, named):
    manifest = Manifest(
        config=SIZES["nano"],
        precision=Precision(storage="fp32"),
        limits=ShapeLimits(max_length=256),
        source=SourceRecord(kind="checkpoint", place=place),
        graphs=(),
        files=(),
    )
    found = parity_hint(BuildResult(path=Path("b.bundle"), manifest=manifest, notes=()))
    assert found == f"where PyTorch is installed: flamingo-export parity b.bundle {named}"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_leaves_a_build_that_the_same_command_resumes(tmp_path, number, code, word):
    """The signal comes when the first group of weights is finished."""
    line = ["build", "--size", "nano", "--seed", "5", "--parity", "skip", "--out", "x.bundle"]
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell said
from flamingo_export.cli import main
from flamingo_export.pipeline import work_folder
add = work_folder.Journal.add
def interrupted(*arguments):
    add(*arguments)
    os.kill(os.getpid(), signal.{number})
if sys.argv[1] == "kill":
    work_folder.Journal.add = interrupted
sys.exit(main({line!r}))
"""

    def run(what):
        return subprocess.run([sys.executable, "-c", script, what], capture_output=True, text=True, timeout=120, cwd=tmp_path)

    killed = run("kill")
    assert (killed.returncode, killed.stdout) == (code, "")
    assert killed.stderr.endswith(f"flamingo-export: {word}\n")
    assert "the same command resumes from there" in killed.stderr
    assert "Traceback" not in killed.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".x.bundle.building", ".x.bundle.building.json"]
    resumed = run("on")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.bundle"]
