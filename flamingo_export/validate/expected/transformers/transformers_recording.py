"""What transformers' IDEFICS computes in every case of parity, from a user's own checkpoint."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from flamingo_export.bundle.manifest import Manifest
from flamingo_export.progress import SILENT, Progress
from flamingo_export.sources import CheckpointSource
from flamingo_export.validate.expected.cases import decoder_cases, pixel_cases
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.oracle import record_numbers
from flamingo_export.validate.expected.trace_oracle import traces_of
from flamingo_export.validate.expected.transformers.transformers_parts import TransformersParts
from flamingo_export.validate.expected.transformers.whole import WholeModel, record_whole


def record_transformers(
    source: CheckpointSource,
    manifest: Manifest,
    digest: str,
    *,
    tokenizer: Path | None,
    no_traces: str,
    progress: Progress = SILENT,
) -> Goldens:
    """Expected values of every case, of `pixel_cases` and, unless `no_traces` says why not, of token traces.

    Layers and subgraphs: transformers' module of each, by itself, on the outputs of the last. Cases that begin with pixels: its whole model,
    whose weights are read as it runs. Traces: its `generate`, with all weights in memory. Raises ParityError as `TransformersParts` does.
    """
    # An older bundle lets a search generate what a checkpoint bans today.
    config = msgspec.structs.replace(source.config, tokens=manifest.config.tokens)
    storage = manifest.precision.storage
    parts = TransformersParts(source, storage)
    goldens = Goldens(weights_sha256=digest, storage=storage, model=config.name)
    cases = (*decoder_cases(config), *pixel_cases(config))
    record_numbers(parts, goldens, progress, cases=cases)
    record_whole(parts.fp64, parts.rounded, config, cases, goldens, progress)
    if no_traces:
        goldens.no_traces = no_traces
        return goldens
    with contextlib.ExitStack() as held:
        models = [parts.fp64, parts.rounded]
        for each in models:
            held.enter_context(each.held(each.model))
        goldens.traces = traces_of(
            config,
            manifest.limits,
            tokenizer,
            source.inputs.tags,
            lambda prompt: (WholeModel(models[0], config, prompt), WholeModel(models[1], config, prompt)),
            progress,
        )
    return goldens
