"""build(): from a request to a published bundle. Orchestration only.

weights (streamed, group by group) -> graphs -> tokenizer -> engines, where a backend compiles -> golden values and parity -> manifest
-> rename to the output path
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flamingo_export.backends.compiler import Compiler, Ready
from flamingo_export.backends.registry import compiler_of
from flamingo_export.bundle.bundled_tokenizer import checked_text_tokenizer, checked_tokenizer, placeholder_tokenizer
from flamingo_export.bundle.manifest import (
    MANIFEST_NAME,
    EngineRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    ParityRecord,
    default_limits,
    write_manifest,
)
from flamingo_export.bundle.verify import file_record
from flamingo_export.errors import BuildError, CalibrationError, CheckpointError, ParityError, PromptError
from flamingo_export.files import disk_errors
from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.pipeline import work_folder
from flamingo_export.pipeline.build_request import BuildRequest, resolve_precision
from flamingo_export.pipeline.donor import as_graphs_have, fitting
from flamingo_export.pipeline.plan import OTHER_FILES_BYTES, engine_bytes
from flamingo_export.pipeline.ranges import checked_policy, written_ranges
from flamingo_export.pipeline.traced_vision import write_traced
from flamingo_export.pipeline.work_folder import BuildPaths, Finished, Journal
from flamingo_export.pipeline.write_weights import write_weights
from flamingo_export.precision import Precision
from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.chat import Shown, Turn, written
from flamingo_export.runtime.tokenizer import TEXT_TOKENIZER_FILE, TOKENIZER_FILE
from flamingo_export.sources import CheckpointSource, LiveSource, RandomSource, WeightSource, open_source
from flamingo_export.sources.origin import with_place
from flamingo_export.weights import WEIGHTS_FOLDER, WeightIndex, bundle_weights, groups, stored_bytes
from flamingo_export.weights.calibration_table import (
    CalibrationTable,
    check_fits,
)
from flamingo_export.weights.decoder_cuts import check_parts, graph_records
from flamingo_export.weights.range_checks import check_ranges
from flamingo_reference.checkpoints.families import native
from flamingo_reference.checkpoints.files.chat_template_files import TEMPLATE_FILE
from flamingo_reference.config import OwnVisionConfig

if TYPE_CHECKING:
    from flamingo_export.validate.report.parity_report import ParityReport

REPORTS_FOLDER = "reports"
ENGINES_FOLDER = "engines"
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


class _Job(msgspec.Struct, frozen=True, kw_only=True):
    """A request with everything looked up that can fail before anything is written."""

    request: BuildRequest
    source: WeightSource
    precision: Precision
    place: BuildPaths
    compiler: tuple[Compiler, Ready] | None
    calibration: CalibrationTable | None
    """As it was given; None where none was, whether or not one will be made."""
    tokenizer: str | None
    text_tokenizer: str | None
    """Of the text tower."""
    donor: Manifest | None
    """Of the bundle whose graphs are taken."""
    notes: tuple[str, ...]


def build(request: BuildRequest, *, progress: Progress = SILENT) -> BuildResult:
    """Builds and publishes a bundle.

    Killed at any moment it leaves `.NAME.building` beside the output, and the same request resumes from the finished groups of weights.
    Raises CheckpointError and UnsupportedModel (weights that cannot be built), BuildError (output, disk, another build), and ParityError
    if the engines do not compute what the reference computes; nothing is published then.
    """
    job = _prepare(request, progress)
    place = job.place
    with work_folder.exclusive(place), disk_errors(place.work, BuildError):
        work_folder.recover(place)
        work_folder.check_output(place, overwrite=request.overwrite)
        journal = Journal(place, _identity(job), resume=request.resume)
        if journal.groups:
            progress.note(f"resuming the interrupted build in {place.work}: {len(journal.groups)} files are finished")
        elif journal.discarded:
            progress.note("an interrupted build to the same path was of other weights or another version; starting anew")
        try:
            work_folder.check_disk(place, _bytes_left(job, journal))
            _check_engines(job, journal)
        except BuildError:
            if not journal.groups:
                place.discard()  # nothing was begun
            raise
        try:
            result = _fill(job, journal, progress)
        except (CheckpointError, CalibrationError) as error:
            if not isinstance(error.__cause__, OSError):  # a disk that was full may have space again
                place.discard()  # the same weights or samples would fail again
            raise
        except KeyboardInterrupt:
            progress.note(f"stopped; what is finished is kept in {place.work}, and the same command resumes from there")
            raise
        work_folder.publish(place)
    return result


def _prepare(request: BuildRequest, progress: Progress) -> _Job:
    source = open_source(request.source)
    if request.graphs_of is not None and isinstance(source, CheckpointSource):
        source = as_graphs_have(request.graphs_of, source)
    config = source.config
    try:
        config.validate()
        native.check_tensors(config, {name: source.shape(name) for name in source.names()}, where="the weights")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if isinstance(config.vision, OwnVisionConfig) and not isinstance(source, LiveSource):
        raise CheckpointError(
            "config.json says that the vision encoder is a module of your own, which no file holds. Give it: "
            "flamingo_export.build(..., vision_encoder=MODULE), or --vision-module PACKAGE.MODULE:CALLABLE"
        )
    check_parts(config, request.parts)
    precision = resolve_precision(config, request.storage, request.policy)
    backend = compiler_of(request.backend, target=request.target)
    compiler = (backend, backend.prepare()) if backend is not None else None
    calibration = checked_policy(request, config, precision, backend, compiler[1].target if compiler is not None else None)
    donor = fitting(request.graphs_of, source, progress=progress) if request.graphs_of is not None else None
    notes = list(source.notes)
    drawn = isinstance(source, RandomSource)
    if drawn:
        notes.append("the weights are seeded random numbers, not those of a trained model: its answers mean nothing")
    _check_template(source)
    if source.tokenizer is not None:
        tokenizer: str | None = checked_tokenizer(source.tokenizer, config, source.inputs.tags)
    elif request.graphs_of is not None and (request.graphs_of / TOKENIZER_FILE).is_file():
        tokenizer = checked_tokenizer(request.graphs_of / TOKENIZER_FILE, config, source.inputs.tags)
        notes.append(f"the checkpoint has no tokenizer: that of {request.graphs_of.name} is kept")
    else:
        tokenizer = placeholder_tokenizer(config) if drawn else None
        notes.append(
            "the tokenizer is a stand-in that spells text byte by byte"
            if tokenizer
            else "there is no tokenizer: prompts must be token ids"
        )
    text_tokenizer = _text_tokenizer(source, request.graphs_of, notes)
    if request.uncalibrated and precision.policy is not None and precision.policy.needs_ranges:
        notes.append("activations are quantised without knowing the ranges they have (--uncalibrated): accuracy may suffer")
    if donor is not None and donor.engines:
        notes.append(
            f"the engines of {request.graphs_of} hold its weights and are not taken over: build them for the new bundle"
        )
    return _Job(
        request=request,
        source=source,
        precision=precision,
        place=BuildPaths(request.out),
        compiler=compiler,
        calibration=calibration,
        tokenizer=tokenizer,
        text_tokenizer=text_tokenizer,
        donor=donor,
        notes=tuple(notes),
    )


def _text_tokenizer(source: WeightSource, graphs_of: Path | None, notes: list[str]) -> str | None:
    """The text tower's tokenizer, None where there is no tower or nothing that fits it, which is added to `notes`: the model itself does not
    need it."""
    contrastive = source.config.contrastive
    if contrastive is None or contrastive.text is None:
        return None
    path = source.text_tokenizer
    if path is None and graphs_of is not None and (graphs_of / TEXT_TOKENIZER_FILE).is_file():
        path = graphs_of / TEXT_TOKENIZER_FILE
    why = "no tokenizer.json lies beside it"
    if path is not None:
        try:
            return checked_text_tokenizer(path, contrastive.text)
        except CheckpointError as error:
            why = str(error).removesuffix(".")
    notes.append(f"the text tower has no tokenizer ({why}): texts for it must be token ids")
    return None


def _check_template(source: WeightSource) -> None:
    """Raises CheckpointError if the source's chat template cannot write a question about an image."""
    if source.inputs.prompts.template is not None:
        try:
            written([Turn(role="user", parts=[Shown(None), "What is this?"])], source.inputs)
        except PromptError as error:
            raise CheckpointError(f"the checkpoint's chat template cannot be used: {error}") from error


def _identity(job: _Job) -> str:
    """What must match for an interrupted build to resume: all that finished weights depend on."""
    versions = [importlib.metadata.version(tool) for tool in ("flamingo-export", "numpy")]
    ranges = job.calibration or ("none" if job.request.uncalibrated else "own")
    weights = [job.source.identity, job.source.config, job.precision, ranges, versions]
    return hashlib.sha256(msgspec.json.encode(weights)).hexdigest()


def _bytes_left(job: _Job, journal: Journal) -> int:
    every = groups(bundle_weights(job.source.config, job.precision))
    sizes = {group: sum(stored_bytes(weight, job.precision) for weight in members) for group, members in every.items()}
    weights = sum(size for group, size in sizes.items() if group not in journal.groups)
    compiled = sum(record.file.size for record in journal.groups.values() if record.file.path.startswith(ENGINES_FOLDER))
    engines = engine_bytes(job.request, job.source.config, job.precision)
    return weights + max(0, engines - compiled) + OTHER_FILES_BYTES


def _check_engines(job: _Job, journal: Journal) -> None:
    """Raises BuildError before any work if no engine can have the limits, or one that is not finished cannot be built in the memory there is."""
    if job.compiler is None:
        return
    job.compiler[0].check_limits(job.request.limits or default_limits(job.source.config))
    config, sizes = job.source.config, WeightIndex.planned(job.source.config, job.precision).sizes()
    finished = {Path(file).stem for file in journal.groups if file.startswith(ENGINES_FOLDER)}
    for graph in graph_records(config, sizes, job.request.parts):
        if graph.name not in finished:
            job.compiler[0].check_memory(config, graph, sizes)


def _fill(job: _Job, journal: Journal, progress: Progress) -> BuildResult:
    """Everything in the work folder, the manifest last."""
    work, config = job.place.work, job.source.config
    calibration, calibrated = written_ranges(
        job.source, job.precision, job.calibration, job.place, journal, progress, uncalibrated=job.request.uncalibrated
    )
    weights = bundle_weights(config, job.precision)
    records, digests = write_weights(job.source, weights, job.precision, work, journal, progress, calibration=calibration)
    source = with_place(job.source.record(digests), job.request.source, job.request.out)
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
        limits=job.request.limits or default_limits(config),
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
    return BuildResult(path=job.place.out, manifest=manifest, notes=job.notes, parity=report)


def _write_graphs(job: _Job, progress: Progress) -> tuple[GraphRecord, ...]:
    config, work = job.source.config, job.place.work
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


def _compile(job: _Job, manifest: Manifest, journal: Journal, progress: Progress) -> list[EngineRecord]:
    """An engine for every graph, where a backend compiles. Each is journalled with its record as it is finished."""
    work = job.place.work
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


def _proves(job: _Job) -> bool:
    return job.request.parity != "skip" and importlib.util.find_spec("torch") is not None


def _prove(job: _Job, manifest: Manifest, progress: Progress) -> tuple[Manifest, ParityReport | None]:
    """Golden values and parity, before anything is published. Without PyTorch nothing is claimed."""
    work = job.place.work
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


def _hand_on_golden(job: _Job, manifest: Manifest, progress: Progress) -> None:
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
    (job.place.work / "golden").mkdir()
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, job.place.work / "golden" / path.name)
