"""`flamingo-export inspect CHECKPOINT`: what a checkpoint is, what is missing, and what would be built of it, before any work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from flamingo_export.cli.parameter_table import Component
    from flamingo_export.precision import StorageType
    from flamingo_export.sources.choice import CheckpointFolder
    from flamingo_reference.checkpoints.families.recognition import Recognised
    from flamingo_reference.checkpoints.generation import Generation
    from flamingo_reference.checkpoints.loading import Checkpoint


class WouldBuild(msgspec.Struct, frozen=True, kw_only=True):
    """What `build` would make: parameters by component, bytes of the bundle's weights, needed disk, memory to build and to run, about."""

    name: str
    parameters: list[Component]
    storage: StorageType
    weight_bytes: int
    disk_bytes: int
    build_bytes: int
    run_bytes: int
    fit: str
    image_size: int
    tags: tuple[str, ...]
    chat_template: bool = False


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. types: number of tensors by element type. ignored: tensors by the reason for which they are left out.
    generation: what generation_config.json adds to the model's own tokens, and what else it says. notes: what a user should know.
    build: what would be; None where that is not known. fault: why it cannot be built, in full; None where it can."""

    path: str
    family: str
    title: str
    evidence: tuple[str, ...]
    files: int
    file_bytes: int
    tensors: int
    types: dict[str, int]
    ignored: dict[str, list[str]]
    tokenizer: str | None
    build: WouldBuild | None
    fault: str | None
    generation: Generation | None = None
    notes: tuple[str, ...] = ()


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a path is to be taken for a checkpoint rather than a bundle: a file, or a folder without manifest but with a config or tensors."""
    from flamingo_export.bundle.manifest import MANIFEST_NAME
    from flamingo_reference.checkpoints.files.folder import INDEX_SUFFIX, NAMES

    if path.is_file():
        return True
    names = {"config.json", *NAMES, *(f"{name}{INDEX_SUFFIX}" for name in NAMES)}
    return not (path / MANIFEST_NAME).exists() and any((path / name).is_file() for name in names)


def inspect_checkpoint(source: CheckpointFolder, as_json: bool) -> bool:
    """Prints what a checkpoint is; whether it can be built. Raises CheckpointError if it is of no known family."""
    from flamingo_export.cli.output import print_json

    found = survey(source)
    if as_json:
        print_json(found)
    else:
        _print(found)
    return found.fault is None


def survey(source: CheckpointFolder) -> Survey:
    """What a checkpoint is, without reading a number of it. Raises CheckpointError if it is of no known family, or its files are damaged."""
    from flamingo_export.cli.build import missing_files
    from flamingo_export.errors import CheckpointError
    from flamingo_reference.checkpoints.families.recognition import recognise
    from flamingo_reference.checkpoints.files.tensors import CheckpointError as UnreadableCheckpoint
    from flamingo_reference.checkpoints.loading import find_tokenizer

    try:
        recognised = recognise(source.path, may_be_absent=True)
        tokenizer = find_tokenizer(source)
    except UnreadableCheckpoint as error:
        raise CheckpointError(str(error)) from error
    ignored: dict[str, list[str]] = {}
    build, fault, opened = None, None, None
    try:
        build, opened, absent = _would_build(source)
        for name, reason in opened.ignored.items():
            ignored.setdefault(reason, []).append(name)
        if absent:
            fault = missing_files(absent)
    except CheckpointError as error:
        fault = str(error)
    return _survey(recognised, ignored, tokenizer, build, fault, opened)


def _survey(
    recognised: Recognised,
    ignored: dict[str, list[str]],
    tokenizer: Path | None,
    build: WouldBuild | None,
    fault: str | None,
    opened: Checkpoint | None,
) -> Survey:
    reader = recognised.reader
    names = reader.names()
    return Survey(
        path=str(recognised.path),
        family=recognised.family.name,
        title=recognised.family.title,
        evidence=recognised.evidence,
        files=len(reader.files),
        file_bytes=sum(path.stat().st_size for path in reader.files),
        tensors=len(names),
        types=dict(Counter("not there" if name in reader.absent else str(reader.dtype(name)) for name in names)),
        ignored=ignored,
        tokenizer=str(tokenizer) if tokenizer is not None else None,
        build=build,
        fault=fault,
        generation=opened.generation if opened is not None else None,
        notes=opened.notes if opened is not None else (),
    )


def _would_build(source: CheckpointFolder) -> tuple[WouldBuild, Checkpoint, tuple[Path, ...]]:
    """With the checkpoint, and the files that are missing."""
    from flamingo_export import estimates
    from flamingo_export.bundle.bundled_tokenizer import checked_tokenizer
    from flamingo_export.cli.parameter_table import components
    from flamingo_export.pipeline import plan as build_plan
    from flamingo_export.pipeline.build_request import BuildRequest, default_out
    from flamingo_export.sources import CheckpointSource
    from flamingo_export.weights import WeightIndex

    opened = CheckpointSource(source, may_be_absent=True)
    if opened.tokenizer is not None:
        checked_tokenizer(opened.tokenizer, opened.config, opened.inputs.tags)
    plan = build_plan.plan(BuildRequest(source=source, out=default_out(source)))
    build = WouldBuild(
        name=plan.config.name,
        parameters=components(plan.config),
        storage=plan.precision.storage,
        weight_bytes=plan.weight_bytes,
        disk_bytes=plan.disk_bytes,
        build_bytes=max(step.memory for step in plan.steps),
        run_bytes=estimates.resident(plan.config, WeightIndex.planned(plan.config, plan.precision)),
        fit=opened.inputs.fit,
        image_size=plan.config.vision.image_size,
        tags=opened.inputs.tags.all,
        chat_template=opened.inputs.prompts.template is not None,
    )
    return build, opened.checkpoint, plan.absent


def _print(found: Survey) -> None:
    from rich.markup import escape

    from flamingo_export.cli.output import human_bytes, human_count, results, table

    console = results()
    types = ", ".join(f"{count} {kind}" for kind, count in found.types.items())
    plural = "" if found.files == 1 else "s"
    console.print(f"[bold]{escape(found.path)}[/bold]  {escape(found.title)}", soft_wrap=True)
    lines = [
        ("recognised by", "; ".join(found.evidence)),
        ("tensors", f"{found.tensors} ({types}) in {found.files} file{plural} of {human_bytes(found.file_bytes)}"),
        ("tokenizer", found.tokenizer or "none found: prompts must be token ids (or name one: --tokenizer)"),
    ]
    for reason, names in found.ignored.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append((f"left out {len(names)}", f"{shown}: {reason}"))
    lines += _generation_lines(found.generation)
    lines += [("note", note) for note in found.notes]
    for label, text in lines:
        console.print(f"{label:<13} {text}", markup=False, soft_wrap=True)
    if found.fault is not None:
        console.print(f"cannot be built: {found.fault}", markup=False, soft_wrap=True)
    if found.build is None:
        return
    build = found.build
    console.print(
        f"images        {build.image_size}x{build.image_size}, {build.fit}; tags {', '.join(build.tags)}", markup=False
    )
    if build.chat_template:
        console.print("prompts       by the checkpoint's own chat template", markup=False)
    rows = [(part.name, f"{part.parameters:,}", human_count(part.parameters)) for part in build.parameters]
    console.print(table(("component", "parameters", ""), rows, title=f"would be built: {build.name}", right=(1, 2)))
    console.print(
        f"bundle of {human_bytes(build.weight_bytes)} in {build.storage}; needs {human_bytes(build.disk_bytes)} of disk, about "
        f"{human_bytes(build.build_bytes)} of memory to build and {human_bytes(build.run_bytes)} to run on a CPU"
    )


def _generation_lines(generation: Generation | None) -> list[tuple[str, str]]:
    """What generation_config.json says: what is applied, and what is not."""
    lines: list[tuple[str, str]] = []
    if generation is None:
        return lines
    for label, tokens in (("also ends", generation.ends), ("also banned", generation.banned)):
        if tokens:
            lines.append((label, f"tokens {', '.join(map(str, tokens))} (generation_config.json)"))
    if generation.not_applied:
        settings = ", ".join(f"{name} {value!r:.60}" for name, value in generation.not_applied.items())
        lines.append(("not applied", f"{settings} (generation_config.json): name them with each request where you want them"))
    return lines
