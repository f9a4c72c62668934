"""What `import flamingo_export` gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_export.progress import SILENT, Progress

if TYPE_CHECKING:
    from flamingo_export.build_request import ParityMode, Source
    from flamingo_export.manifest import ShapeLimits
    from flamingo_export.pipeline import BuildResult
    from flamingo_export.precision import StorageType
    from flamingo_reference.model import Flamingo


def build(
    model: Path | str | Flamingo | Source,
    *,
    out: Path | str | None = None,
    storage: StorageType | None = None,
    limits: ShapeLimits | None = None,
    tokenizer: Path | None = None,
    parity: ParityMode = "auto",
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress = SILENT,
) -> BuildResult:
    """Builds a bundle and publishes it at `out` once it is complete and, where PyTorch is installed, parity has passed.

    model: a checkpoint folder, a live `flamingo_reference.model.Flamingo` (`tokenizer`: the `tokenizer.json` it was trained with), or
    a source, such as `build_request.source_for_size("9b")`. out: None takes `build_request.default_out`.
    Returns the bundle's path, its manifest and what a user should know about it. An interrupted build goes on where it stopped.

    Raises CheckpointError (weights missing, unknown, misshapen or not finite), UnsupportedModel (a live model with parts that are not
    known), BuildError (output taken, no space, another build to the same path), ParityError (parity failed or could not be run).
    """
    from flamingo_export import build_request, pipeline

    source = _source(model, tokenizer)
    request = build_request.BuildRequest(
        source=source,
        out=Path(out) if out is not None else build_request.default_out(source),
        storage=storage,
        limits=limits,
        parity=parity,
        overwrite=overwrite,
        resume=resume,
    )
    return pipeline.build(request, progress=progress)


def _source(model: Path | str | Flamingo | Source, tokenizer: Path | None) -> Source:
    from flamingo_export.build_request import CheckpointFolder, LiveModel, RandomWeights

    if isinstance(model, (CheckpointFolder, RandomWeights, LiveModel)):
        return model
    if isinstance(model, (str, Path)):
        return CheckpointFolder(path=Path(model))
    return LiveModel(model=model, tokenizer=tokenizer)
