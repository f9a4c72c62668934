"""A bundle's graphs for other weights of the same shapes: what must be equal, and what is taken over.

No number of a weight is in a graph: a graph's constants follow from the configuration, and all that is folded (gates, distances, standardised
kernels) is folded into the weights' files, which are written anew. So equal configurations and equal places of the weights are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from flamingo_export.bundle.manifest import Manifest, read_manifest
from flamingo_export.bundle.verify import open_bundle
from flamingo_export.errors import BuildError, CheckpointError
from flamingo_export.progress import SILENT, Progress
from flamingo_export.sources import CheckpointSource
from flamingo_export.sources.base import WeightSource
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import OwnVisionConfig


def donor_for(bundle: Path, source: WeightSource, *, progress: Progress = SILENT) -> Manifest:
    """The manifest of a bundle whose graphs fit the weights of `source`.

    Raises BundleError if the bundle is damaged, CheckpointError naming every setting in which the two differ, BuildError if this version
    would lay the weights out in another way than the graphs read them.
    """
    manifest = open_bundle(bundle, progress=progress)
    if isinstance(manifest.config.vision, OwnVisionConfig):
        raise BuildError(
            f"{bundle} has a traced vision encoder, whose graph and weights come from its module. Build the checkpoint instead."
        )
    faults = list(_differences(msgspec.to_builtins(manifest.config), msgspec.to_builtins(source.config)))
    if faults:
        raise CheckpointError(
            f"the checkpoint is of another model than {bundle}: {'; '.join(faults)}. Build it: flamingo-export build --checkpoint ..."
        )
    planned, found = WeightIndex.planned(manifest.config, manifest.precision), WeightIndex.read(bundle)
    moved = sorted(
        name for name in {*planned, *found} if name not in planned or name not in found or planned[name] != found[name]
    )
    if moved:
        made = manifest.tools.get("flamingo-export", "another version")
        raise BuildError(
            f"the graphs of {bundle}, made by flamingo-export {made}, read weights where this version does not put them "
            f"({moved[0]} and {len(moved) - 1} more). Build the checkpoint instead."
        )
    return manifest


def as_graphs_have(bundle: Path, source: CheckpointSource) -> CheckpointSource:
    """The source without its contrastive encoder where a bundle's graphs have none. Raises BundleError."""
    return source if read_manifest(bundle).config.contrastive is not None else source.without_towers()


_CHOICE = ("tokens.ends", "tokens.banned")


def _differences(bundle: Any, checkpoint: Any, where: str = "") -> Iterator[str]:
    """Settings that differ, by their dotted names. The model's name is not a setting, and no graph depends on the tokens of _CHOICE."""
    if isinstance(bundle, dict) and isinstance(checkpoint, dict):
        for key in [*bundle, *(key for key in checkpoint if key not in bundle)]:
            path = f"{where}.{key}" if where else key
            if path != "name" and path not in _CHOICE:
                yield from _differences(bundle.get(key), checkpoint.get(key), path)
    elif bundle != checkpoint:
        yield f"{where} is {checkpoint!r}, the bundle has {bundle!r}"
