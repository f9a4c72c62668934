"""Everything of a build that can fail before anything is written: weights, precision, tokenizers, compiler, memory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import msgspec

from flamingo_export.backends.compiler import Compiler, Ready
from flamingo_export.backends.registry import compiler_of
from flamingo_export.bundle.bundled_tokenizer import checked_text_tokenizer, checked_tokenizer, placeholder_tokenizer
from flamingo_export.bundle.manifest import (
    Manifest,
    ShapeLimits,
)
from flamingo_export.errors import CheckpointError, PromptError
from flamingo_export.pipeline.build_request import BuildRequest, resolve_limits, resolve_precision
from flamingo_export.pipeline.donor import as_graphs_have, donor_for
from flamingo_export.pipeline.plan import OTHER_FILES_BYTES, engine_bytes
from flamingo_export.pipeline.ranges import checked_policy
from flamingo_export.pipeline.work_folder import BuildPaths, Journal
from flamingo_export.precision import Precision
from flamingo_export.progress import Progress
from flamingo_export.runtime.chat import Shown, Turn, written
from flamingo_export.runtime.tokenizer import TEXT_TOKENIZER_FILE, TOKENIZER_FILE
from flamingo_export.sources import CheckpointSource, LiveSource, RandomSource, WeightSource, open_source
from flamingo_export.weights import WeightIndex, bundle_weights, groups, stored_bytes
from flamingo_export.weights.calibration_table import (
    CalibrationTable,
)
from flamingo_export.weights.decoder_cuts import check_parts, graph_records
from flamingo_reference.checkpoints.families import native
from flamingo_reference.config import OwnVisionConfig

ENGINES_FOLDER = "engines"


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """A request with everything looked up that can fail before anything is written."""

    request: BuildRequest
    source: WeightSource
    precision: Precision
    limits: ShapeLimits
    paths: BuildPaths
    compiler: tuple[Compiler, Ready] | None
    calibration: CalibrationTable | None
    """As it was given; None where none was, whether or not one will be made."""
    tokenizer: str | None
    text_tokenizer: str | None
    """Of the text tower."""
    donor: Manifest | None
    """Of the bundle whose graphs are taken."""
    notes: tuple[str, ...]


def prepare(request: BuildRequest, progress: Progress) -> BuildJob:
    """Looks up what a request names. Raises what `pipeline.run.build` raises before it writes."""
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
    donor = donor_for(request.graphs_of, source, progress=progress) if request.graphs_of is not None else None
    notes = list(source.notes)
    limits, said = resolve_limits(request, config, precision, backend)
    if said is not None:
        notes.append(said)
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
    return BuildJob(
        request=request,
        source=source,
        precision=precision,
        limits=limits,
        paths=BuildPaths(request.out),
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


def identity(job: BuildJob) -> str:
    """What must match for an interrupted build to resume: all that finished weights depend on."""
    versions = [importlib.metadata.version(tool) for tool in ("flamingo-export", "numpy")]
    ranges = job.calibration or ("none" if job.request.uncalibrated else "own")
    weights = [job.source.identity, job.source.config, job.precision, ranges, versions]
    return hashlib.sha256(msgspec.json.encode(weights)).hexdigest()


def bytes_left(job: BuildJob, journal: Journal) -> int:
    """What is yet to be written, in bytes."""
    every = groups(bundle_weights(job.source.config, job.precision))
    sizes = {group: sum(stored_bytes(weight, job.precision) for weight in members) for group, members in every.items()}
    weights = sum(size for group, size in sizes.items() if group not in journal.groups)
    compiled = sum(record.file.size for record in journal.groups.values() if record.file.path.startswith(ENGINES_FOLDER))
    engines = engine_bytes(job.request, job.source.config, job.precision)
    return weights + max(0, engines - compiled) + OTHER_FILES_BYTES


def check_engines(job: BuildJob, journal: Journal) -> None:
    """Raises BuildError before any work if no engine can have the limits, or one that is not finished cannot be built in the memory there is."""
    if job.compiler is None:
        return
    job.compiler[0].check_limits(job.limits)
    config, sizes = job.source.config, WeightIndex.planned(job.source.config, job.precision).sizes()
    finished = {Path(file).stem for file in journal.groups if file.startswith(ENGINES_FOLDER)}
    for graph in graph_records(config, sizes, job.request.parts):
        if graph.name not in finished:
            job.compiler[0].check_memory(config, graph, sizes)
