"""build(): from a request to a published bundle. Orchestration only.

weights (streamed, group by group) -> graphs -> tokenizer -> engines, where a backend compiles -> golden values and parity -> manifest
-> rename to the output path
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flamingo_export.bundle.manifest import (
    MANIFEST_NAME,
    EngineRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    ParityRecord,
    write_manifest,
)
from flamingo_export.bundle.verify import file_record
from flamingo_export.errors import BuildError, CalibrationError, CheckpointError, ParityError
from flamingo_export.files import disk_errors
from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.pipeline import work_folder
from flamingo_export.pipeline.build_request import BuildRequest
from flamingo_export.pipeline.prepare import ENGINES_FOLDER, BuildJob, bytes_left, check_engines, identity, prepare
from flamingo_export.pipeline.ranges import written_ranges
from flamingo_export.pipeline.traced_vision import write_traced
from flamingo_export.pipeline.work_folder import Finished, Journal
from flamingo_export.pipeline.write_weights import write_weights
from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.tokenizer import TEXT_TOKENIZER_FILE, TOKENIZER_FILE
from flamingo_export.sources import LiveSource
from flamingo_export.sources.origin import relative_paths
from flamingo_export.weights import WEIGHTS_FOLDER, WeightIndex, bundle_weights
from flamingo_export.weights.calibration_table import (
    check_fits,
)
from flamingo_export.weights.decoder_cuts import graph_records
from flamingo_export.weights.range_checks import check_ranges
from flamingo_reference.checkpoints.files.chat_template_files import TEMPLATE_FILE
from flamingo_reference.config import OwnVisionConfig

if TYPE_CHECKING:
    from flamingo_export.validate.report.parity_report import ParityReport

REPORTS_FOLDER = "reports"
_TOOLS = ("flamingo-export", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch")


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """A published bundle. notes: what a user should know about it. parity: the report, None where it was not run."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]
    parity: ParityReport | None = None

    def __repr__(self) -> str:
        made = self.manifest
        return (
            f"BuildResult({str(self.path)!r}: Flamingo {made.config.name}, {made.precision.name}, parity {made.parity.state})"
        )


def build(request: BuildRequest, *, progress: Progress = SILENT) -> BuildResult:
    """Builds and publishes a bundle.

    Killed at any moment it leaves `.NAME.building` beside the output, and the same request resumes from the finished groups of weights.
    Raises CheckpointError and UnsupportedModel (weights that cannot be built), BuildError (output, disk, another build), and ParityError
    if the engines do not compute what the reference computes; nothing is published then.
    """
    job = prepare(request, progress)
    paths = job.paths
    with work_folder.exclusive(paths), disk_errors(paths.work, BuildError):
        work_folder.recover(paths)
        work_folder.check_output(paths, overwrite=request.overwrite)
        journal = Journal(paths, identity(job), resume=request.resume)
        if journal.groups:
            progress.note(f"resuming the interrupted build in {paths.work}: {len(journal.groups)} files are finished")
        elif journal.discarded:
            progress.note("an interrupted build to the same path was of other weights or another version; starting anew")
        try:
            work_folder.check_disk(paths, bytes_left(job, journal))
            check_engines(job, journal)
        except BuildError:
            if not journal.groups:
                paths.discard()  # nothing was begun
            raise
        try:
            result = _fill(job, journal, progress)
        except (CheckpointError, CalibrationError) as error:
            if not isinstance(error.__cause__, OSError):  # a disk that was full may have space again
                paths.discard()  # the same weights or samples would fail again
            raise
        except KeyboardInterrupt:
            progress.note(f"stopped; what is finished is kept in {paths.work}, and the same command resumes from there")
            raise
        work_folder.publish(paths)
    return result


def _fill(job: BuildJob, journal: Journal, progress: Progress) -> BuildResult:
    """Everything in the work folder, the manifest last."""
    work, config = job.paths.work, job.source.config
    calibration, calibrated = written_ranges(
        job.source, job.precision, job.calibration, job.paths, journal, progress, uncalibrated=job.request.uncalibrated
    )
    weights = bundle_weights(config, job.precision)
    records, digests = write_weights(job.source, weights, job.precision, work, journal, progress, calibration=calibration)
    source = relative_paths(job.source.record(digests), job.request.source, job.request.out)
    if calibration is not None:
        check_fits(calibration, config, source.sha256, source.towers_sha256)
        if not _proves(job):
            check_ranges(work, config, job.precision, calibration)
    graphs = _write_graphs(job, progress)
    if isinstance(job.source, LiveSource) and job.source.own_vision_encoder is not None:
        records.append(write_traced(job.source.own_vision_encoder, config, work, "vision_encoder.onnx"))
    if job.tokenizer is not None:
        (work / TOKENIZER_FILE).parent.mkdir()
        (work / TOKENIZER_FILE).write_text(job.tokenizer, encoding="utf-8")
        if job.source.inputs.prompts.template is not None:
            # For other readers of the folder: what this package renders stands in the manifest.
            (work / TOKENIZER_FILE).with_name(TEMPLATE_FILE).write_text(job.source.inputs.prompts.template, encoding="utf-8")
    if job.text_tokenizer is not None:
        (work / TEXT_TOKENIZER_FILE).parent.mkdir(exist_ok=True)
        (work / TEXT_TOKENIZER_FILE).write_text(job.text_tokenizer, encoding="utf-8")
    manifest = Manifest(
        config=config,
        precision=job.precision,
        limits=job.limits,
        calibration=calibrated,
        source=source,
        inputs=job.source.inputs,
        graphs=graphs,
        files=(*records, *_other_files(work)),
        tools=_tool_versions(),
        notes=job.notes,
    )
    engines = _compile(job, manifest, journal, progress)
    manifest = msgspec.structs.replace(manifest, engines=tuple(engines))
    manifest, report = _prove(job, manifest, progress)
    compiled = [FileRecord(path=engine.file, size=engine.size, sha256=engine.sha256 or "") for engine in engines]
    manifest = msgspec.structs.replace(manifest, files=(*records, *compiled, *_other_files(work)))
    write_manifest(work, manifest)
    return BuildResult(path=job.paths.out, manifest=manifest, notes=job.notes, parity=report)


def _write_graphs(job: BuildJob, progress: Progress) -> tuple[GraphRecord, ...]:
    config, work = job.source.config, job.paths.work
    if job.donor is not None and job.request.graphs_of is not None:
        progress.stage("graphs", len(job.donor.graphs))
        for record in job.donor.graphs:
            shutil.copyfile(job.request.graphs_of / record.file, work / record.file)
            progress.advance(1)
        return job.donor.graphs
    index = WeightIndex.read(work)
    records = graph_records(config, index.sizes(), job.request.parts)
    progress.stage("graphs", len(records))
    for record in records:
        layers = range(*record.layers) if record.layers is not None else None
        if record.name != "vision_encoder" or not isinstance(config.vision, OwnVisionConfig):
            save_graph(build_graph(config, record.name, index, layers=layers), work / record.file)
        progress.advance(1)
    return records


def _compile(job: BuildJob, manifest: Manifest, journal: Journal, progress: Progress) -> list[EngineRecord]:
    """An engine for every graph, where a backend compiles. Each is journalled with its record as it is finished."""
    work = job.paths.work
    records: list[EngineRecord] = []
    if job.compiler is not None:
        backend, prepared = job.compiler

        def finished(file: str, request: str) -> EngineRecord | None:
            found = journal.groups.get(file)
            record = msgspec.json.decode(found.sources["record"], type=EngineRecord) if found is not None else None
            return record if record is not None and record.request == request else None

        for graph in manifest.graphs:
            record = backend.compile(prepared, work, manifest, graph, progress=progress, finished=finished)
            file = FileRecord(path=record.file, size=record.size, sha256=record.sha256 or "")
            journal.add(record.file, Finished(file=file, sources={"record": msgspec.json.encode(record).decode()}))
            records.append(record)
    kept = {work / record.file for record in records}
    for path in (work / ENGINES_FOLDER).rglob("*"):  # of an interrupted build for another backend or target
        if path.is_file() and path not in kept:
            path.unlink()
    return records


def _other_files(work: Path) -> list[FileRecord]:
    """Records of all files but weights and engines, whose digests were taken on the way, and reports, which later runs of parity replace."""
    return [
        file_record(work, path)
        for path in sorted(work.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST_NAME
        and path.relative_to(work).parts[0] not in (WEIGHTS_FOLDER, REPORTS_FOLDER, ENGINES_FOLDER)
    ]


def _tool_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return versions


def _proves(job: BuildJob) -> bool:
    return job.request.parity != "skip" and importlib.util.find_spec("torch") is not None


def _prove(job: BuildJob, manifest: Manifest, progress: Progress) -> tuple[Manifest, ParityReport | None]:
    """Golden values and parity, before anything is published. Without PyTorch nothing is claimed."""
    work = job.paths.work
    if not _proves(job):
        if job.request.parity != "skip":
            progress.note("PyTorch is not installed, so the engines are not compared with it: parity is not_run")
        _hand_on_golden(job, manifest, progress)
        return manifest, None
    from flamingo_export.validate import check_build

    report = check_build(work, manifest, job.source, progress=progress)
    if report.verdict != "passed":
        raise ParityError(
            f"the engines do not compute what the reference computes: {report.summary}. Nothing was published; the report is in "
            f"{work / REPORTS_FOLDER}. To have the bundle all the same: --parity skip"
        )
    record = ParityRecord(state="passed", backends=(report.backend,), against="reference", report="reports/parity.json")
    return msgspec.structs.replace(manifest, parity=record), report


def _hand_on_golden(job: BuildJob, manifest: Manifest, progress: Progress) -> None:
    """A checkpoint that ships golden values hands them on, so that engines can be verified without PyTorch."""
    from flamingo_export.validate.expected.golden import load_goldens

    folder = job.source.golden
    if folder is None:
        return
    try:
        goldens = load_goldens(folder)
    except ParityError as error:
        progress.note(f"the checkpoint's golden values are left out: {error}")
        return
    if goldens is None:
        return
    if (goldens.weights_sha256, goldens.storage) != (manifest.source.sha256, manifest.precision.key):
        progress.note(
            f"the checkpoint's golden values are left out: they are of other weights or of {goldens.storage} storage, "
            f"and this bundle is stored in {manifest.precision.name}"
        )
        return
    (job.paths.work / "golden").mkdir()
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, job.paths.work / "golden" / path.name)
