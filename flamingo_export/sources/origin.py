"""The weights that a bundle was made from, found again: what the live reference needs, since a bundle keeps them folded."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import msgspec

from flamingo_export.bundle.manifest import Manifest, PlaceRecord, SourceRecord
from flamingo_export.errors import CheckpointError
from flamingo_export.sources import CheckpointSource, RandomSource, WeightSource, combined_digest, tensor_digest, towers_digest
from flamingo_export.sources.choice import Source, nano_checkpoint
from flamingo_reference.checkpoints.loading import CheckpointFiles


def find_origin(
    manifest: Manifest, checkpoint: CheckpointFiles | Path | None = None, *, bundle: Path | None = None
) -> WeightSource:
    """The source of a bundle's weights: `checkpoint` where given, else the shipped nano checkpoint, the seed of random weights or, where
    `bundle` is given, the checkpoint that lay beside it when it was built.

    Raises CheckpointError if it is not known, or has other weights than the bundle.
    """
    recorded = manifest.source
    if checkpoint is not None:
        source = _as_built(CheckpointSource(checkpoint), manifest)
        digests = _digests(source)
        digest, towers = combined_digest(digests), towers_digest(digests)
        if digest == recorded.sha256 and towers != recorded.towers_sha256:
            named = checkpoint if isinstance(checkpoint, Path) else checkpoint.path
            raise CheckpointError(
                f"{named} has another contrastive encoder ({(towers or 'none')[:12]}) than the bundle was built from "
                f"({(recorded.towers_sha256 or 'none')[:12]}). Give the files that it was built from."
            )
        if digest != recorded.sha256:
            named = checkpoint if isinstance(checkpoint, Path) else checkpoint.path
            raise CheckpointError(
                f"{named} has other weights ({digest[:12]}) than the bundle was built from ({(recorded.sha256 or 'unknown')[:12]}). "
                "Give the checkpoint that it was built from."
            )
        return source
    if recorded.kind == "random" and recorded.seed is not None:
        drawn = RandomSource(manifest.config, recorded.seed)
        if drawn.record({}).sha256 != recorded.sha256:
            raise CheckpointError(
                "this version of flamingo-export draws other random weights than the bundle's. Build it again."
            )
        return drawn
    shipped = _shipped_checkpoint()
    if shipped is not None and _is_origin(shipped := _as_built(shipped, manifest), manifest):
        return shipped
    beside = _files_beside(bundle, recorded.place) if bundle is not None else None
    if beside is not None:
        return find_origin(manifest, beside)
    what = "a live model" if recorded.kind == "live" else "a checkpoint that does not ship with this package"
    raise CheckpointError(f"the bundle was built from {what}. Name a checkpoint with the same weights: --checkpoint DIR")


def source_digest(source: WeightSource) -> str:
    """One digest of the model's tensors, as the manifest records it."""
    return combined_digest(_digests(source))


def _digests(source: WeightSource) -> dict[str, str]:
    return {name: tensor_digest(source.read(name)) for name in source.names()}


def _as_built(source: CheckpointSource, manifest: Manifest) -> CheckpointSource:
    """A checkpoint without its contrastive encoder where the bundle was built without one."""
    return source if manifest.config.contrastive is not None else source.without_towers()


def _is_origin(source: CheckpointSource, manifest: Manifest) -> bool:
    if source.config != manifest.config:
        return False
    digests, recorded = _digests(source), manifest.source
    return combined_digest(digests) == recorded.sha256 and towers_digest(digests) == recorded.towers_sha256


def relative_paths(record: SourceRecord, files: Source, out: Path) -> SourceRecord:
    """The record, with where the checkpoint's files lie from the folder that holds the bundle `out`, if all of them lie in it."""
    if not isinstance(files, CheckpointFiles):
        return record
    folder = Path(os.path.abspath(out)).parent

    def within(path: Path | None) -> str | None:
        return Path(os.path.abspath(path)).relative_to(folder).as_posix() if path is not None else None

    try:
        place = PlaceRecord(
            path=within(files.path) or "",
            language_model=within(files.language_model),
            vision_encoder=within(files.vision_encoder),
            adapters=tuple(within(adapter) or "" for adapter in files.adapters),
            tokenizer=within(files.tokenizer),
        )
    except ValueError:  # one of them lies elsewhere
        return record
    return msgspec.structs.replace(record, place=place)


def _files_beside(bundle: Path, place: PlaceRecord | None) -> CheckpointFiles | None:
    """The files that `relative_paths` named, where all are still there."""
    if place is None:
        return None
    folder = Path(os.path.abspath(bundle)).parent
    named = [place.path, place.language_model, place.vision_encoder, *place.adapters, place.tokenizer]
    paths = [PurePosixPath(path) for path in named if path is not None]
    # A manifest may come from anywhere.
    if any(path.is_absolute() or ".." in path.parts or not (folder / path).exists() for path in paths):
        return None

    def there(path: str | None) -> Path | None:
        return folder / path if path is not None else None

    return CheckpointFiles(
        path=folder / place.path,
        language_model=there(place.language_model),
        vision_encoder=there(place.vision_encoder),
        adapters=tuple(folder / adapter for adapter in place.adapters),
        tokenizer=there(place.tokenizer),
    )


def _shipped_checkpoint() -> CheckpointSource | None:
    try:
        return CheckpointSource(nano_checkpoint())
    except CheckpointError:
        return None
