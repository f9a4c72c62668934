"""Records the golden values that ship with a checkpoint: `python -m flamingo_export.validate.record CHECKPOINT`.

They are written into CHECKPOINT/golden and handed on by builds of its weights, so that machines without PyTorch can verify their engines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flamingo_export.bundle.manifest import Manifest, SourceRecord, default_limits
from flamingo_export.errors import FlamingoExportError, ParityError
from flamingo_export.machine import available_memory
from flamingo_export.precision import StorageType, default_precision
from flamingo_export.sources import CheckpointSource
from flamingo_export.sources.origin import source_digest
from flamingo_export.validate.expected.golden import Goldens, add_goldens, load_goldens, save_goldens
from flamingo_export.validate.expected.recording import record
from flamingo_export.validate.parity import GOLDEN_FOLDER
from flamingo_reference.names import parameter_counts


def record_checkpoint(checkpoint: Path, *, storage: StorageType | None = None, add: bool = False) -> Goldens:
    """Writes CHECKPOINT/golden for bundles of these weights with default limits, and returns what was written. Needs torch.

    storage: None is the default of the model's size. add: values that are there stay to the last bit, only cases that they lack are added, those
    of a contrastive encoder that was trained later, say. Raises CheckpointError; ParityError if there are none to add to.
    """
    source = CheckpointSource(checkpoint)
    precision = default_precision(sum(parameter_counts(source.config).values()))
    if storage is not None:
        precision = type(precision)(storage=storage)
    digest = source_digest(source)
    manifest = Manifest(
        config=source.config,
        precision=precision,
        limits=default_limits(source.config),
        source=SourceRecord(kind="checkpoint", sha256=digest),
        graphs=(),
        files=(),
    )
    kept = load_goldens(checkpoint / GOLDEN_FOLDER, checkpoint) if add else None
    if add and (kept is None or kept.weights_sha256 != digest):
        raise ParityError(f"{checkpoint / GOLDEN_FOLDER} holds no golden values of these weights to add to. Leave out --add.")
    goldens = record(source, manifest, digest, tokenizer=source.tokenizer, memory=available_memory())
    if kept is not None:
        return add_goldens(checkpoint / GOLDEN_FOLDER, kept, goldens)
    save_goldens(checkpoint / GOLDEN_FOLDER, goldens)
    return goldens


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flamingo_export.validate.record", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder in our own format")
    parser.add_argument("--add", action="store_true", help="keep the values that are there, and add cases that they lack")
    arguments = parser.parse_args(argv)
    try:
        goldens = record_checkpoint(arguments.checkpoint, add=arguments.add)
    except FlamingoExportError as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in (arguments.checkpoint / GOLDEN_FOLDER).iterdir())
    print(
        f"{len(goldens.expected)} tensors, {len(goldens.traces)} traces, {size / 1e6:.2f} MB, weights {goldens.weights_sha256[:12]}"
    )
    for trace in goldens.traces:
        print(f"  {trace.case}, {'greedy' if trace.num_beams == 1 else f'beam {trace.num_beams}'}: {trace.text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
