"""Parity of a bundle's engines with the PyTorch reference, or with the golden values it left behind.

reference: numbers of every case (oracle.py) and token traces (traces.py), recorded as golden values
engines:   the same cases and prompts through the bundle (checker.py, traces.py), each compared within its tolerance
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from flamingo_export import estimates
from flamingo_export.backends.base import Backend, SessionOptions
from flamingo_export.backends.registry import get_backend
from flamingo_export.bundle.manifest import FileRecord, Manifest, ParityRecord, write_manifest
from flamingo_export.errors import CheckpointError, ParityError, pip_install
from flamingo_export.estimates import shortage
from flamingo_export.machine import available_memory
from flamingo_export.precision import StorageType
from flamingo_export.progress import SILENT, Progress
from flamingo_export.sources import CheckpointSource, WeightSource
from flamingo_export.sources.origin import find_origin, source_digest
from flamingo_export.validate.checks.checker import Checker
from flamingo_export.validate.environment import environment, is_small, torch_found
from flamingo_export.validate.expected.cases import decoder_cases, pixel_cases
from flamingo_export.validate.expected.decoder_calls import strips
from flamingo_export.validate.expected.golden import CASES_FILE, TENSORS_FILE, Goldens, load_goldens, save_goldens
from flamingo_export.validate.expected.media_rounding import MediaFormat
from flamingo_export.validate.expected.recording import no_room, record, torch_threads
from flamingo_export.validate.expected.transformers import KNOWN, corrections_of
from flamingo_export.validate.report.parity_report import Against, NotRun, ParityReport, Trace, Verdict, write_report
from flamingo_export.weights import WeightIndex
from flamingo_export.weights.calibration_table import CALIBRATION_FILE, CalibrationTable, read_table
from flamingo_reference.checkpoints.loading import CheckpointFiles

GOLDEN_FOLDER = "golden"
BUILD_MEMORY = 4 << 30
"""Bytes that parity may take during a build, whatever the machine has: larger models are checked layer by layer."""


def check_build(
    folder: Path,
    manifest: Manifest,
    source: WeightSource,
    *,
    backend: str | Backend = "onnxruntime",
    progress: Progress = SILENT,
    memory: int = BUILD_MEMORY,
) -> ParityReport:
    """Records golden values of `source` in `folder`/golden and compares the engines of the bundle being built with them.

    A live model is compared itself, module by module, not a copy made from its weights. Writes reports/parity.json.
    Raises ParityError if torch is missing; a gate that fails is in the report.
    """
    if not torch_found():
        raise ParityError(f"PyTorch is not installed, so there is no reference to compare with: {pip_install('torch')}")
    started = time.monotonic()
    budget = min(memory, available_memory())
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    digest = manifest.source.sha256 or source_digest(source)
    goldens = record(
        source,
        manifest,
        digest,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        memory=budget,
        calibration=_calibration(folder),
        arithmetic=manifest.precision.storage if manifest.engines else "fp32",
        progress=progress,
    )
    save_goldens(folder / GOLDEN_FOLDER, goldens)
    report = compare_with(
        folder, manifest, goldens, _backend(backend), "reference", memory=budget, progress=progress, started=started
    )
    write_report(folder, report)
    return report


def check_bundle(
    bundle: Path,
    *,
    backend: str | Backend = "onnxruntime",
    checkpoint: CheckpointFiles | Path | None = None,
    options: SessionOptions | None = None,
    device: str = "cpu",
    memory: int | None = None,
    progress: Progress = SILENT,
    against: Against | None = None,
) -> ParityReport:
    """Compares a bundle's engines with the live reference where torch and the weights are at hand, else with its golden values.

    against: what to compare with; None as just said. `transformers`: its own model of an IDEFICS or Llama checkpoint, layer by layer, as a whole
    from pixels to logits, and, where memory allows, in the tokens that its `generate` chooses.

    checkpoint: where the bundle's weights came from; not needed for the shipped nano checkpoint and random weights, nor, where `against` is
    given, for one that still lies beside the bundle as it did when this was built. device: where engines run that may choose, unless `options`
    says it. memory: bytes
    to keep to; None is what the machine has free. Writes reports/parity.json and how parity stands into the manifest, and golden
    values where the bundle had none; a bundle that may not be written to is compared all the same.

    Raises BundleError (damaged), BackendError, CheckpointError (`checkpoint` has other weights), ParityError (nothing to compare with, or
    what was asked for is not installed or has no such model).
    """
    from flamingo_export.bundle.verify import open_bundle

    started = time.monotonic()
    manifest = open_bundle(bundle)
    chosen = _backend(backend)
    budget = min(memory or 1 << 62, available_memory())
    options = options or SessionOptions(threads=1 if is_small(manifest.config) else 0, device=device)
    arithmetic = chosen.arithmetic(manifest, options)
    goldens, with_what = _expectation(bundle, manifest, checkpoint, budget, progress, against, arithmetic)
    report = compare_with(
        bundle,
        manifest,
        goldens,
        chosen,
        with_what,
        memory=budget,
        progress=progress,
        started=started,
        options=options,
        tasks=True,
    )
    _keep(bundle, manifest, goldens, report, progress)
    return report


def compare_with(
    bundle: Path,
    manifest: Manifest,
    goldens: Goldens,
    backend: Backend,
    against: Against,
    *,
    memory: int,
    progress: Progress = SILENT,
    started: float | None = None,
    options: SessionOptions | None = None,
    tasks: bool = False,
) -> ParityReport:
    """The report of a bundle's engines against recorded values. tasks: what a quantised nano says as well, held against the reference."""
    from flamingo_export.validate.accuracy import accuracy_row
    from flamingo_export.validate.checks.traces import check_traces

    started = time.monotonic() if started is None else started
    options = options or SessionOptions(threads=1 if is_small(manifest.config) else 0)
    short = shortage("running all engines", estimates.running(manifest.config, WeightIndex.read(bundle)), memory)
    # Compiled engines are there or not: there are none of single layers, and their memory is the device's.
    compiled = any(engine.backend == backend.name for engine in manifest.engines)
    whole = not short or compiled or options.gpu is not None
    if not whole:
        options = msgspec.structs.replace(options, lean=True)
    cases = decoder_cases(manifest.config)
    if against == "transformers":
        cases = (*cases, *pixel_cases(manifest.config))
    media = MediaFormat(manifest.precision, _calibration(bundle))
    arithmetic = backend.arithmetic(manifest, options)
    goldens, strict = _judged(goldens, arithmetic)
    checker = Checker(bundle, manifest, goldens, media, backend, options, progress, cases)
    with _layers_folder(compiled=compiled) as (folder, why):
        checker.run(whole=whole, layers=folder)
    not_run = [NotRun(name="layer by layer", reason=why)] if why else []
    not_run += strict
    traces: tuple[Trace, ...] = ()
    if not whole:
        not_run.append(NotRun(name="token traces", reason=f"{short}; the decoder was checked layer by layer"))
    elif goldens.no_traces:
        not_run.append(NotRun(name="token traces", reason=goldens.no_traces))
    else:
        traces, found = check_traces(bundle, manifest, goldens, backend, options, progress)
        checker.rows += found
        task = accuracy_row(bundle, manifest, backend, options, progress) if tasks else None
        if task is not None:
            checker.rows.append(task)
    rows = tuple(checker.rows)
    verdict: Verdict = "passed" if rows and all(row.passed for row in rows) else "not_run"
    if any(row.measured and not row.passed for row in rows):
        verdict = "failed"
    return ParityReport(
        verdict=verdict,
        backend=backend.name,
        against=against,
        model=manifest.config.name,
        storage=manifest.precision.name,
        arithmetic=arithmetic,
        weights=goldens.weights_sha256,
        rows=rows,
        layers=tuple(checker.points),
        first_diverging_layer=checker.first_diverging,
        traces=traces,
        strips={case.name: strips(manifest.config, case) for case in cases},
        corrections=corrections_of(manifest.source.family) if against == "transformers" else "",
        not_run=tuple(not_run),
        environment=environment(backend),
        seconds=round(time.monotonic() - started, 3),
    )


def _judged(goldens: Goldens, arithmetic: StorageType) -> tuple[Goldens, list[NotRun]]:
    """The values to compare with, PyTorch's errors in them those of the engines' arithmetic; or what is said where those are not known."""
    if arithmetic == "fp32":
        return goldens, []
    found = goldens.in_16_bits()
    if found is not None:
        return found, []
    reason = (
        f"PyTorch's errors in {arithmetic} arithmetic were not recorded, so limits are those of fp32 arithmetic, which engines that compute in "
        f"{arithmetic} may exceed without a fault. Run parity where PyTorch and the weights are."
    )
    return goldens, [NotRun(name=f"limits for {arithmetic} arithmetic", reason=reason)]


@contextlib.contextmanager
def _layers_folder(*, compiled: bool) -> Iterator[tuple[Path | None, str]]:
    """A folder for graphs of single layers, outside of the bundle, which may be read-only; or why there is none."""
    if compiled:
        yield None, "the bundle has engines of whole subgraphs, none of single layers"
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flamingo-parity-"))
        except OSError as error:
            yield None, f"no folder for temporary files can be written ({error.strerror}). Set TMPDIR to one"
            return
        yield Path(folder), ""


def _expectation(
    bundle: Path,
    manifest: Manifest,
    checkpoint: CheckpointFiles | Path | None,
    memory: int,
    progress: Progress,
    wanted: Against | None,
    arithmetic: StorageType,
) -> tuple[Goldens, Against]:
    """What to compare with. The live reference is preferred; a checkpoint that was named must be usable, and so must what is wanted."""
    if wanted == "golden" and checkpoint is not None:
        raise ParityError("golden values lie in the bundle; a checkpoint is for --against reference or transformers")
    why = "" if wanted == "golden" else "PyTorch is not installed"
    if wanted != "golden" and torch_found():
        tokenizer = bundle / "tokenizer" / "tokenizer.json"
        kept = tokenizer if tokenizer.is_file() else None
        if wanted == "transformers":
            return _transformers(bundle, manifest, checkpoint, kept, memory, progress), "transformers"
        try:
            source = find_origin(manifest, checkpoint, bundle=bundle if wanted is not None else None)
        except CheckpointError as error:
            if checkpoint is not None or wanted is not None:
                raise
            why = str(error)
        else:
            digest = manifest.source.sha256 or source_digest(source)
            table = _calibration(bundle)
            recorded = record(
                source,
                manifest,
                digest,
                tokenizer=kept,
                memory=memory,
                calibration=table,
                arithmetic=arithmetic,
                progress=progress,
            )
            return recorded, "reference"
    elif checkpoint is not None or wanted in ("reference", "transformers"):
        raise ParityError(f"comparing with a checkpoint needs PyTorch: {pip_install('torch')}")
    goldens = load_goldens(bundle / GOLDEN_FOLDER, bundle)
    if goldens is None:
        raise ParityError(
            f"{bundle} has no golden values{f' and no live reference is at hand ({why})' if why else ''}. "
            "Run parity where PyTorch is installed, with --checkpoint DIR unless the weights are nano's or random."
        )
    if goldens.weights_sha256 != manifest.source.sha256:
        raise ParityError(
            f"the golden values in {bundle} are of other weights ({goldens.weights_sha256[:12]}) than the bundle's "
            f"({(manifest.source.sha256 or 'unknown')[:12]}). Build it again."
        )
    if goldens.storage != manifest.precision.key:
        raise ParityError(
            f"the golden values in {bundle} are of {goldens.storage} weights, the bundle stores {manifest.precision.key}. "
            "Run parity where PyTorch is installed."
        )
    return goldens, "golden"


def _calibration(bundle: Path) -> CalibrationTable | None:
    """The table that the bundle was quantised with, if it was with one."""
    path = bundle / CALIBRATION_FILE
    return read_table(path) if path.is_file() else None


def _transformers(
    bundle: Path,
    manifest: Manifest,
    checkpoint: CheckpointFiles | Path | None,
    tokenizer: Path | None,
    memory: int,
    progress: Progress,
) -> Goldens:
    """What transformers' own model expects. Raises ParityError if it is not installed, or the bundle is of another family."""
    from flamingo_export.validate.expected.transformers.theirs import theirs_of
    from flamingo_export.validate.expected.transformers.transformers_recording import record_transformers

    family = manifest.source.family
    if family not in KNOWN:
        made_of = f"a checkpoint of {family}" if family else f"{manifest.source.kind} weights"
        raise ParityError(
            f"the bundle was built from {made_of}, and transformers' own model is known for IDEFICS and Llama 3.2 Vision only. "
            "Compare it with the reference: leave out --against transformers."
        )
    theirs_of(family, ()).classes()
    if manifest.precision.policy is not None:
        raise ParityError(
            f"the bundle is quantised ({manifest.precision.name}), which transformers' model is not. Compare it with the reference (leave "
            "out --against transformers), and a bundle that is not quantised with transformers."
        )
    source = find_origin(manifest, checkpoint, bundle=bundle)
    assert isinstance(source, CheckpointSource)
    digest = manifest.source.sha256 or source_digest(source)
    with torch_threads(source.config):
        return record_transformers(
            source, manifest, digest, tokenizer=tokenizer, no_traces=no_room(source.config, memory), progress=progress
        )


def _keep(bundle: Path, manifest: Manifest, goldens: Goldens, report: ParityReport, progress: Progress) -> None:
    """Writes report, golden values where there were none, and the manifest, in this order; each is replaced as a whole.

    Reports are not among the files that the manifest lists by digest, since each run writes them anew; golden values are.
    """
    from flamingo_export.bundle.verify import file_record

    try:
        write_report(bundle, report)
        files = manifest.files
        if report.against == "reference" and not (bundle / GOLDEN_FOLDER / CASES_FILE).exists():
            save_goldens(bundle / GOLDEN_FOLDER, goldens)
            added: list[FileRecord] = [
                file_record(bundle, bundle / GOLDEN_FOLDER / name) for name in (CASES_FILE, TENSORS_FILE)
            ]
            files = (*(kept for kept in files if not kept.path.startswith(f"{GOLDEN_FOLDER}/")), *added)
        write_manifest(bundle, msgspec.structs.replace(manifest, files=files, parity=parity_record(manifest.parity, report)))
    except OSError as error:
        progress.note(f"{bundle} cannot be written to ({error.strerror}), so report and verdict were not kept in it")


def parity_record(before: ParityRecord, report: ParityReport) -> ParityRecord:
    """How parity stands after a report: backends that passed against the same thing add up, a failure stands alone."""
    from flamingo_export.validate.report.parity_report import REPORT_JSON

    backends: tuple[str, ...] = (report.backend,)
    if report.verdict == "passed" and before.state == "passed" and before.against == report.against:
        backends = tuple(dict.fromkeys((*before.backends, report.backend)))
    return ParityRecord(state=report.verdict, backends=backends, against=report.against, report=REPORT_JSON)


def _backend(backend: str | Backend) -> Backend:
    return get_backend(backend) if isinstance(backend, str) else backend
