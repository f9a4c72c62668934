"""Where a build's weights come from: a checkpoint folder, a live PyTorch model, or seeded random numbers."""

from __future__ import annotations

from flamingo_export.sources.base import WeightSource, combined_digest, tensor_digest, towers_digest
from flamingo_export.sources.checkpoint import CheckpointSource
from flamingo_export.sources.choice import CheckpointFolder, RandomWeights, Source
from flamingo_export.sources.live import LiveSource
from flamingo_export.sources.random_weights import RandomSource

__all__ = [
    "CheckpointSource",
    "LiveSource",
    "RandomSource",
    "WeightSource",
    "combined_digest",
    "open_source",
    "tensor_digest",
    "towers_digest",
]


def open_source(source: Source) -> WeightSource:
    """The weights that a request names, without reading them. Raises CheckpointError or UnsupportedModel.

    Of a checkpoint in shards, all must be there; `CheckpointSource` says how to do without.
    """
    if isinstance(source, CheckpointFolder):
        return CheckpointSource(source)
    if isinstance(source, RandomWeights):
        return RandomSource(source.config, source.seed)
    return LiveSource(source.model, source.tokenizer, source.inputs)
