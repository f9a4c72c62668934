"""build(): from a request to a published bundle. Orchestration only.

weights (streamed, group by group) -> graphs -> tokenizer -> golden values and parity -> manifest -> rename to the output path
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flamingo_export import artifacts
from flamingo_export.artifacts import Journal, WorkPlace
from flamingo_export.build_request import BuildRequest
from flamingo_export.bundle_tokenizer import checked_tokenizer, placeholder_tokenizer
from flamingo_export.errors import BuildError, CheckpointError, ParityError
from flamingo_export.graphs import build_graph, save_graph
from flamingo_export.manifest import GraphRecord, Manifest, ParityRecord, write_manifest
from flamingo_export.progress import Progress, Silent
from flamingo_export.sources import combined_digest
from flamingo_export.specs import SUBGRAPHS
from flamingo_export.weight_files import write_weights
from flamingo_export.weights import Weight, WeightIndex, bundle_weights, groups, layout
from flamingo_reference.checkpoints.native import CheckpointError as NativeError
from flamingo_reference.checkpoints.native import check_tensors

if TYPE_CHECKING:
    from flamingo_export.validate.report import ParityReport

# Graphs, tokenizer, golden values and reports beside the weights.
OTHER_FILES_BYTES = 64_000_000
TOOLS = ("flamingo-export", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch")


class BuildResult(msgspec.Struct, frozen=True, kw_only=True):
    """A published bundle. parity is None where it was not run, and `parity_note` says why."""

    bundle: Path
    manifest: Manifest
    parity: ParityReport | None
    parity_note: str | None


def build(request: BuildRequest, progress: Progress | None = None) -> BuildResult:
    """Builds and publishes a bundle.

    Interrupted at any moment it leaves `.NAME.building` beside the output, and the same request goes on from the finished groups.
    Raises CheckpointError, BuildError, and ParityError if the engines do not compute what the reference computes (nothing is published).
    """
    progress = progress or Silent()
    place = WorkPlace(request.out)
    source, config = request.source, request.source.config
    try:
        check_tensors(config, {name: source.shape(name) for name in source.names()}, where="the weights")
    except NativeError as error:
        raise CheckpointError(str(error)) from error
    tokenizer = checked_tokenizer(source.tokenizer, config) if source.tokenizer else placeholder_tokenizer(config)
    weights = bundle_weights(config)
    with artifacts.exclusive(place), artifacts.disk_errors(place):
        artifacts.check_output(place, overwrite=request.overwrite)
        journal = Journal(place.journal, _identity(request))
        if not journal.resumed:
            shutil.rmtree(place.work, ignore_errors=True)
        elif place.work.exists():
            progress.note(f"going on with the interrupted build in {place.work}")
        place.work.mkdir(exist_ok=True)
        journal.save()
        artifacts.check_disk(place.out.parent, _bytes_to_write(request, weights, journal, place.work))
        records, digests = write_weights(source, weights, request.precision, place.work, journal, progress)
        graphs = _write_graphs(request, place.work, progress)
        (place.work / "tokenizer").mkdir(exist_ok=True)
        (place.work / "tokenizer" / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        manifest = Manifest(
            config=config,
            precision=request.precision,
            limits=request.limits,
            source=source.record(combined_digest(digests)),
            graphs=graphs,
            files=tuple(records),
            tools=_tool_versions(),
        )
        manifest, report, note = _prove(request, manifest, place.work, progress)
        others = [
            artifacts.file_record(place.work, path)
            for path in sorted(place.work.rglob("*"))
            if path.is_file() and path.parent.name not in ("weights", "reports")
        ]
        manifest = msgspec.structs.replace(manifest, files=(*records, *others))
        write_manifest(place.work, manifest)
        artifacts.publish(place)
        journal.remove()
    return BuildResult(bundle=place.out, manifest=manifest, parity=report, parity_note=note)


def _identity(request: BuildRequest) -> str:
    """What must be the same for an interrupted build to be gone on with."""
    parts = [request.source.identity, request.precision, request.limits, importlib.metadata.version("flamingo-export")]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _bytes_to_write(request: BuildRequest, weights: list[Weight], journal: Journal, work: Path) -> int:
    total = OTHER_FILES_BYTES if sum(_stored(weights, request)) > OTHER_FILES_BYTES else OTHER_FILES_BYTES // 4
    for group, members in groups(weights).items():
        if journal.finished(group, work) is None:
            total += sum(placed.length for placed in layout(members, request.precision)[1].values())
    return total


def _stored(weights: list[Weight], request: BuildRequest) -> list[int]:
    return [placed.length for members in groups(weights).values() for placed in layout(members, request.precision)[1].values()]


def _write_graphs(request: BuildRequest, work: Path, progress: Progress) -> tuple[GraphRecord, ...]:
    config = request.source.config
    index = WeightIndex.planned(config, request.precision)
    progress.stage("graphs", len(SUBGRAPHS))
    records = []
    for name in SUBGRAPHS:
        record = GraphRecord(
            name=name, file=f"{name}.onnx", layers=(0, config.language_model.num_layers) if name == "decoder" else None
        )
        save_graph(build_graph(config, name, index), work / record.file)
        records.append(record)
        progress.advance(1)
    return tuple(records)


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return versions


def _prove(
    request: BuildRequest, manifest: Manifest, work: Path, progress: Progress
) -> tuple[Manifest, ParityReport | None, str | None]:
    """Golden values and parity, before anything is published."""
    if request.parity == "skip":
        _copy_golden(request, work)
        return manifest, None, "parity was not asked for"
    if importlib.util.find_spec("torch") is None:
        _copy_golden(request, work)
        return (
            manifest,
            None,
            "PyTorch is not installed, so the engines were not compared with the reference (pip install 'flamingo-export[torch]')",
        )
    from flamingo_export.validate import check_build

    report = check_build(work, manifest, request.source, progress=progress)
    if report.verdict != "passed":
        raise ParityError(
            f"the engines do not compute what the reference computes: {report.summary}. Nothing was published; "
            f"the report is {work / 'reports' / 'parity.json'}."
        )
    record = ParityRecord(state="passed", backends=(report.backend,), against="reference", report="reports/parity.json")
    return msgspec.structs.replace(manifest, parity=record), report, None


def _copy_golden(request: BuildRequest, work: Path) -> None:
    """A checkpoint that ships golden values hands them on, so that engines can be verified without PyTorch."""
    if request.source.golden is None:
        return
    try:
        shutil.copytree(request.source.golden, work / "golden", dirs_exist_ok=True)
    except OSError as error:
        raise BuildError(f"the golden values in {request.source.golden} cannot be copied: {error}") from error
