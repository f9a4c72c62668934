"""The weights that a bundle was made from, found again: what the live reference needs, since a bundle keeps them folded."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.errors import CheckpointError
from flamingo_export.manifest import Manifest
from flamingo_export.sources import CheckpointSource, RandomSource, WeightSource, combined_digest, tensor_digest
from flamingo_reference.checkpoints.loading import CheckpointFiles


def find_origin(manifest: Manifest, checkpoint: CheckpointFiles | Path | None = None) -> WeightSource:
    """The source of a bundle's weights: `checkpoint` where given, else the shipped nano checkpoint or the seed of random weights.

    Raises CheckpointError if it is not known, or has other weights than the bundle.
    """
    recorded = manifest.source
    if checkpoint is not None:
        source = CheckpointSource(checkpoint)
        digest = source_digest(source)
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
    if shipped is not None and shipped.config == manifest.config and source_digest(shipped) == recorded.sha256:
        return shipped
    what = "a live model" if recorded.kind == "live" else "a checkpoint that does not ship with this package"
    raise CheckpointError(f"the bundle was built from {what}. Name a checkpoint with the same weights: --checkpoint DIR")


def source_digest(source: WeightSource) -> str:
    """One digest of all tensors, as the manifest records it."""
    return combined_digest({name: tensor_digest(source.read(name)) for name in source.names()})


def _shipped_checkpoint() -> CheckpointSource | None:
    from flamingo_export.build_request import nano_checkpoint

    try:
        return CheckpointSource(nano_checkpoint())
    except CheckpointError:
        return None
