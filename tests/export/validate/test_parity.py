"""check_build and check_bundle: what they compare with, what they leave behind, and that nothing is assumed."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from recorder import Recorder

from flamingo_export.api import build
from flamingo_export.backends.base import SessionOptions
from flamingo_export.backends.registry import get_backend
from flamingo_export.bundle.manifest import ParityRecord, SourceRecord, read_manifest, write_manifest
from flamingo_export.errors import CheckpointError, ParityError
from flamingo_export.progress import SILENT
from flamingo_export.validate import ParityReport, check_bundle, parity
from flamingo_export.validate.checks import stored_codes
from flamingo_export.validate.expected.cases import END_TO_END_CASE, LAYERS_CASE, PHI_CASES, encoder_cases
from flamingo_export.validate.expected.golden import Goldens, load_goldens, save_goldens
from flamingo_export.validate.report.parity_report import REPORT_JSON, read_report
from flamingo_export.weights import SCALE
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo
from tests.export.validate.conftest import list_goldens

Compare = Callable[..., ParityReport]


def test_everything_the_issue_names_is_checked_and_passes(checked: tuple[Path, ParityReport], tiny_config: ModelConfig) -> None:
    bundle, report = checked
    assert report.verdict == "passed", report.summary
    assert report.against == "reference"
    cases = {row.case for row in report.rows}
    assert {*PHI_CASES, LAYERS_CASE, END_TO_END_CASE} <= cases
    assert {f"{case.subgraph}, {case.name}" for case in encoder_cases(tiny_config)} <= cases
    assert [point.layer for point in report.layers] == [0, 1, 2]
    assert {(trace.search, trace.outcome) for trace in report.traces} == {("greedy", "equal"), ("beam", "equal")}
    assert report.not_run == ()
    assert report.strips.keys() >= set(PHI_CASES)
    assert read_report(bundle) == report


def test_no_error_is_suspiciously_far_below_its_limit(checked: tuple[Path, ParityReport]) -> None:
    """Limits are made from PyTorch's errors; were they hundreds of times an engine's, they would catch little."""
    ratios = [row.limit / max(row.error, 1e-12) for row in checked[1].rows if row.limit and row.error and row.level != "trace"]
    assert np.median(ratios) < 10
    assert max(row.limit for row in checked[1].rows if row.limit) < 2e-4


def test_golden_values_come_back_as_they_were_saved(goldens: Goldens, tmp_path: Path) -> None:
    save_goldens(tmp_path, goldens)
    again = load_goldens(tmp_path)
    assert again is not None
    assert again.expected.keys() == goldens.expected.keys()
    for key, value in goldens.expected.items():
        assert np.array_equal(again.expected[key].values, value.values.astype(np.float32))
        assert again.expected[key].torch_error == value.torch_error
    assert again.traces == goldens.traces
    assert all(np.array_equal(again.hidden[key], value) for key, value in goldens.hidden.items())


def test_golden_values_of_the_tiny_model_are_small(checked: tuple[Path, ParityReport]) -> None:
    assert sum(path.stat().st_size for path in (checked[0] / "golden").iterdir()) < 1_000_000


@pytest.mark.parametrize("damage", ["cut", "schema", "missing tensor", "not json"])
def test_damaged_golden_values_are_refused(goldens: Goldens, tmp_path: Path, damage: str) -> None:
    save_goldens(tmp_path, goldens)
    cases, tensors = tmp_path / "cases.json", tmp_path / "tensors.safetensors"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "schema":
        cases.write_text(cases.read_text().replace('"schema": 1', '"schema": 2', 1))
    elif damage == "missing tensor":
        cases.write_text(cases.read_text().replace('"no image|logits"', '"another image|logits"', 1))
    else:
        cases.write_text("{")
    with pytest.raises(ParityError, match="Record them again"):
        load_goldens(tmp_path)


def test_a_case_missing_from_the_golden_values_is_not_measured(copy: Path, goldens: Goldens) -> None:
    fewer = msgspec.structs.replace(goldens, expected=dict(goldens.expected), hidden=dict(goldens.hidden))
    del fewer.expected["image last|logits"], fewer.expected[f"{LAYERS_CASE}|layer.2.k"]
    del fewer.hidden["1"]
    manifest = read_manifest(copy)
    report = parity.compare_with(copy, manifest, fewer, get_backend("onnxruntime"), "golden", memory=1)
    assert report.verdict == "not_run"
    assert not report.failures
    assert report.first_diverging_layer is None
    assert {(row.case, row.note) for row in report.unmeasured} == {
        ("image last", "no reference value for it"),
        (LAYERS_CASE, "no reference value for it"),
        (LAYERS_CASE, "no hidden states were recorded for it"),
    }


def test_codes_that_were_not_recorded_are_not_measured(copy: Path, goldens: Goldens, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither failed nor where engines first diverge: values that were recorded before codes were hold none."""
    read = SimpleNamespace(read=lambda bundle: [f"decoder/layer.1/ffw_up{end}" for end in ("", SCALE)])
    monkeypatch.setattr(stored_codes, "WeightIndex", read)
    report = parity.compare_with(copy, read_manifest(copy), goldens, get_backend("onnxruntime"), "golden", memory=1)
    assert (report.verdict, report.failures, report.first_diverging_layer) == ("not_run", (), None)
    assert [(row.subgraph, row.note) for row in report.unmeasured] == [("decoder/layer.1", "no codes were recorded")]


def test_no_traces_without_a_reason_are_not_passed(copy: Path, goldens: Goldens) -> None:
    report = parity.compare_with(
        copy,
        read_manifest(copy),
        msgspec.structs.replace(goldens, traces=()),
        get_backend("onnxruntime"),
        "golden",
        memory=4 << 30,
    )
    assert report.verdict == "not_run"
    assert [row.note for row in report.unmeasured] == ["no traces were recorded, and no reason why"]


def test_a_bundle_that_cannot_be_written_to_gets_the_verdict_of_one_that_can(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that opens, replaces or makes a file below the bundle is refused, as on a read-only mount (root may write to a read-only folder)."""

    def refused(path: object, *, writes: bool) -> None:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(os.fspath(copy)) and writes:
            raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    open_file, open_handle, make_folder = io.open, os.open, os.mkdir

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        refused(path, writes=bool(set(mode) & set("wax+")))
        return open_file(path, mode, *args, **kwargs)

    def handle(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        refused(path, writes=bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        return open_handle(path, flags, *args, **kwargs)

    def made(path: Any, *args: Any, **kwargs: Any) -> None:
        refused(path, writes=True)
        make_folder(path, *args, **kwargs)

    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    recorder = Recorder()
    with monkeypatch.context() as patched:
        patched.setattr(io, "open", opened)
        patched.setattr(os, "open", handle)
        patched.setattr(os, "mkdir", made)
        report = check_bundle(copy, against="golden", progress=recorder)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    assert any("cannot be written to (Read-only file system)" in note for note in recorder.notes)
    writable = check_bundle(copy, against="golden")
    assert (report.verdict, report.not_run) == (writable.verdict, ()) == ("passed", ())
    assert [(row.case, row.tensor, row.error) for row in report.rows] == [
        (row.case, row.tensor, row.error) for row in writable.rows
    ]


def test_without_a_folder_for_temporary_files_the_layers_are_not_run_and_the_verdict_is_that_of_the_others(
    copy: Path, goldens: Goldens, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.mkdtemp", none)
    backend = get_backend("onnxruntime")
    report = parity.compare_with(copy, read_manifest(copy), goldens, backend, "golden", memory=4 << 30)
    assert report.verdict == "passed"
    assert report.first_diverging_layer is None
    ((name, reason),) = [(each.name, each.reason) for each in report.not_run]
    assert name == "layer by layer"
    assert "Set TMPDIR" in reason
    assert not any(row.level == "layer" for row in report.rows)


def test_ties_are_told_from_faults(copy: Path, goldens: Goldens) -> None:
    """The reference's tokens are changed as if it had chosen otherwise: right where its margin is nil, wrong where it is wide."""
    (golden,) = (trace for trace in goldens.traces if trace.case == "one image" and trace.num_beams == 1)
    other = (*golden.tokens[:-1], (golden.tokens[-1] + 1) % 60 + 4)
    close = msgspec.structs.replace(golden, tokens=other, margins=(*golden.margins[:-1], 1e-9))
    clear = msgspec.structs.replace(golden, tokens=other, margins=(*golden.margins[:-1], 0.5))
    manifest, backend = read_manifest(copy), get_backend("onnxruntime")
    outcomes = []
    for trace in (close, clear):
        from flamingo_export.validate.checks.traces import check_traces

        changed = msgspec.structs.replace(goldens, traces=(trace,))
        (found,), (row,) = check_traces(copy, manifest, changed, backend, SessionOptions(threads=1), SILENT)
        outcomes.append((found.outcome, row.passed))
        assert [step.reference == step.engine for step in found.steps][-1] is False
    assert outcomes == [("tie", True), ("different", False)]


@pytest.mark.slow
def test_without_torch_the_golden_values_are_used(copy: Path) -> None:
    """In a process where torch cannot be imported, the whole check runs, and the manifest says what it was against."""
    program = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'torch' else real(name, package)\n"
        "from pathlib import Path\n"
        "from flamingo_export.validate import check_bundle\n"
        f"report = check_bundle(Path({str(copy)!r}), backend='onnxruntime')\n"
        "print(report.against, report.summary)\n"
        "sys.exit(report.verdict != 'passed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("golden parity passed")
    record = read_manifest(copy).parity
    assert record == ParityRecord(state="passed", backends=("onnxruntime",), against="golden", report=REPORT_JSON)


def test_golden_values_of_other_weights_or_storage_are_refused(copy: Path, goldens: Goldens) -> None:
    save_goldens(copy / "golden", msgspec.structs.replace(goldens, weights_sha256="1" * 64))
    list_goldens(copy)
    with pytest.raises(ParityError, match="of other weights"):
        check_bundle(copy)
    save_goldens(copy / "golden", msgspec.structs.replace(goldens, storage="bf16"))
    list_goldens(copy)
    with pytest.raises(ParityError, match="of bf16 weights"):
        check_bundle(copy)


def test_with_nothing_to_compare_with_it_says_what_to_do(copy: Path) -> None:
    shutil.rmtree(copy / "golden")
    list_goldens(copy)
    with pytest.raises(ParityError, match="--checkpoint DIR"):
        check_bundle(copy)


def test_a_failure_is_kept_in_the_manifest(copy: Path, goldens: Goldens) -> None:
    key = "adjacent images|logits"
    wrong = msgspec.structs.replace(goldens.expected[key], values=goldens.expected[key].values + 1.0)
    save_goldens(copy / "golden", msgspec.structs.replace(goldens, expected={**goldens.expected, key: wrong}))
    list_goldens(copy)
    report = check_bundle(copy)
    assert report.verdict == "failed"
    assert read_manifest(copy).parity.state == "failed"
    assert "adjacent images" in report.summary


def test_backends_that_passed_add_up() -> None:
    before = ParityRecord(state="passed", backends=("onnxruntime",), against="golden")
    report = ParityReport(verdict="passed", backend="reference", against="golden", model="m", storage="fp32", weights="w")
    assert parity.parity_record(before, report).backends == ("onnxruntime", "reference")
    other = msgspec.structs.replace(report, against="reference")
    assert parity.parity_record(before, other).backends == ("reference",)
    failed = msgspec.structs.replace(report, verdict="failed")
    assert parity.parity_record(before, failed) == ParityRecord(
        state="failed", backends=("reference",), against="golden", report=REPORT_JSON
    )


def test_live_build_then_its_checkpoint_then_another(tiny_model: Flamingo, tmp_path: Path) -> None:
    """A bundle built without parity gets it, and its golden values, from the checkpoint it came from; another checkpoint is refused."""
    bundle = tmp_path / "b.bundle"
    build(tiny_model, out=bundle, parity="skip")
    assert read_manifest(bundle).parity.state == "not_run"
    tiny_model.save(tmp_path / "same")
    report = check_bundle(bundle, checkpoint=tmp_path / "same", memory=1 << 20)
    assert (report.verdict, report.against) == ("passed", "reference"), report.summary
    manifest = read_manifest(bundle)
    assert manifest.parity.state == "passed"
    assert {"golden/cases.json", "golden/tensors.safetensors"} <= {record.path for record in manifest.files}
    # What was added is digested: the bundle opens, and a second check without the checkpoint uses it.
    assert check_bundle(bundle, memory=1 << 20).against == "golden"
    other = Flamingo(tiny_model.config)
    other.save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other weights"):
        check_bundle(bundle, checkpoint=tmp_path / "other")


def test_random_weights_of_another_recipe_are_not_compared_with(copy: Path) -> None:
    manifest = read_manifest(copy)
    write_manifest(copy, msgspec.structs.replace(manifest, source=SourceRecord(kind="random", seed=0, sha256="2" * 64)))
    shutil.rmtree(copy / "golden")
    list_goldens(copy)
    with pytest.raises(ParityError, match="draws other random weights"):
        check_bundle(copy)
