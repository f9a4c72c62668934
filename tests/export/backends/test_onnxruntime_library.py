"""Which ONNX Runtime is taken, and what is said of one that cannot work: before anything is loaded."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import flamingo_export
from flamingo_export.backends import onnxruntime_library
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.onnxruntime import OnnxRuntimeBackend
from flamingo_export.bundle.manifest import read_manifest
from flamingo_export.cli import doctor, probes
from flamingo_export.errors import BackendError

ROOT = Path(__file__).resolve().parents[3]
TWO_EXTRAS = r"For CPUs: pip install '\.\[cpu\]' .*; for NVIDIA GPUs: pip install '\.\[gpu\]'"


def test_the_lowest_version_is_what_the_extras_ask_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra, name in onnxruntime_library.DISTRIBUTIONS.items():
        assert f"{name}>={onnxruntime_library.lowest()}" in extras[extra]


@pytest.mark.parametrize(
    ("found", "refused"),
    [("1.24.4", True), ("1.29.0", True), ("0.99", True), ("1.30.0", False), ("1.30.0.dev2026", False), ("2.0.0", False), ("unknown", False)],
)  # fmt: skip
def test_versions(found, refused):
    assert (onnxruntime_library.too_old(found) is not None) == refused


def test_one_that_is_too_old_is_refused_by_name_before_anything_is_loaded(tiny_bundle, monkeypatch):
    def loaded(*_: object, **__: object) -> None:
        pytest.fail("a graph was loaded")

    monkeypatch.setattr("onnxruntime.__version__", "1.29.0")
    monkeypatch.setattr("onnxruntime.InferenceSession", loaded)
    message = rf"onnxruntime 1\.29\.0 is too old.*1\.30 or later is needed.*{TWO_EXTRAS}"
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(BackendError, match=message):
            flamingo_export.load(tiny_bundle, backend=backend)
    manifest = read_manifest(tiny_bundle)
    with pytest.raises(BackendError, match=message):
        OnnxRuntimeBackend().open(tiny_bundle, manifest, manifest.graph("decoder"), SessionOptions(threads=1))
    tasks = {task.name: task for task in doctor.examine(Path()).tasks}
    assert not probes.onnxruntime().found
    assert not tasks["build, generate, score, bench on the CPU"].found
    assert "1.30 or later" in tasks["parity against golden values"].detail


def test_without_a_runtime_both_extras_are_named(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=TWO_EXTRAS):
        flamingo_export.load(tiny_bundle)
    assert re.search(TWO_EXTRAS, probes.onnxruntime().remedy or "")


def test_doctor_finds_both_builds(monkeypatch):
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(onnxruntime_library, "version", versions.__getitem__)
    found = probes.onnxruntime()
    assert not found.found
    assert found.detail.startswith("onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed")
    assert (found.remedy or "").startswith("pip uninstall onnxruntime onnxruntime-gpu; then one. ")


def test_doctor_names_packages_of_versions_that_are_not_admitted(monkeypatch):
    real = importlib.metadata.version
    lines = [
        "typer>=0.16",
        "numpy>=1.26",
        "matplotlib>=3.9; extra == 'report'",
        "polygraphy>=1; extra == 'debug'",
        "no-such-thing>=2",
    ]
    old = {"typer": "0.15.0", "matplotlib": "3.1", "numpy": "2.0"}

    def version(name: str) -> str:
        if name in ("polygraphy", "no-such-thing"):
            raise importlib.metadata.PackageNotFoundError(name)
        return old.get(name) or real(name)

    monkeypatch.setattr(probes, "requires", lambda name: lines)
    monkeypatch.setattr(probes, "version", version)
    found = probes.packages()
    assert not found.found
    assert found.detail == "of a version that is not admitted: typer 0.15.0, matplotlib 3.1, no-such-thing is missing"
    assert found.remedy == "pip install 'typer>=0.16' 'matplotlib>=3.9' 'no-such-thing>=2'"
    monkeypatch.setattr(probes, "requires", lambda name: lines[1:2])
    assert probes.packages().found
