"""Golden values by Polygraphy's own runner and comparator, run for real on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import flamingo_export
from flamingo_export.cli import main
from flamingo_export.errors import ParityError
from flamingo_export.sources.choice import source_for_size
from flamingo_export.validate import polygraphy_check

pytest.importorskip("polygraphy")


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=path, parity="skip")
    return path


@pytest.mark.slow
def test_nano_passes_and_its_tensors_are_exported(nano, tmp_path, capsys):
    assert main(["parity", str(nano), "--with", "polygraphy", "--export", str(tmp_path / "x"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["not_run"] == []
    assert len(report["comparisons"]) >= 20
    assert {each["tensor"] for each in report["comparisons"]} >= {"features", "latents", "media_k.0", "logits"}
    assert all(each["passed"] and each["ours"] for each in report["comparisons"])
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    (given,) = load_json(str(tmp_path / "x" / "media_kv.inputs.json"))
    assert set(given) == {"latents"}
    outputs = RunResults.load(str(tmp_path / "x" / "media_kv.outputs.json"))
    assert "media_v.2" in outputs[0][1][0]


@pytest.mark.slow
def test_other_weights_fail_in_polygraphys_eyes_too(nano, tmp_path, capsys):
    """One matrix of the decoder is scaled; digests are made to fit, so that only the numbers tell."""
    from flamingo_export.bundle.manifest import read_manifest, write_manifest
    from flamingo_export.bundle.verify import file_record

    bundle = tmp_path / "other.bundle"
    shutil.copytree(nano, bundle)
    path = bundle / "weights" / "decoder.layer.003.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = max((each for each in header if each != "__metadata__"), key=lambda each: np.prod(header[each]["shape"]))
    start, stop = (8 + size + offset for offset in header[name]["data_offsets"])
    scaled = (np.frombuffer(data[start:stop], np.float32) * np.float32(1.05)).tobytes()
    path.write_bytes(data[:start] + scaled + data[stop:])
    import msgspec

    manifest = read_manifest(bundle)
    files = tuple(file_record(bundle, bundle / record.path) for record in manifest.files)
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    assert main(["parity", str(bundle), "--with", "polygraphy"]) == 1
    out = capsys.readouterr().out
    assert "not compared" not in out
    assert "failed" in out
    assert "within their limits" in out


def test_a_case_that_was_not_run_is_no_pass():
    one = polygraphy_check.Comparison(case="c", tensor="t", passed=True, difference=0.0, allowed=1.0, ours=False)
    report = polygraphy_check.PolygraphyReport(version="0", model="nano", comparisons=(one,))
    assert report.passed
    assert report.disagreements == (one,)
    assert not polygraphy_check.PolygraphyReport(version="0", model="nano", comparisons=(one,), not_run=("c",)).passed
    assert not polygraphy_check.PolygraphyReport(version="0", model="nano", comparisons=()).passed


def test_disagreements_and_cases_that_were_not_run_are_printed(nano, tmp_path, monkeypatch, capsys):
    def comparison(tensor: str, *, passed: bool, ours: bool) -> polygraphy_check.Comparison:
        return polygraphy_check.Comparison(case="c", tensor=tensor, passed=passed, difference=0.25, allowed=0.5, ours=ours)

    report = polygraphy_check.PolygraphyReport(
        version="0.1",
        model="nano",
        comparisons=(
            comparison("one", passed=False, ours=True),
            comparison("two", passed=True, ours=False),
            comparison("three", passed=True, ours=True),
        ),
        not_run=("[d], logits: no memory",),
    )
    given: list[tuple[Path, Path | None]] = []

    def check(bundle: Path, *, export: Path | None, progress: object) -> polygraphy_check.PolygraphyReport:
        given.append((bundle, export))
        return report

    monkeypatch.setattr(polygraphy_check, "check_with_polygraphy", check)
    folder = tmp_path / "x"
    assert main(["parity", str(nano), "--with", "polygraphy", "--export", str(folder)]) == 1
    assert given == [(nano, folder)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.split()[:1] == ["c"]] == [
        ["c", "one", "0.25", "0.5", "failed"],
        ["c", "two", "0.25", "0.5", "passed"],
        ["c", "three", "0.25", "0.5", "passed"],
    ]
    assert "c, one: parity passes it, Polygraphy does not agree" in lines
    assert "c, two: parity fails it, Polygraphy does not agree" in lines
    assert not any(line.startswith("c, three") for line in lines)
    assert "not compared: [d], logits: no memory" in lines
    assert "Polygraphy 0.1: 2 of 3 outputs within their limits" in lines
    loaded = f"--load-inputs {folder}/media_kv.inputs.json --load-outputs {folder}/media_kv.outputs.json"
    assert f"polygraphy run {nano}/media_kv.onnx --onnxrt {loaded} --atol 1e-4 --rtol 0" in lines


def test_inspect_says_how_to_go_on(nano, capsys):
    assert main(["inspect", str(nano)]) == 0
    out = capsys.readouterr().out
    assert f"polygraphy inspect model {nano}/decoder.onnx --show layers" in out
    assert f"flamingo-export parity {nano} --with polygraphy" in out


def test_what_cannot_be_checked_is_refused_in_words(nano, tmp_path, monkeypatch, capsys):
    bundle = tmp_path / "bare.bundle"
    flamingo_export.build(source_for_size("nano", seed=1), out=bundle, parity="skip")
    with pytest.raises(ParityError, match=r"has no golden values\. Record them where PyTorch is installed"):
        polygraphy_check.check_with_polygraphy(bundle)
    monkeypatch.setattr("flamingo_export.validate.polygraphy_check.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ParityError, match="Polygraphy is not installed"):
        polygraphy_check.check_with_polygraphy(nano)
    assert main(["parity", str(nano), "--export", str(tmp_path)]) == 2
    assert main(["parity", str(nano), "--with", "polygraphy", "--against", "golden"]) == 2
    capsys.readouterr()


def test_comparisons_are_polygraphys():
    def collected(actual: list[float]) -> polygraphy_check.Comparison:
        given = polygraphy_check._Collected(
            case="c", tensor="t", expected=np.array([1.0, 2.0]), actual=np.array(actual), allowed=0.1, ours=True
        )
        return polygraphy_check._compare(given)

    with polygraphy_check.silenced():
        assert collected([1.05, 2.0]).passed
        assert not collected([1.2, 2.0]).passed
        assert not collected([np.nan, 2.0]).passed
        assert collected([1.2, 2.0]).difference == pytest.approx(0.2)
