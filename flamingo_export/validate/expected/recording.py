"""What the reference expects of a bundle's engines: numbers of every case, PyTorch's errors in the engines' arithmetic, token traces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from flamingo_export import estimates
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import first_line
from flamingo_export.estimates import shortage
from flamingo_export.precision import StorageType
from flamingo_export.progress import SILENT, Progress
from flamingo_export.sources import WeightSource
from flamingo_export.validate.environment import is_small
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.media_rounding import MediaFormat
from flamingo_export.validate.expected.rounding import StoredRounding
from flamingo_export.weights.calibration_table import CalibrationTable
from flamingo_reference.config import ModelConfig


def record(
    source: WeightSource,
    manifest: Manifest,
    digest: str,
    *,
    tokenizer: Path | None,
    memory: int,
    calibration: CalibrationTable | None = None,
    arithmetic: StorageType = "fp32",
    progress: Progress = SILENT,
) -> Goldens:
    """Golden values of a source's weights as `manifest` stores them: numbers of every case, and token traces where memory allows.

    calibration: the table that a quantised bundle was made with. arithmetic: a 16-bit type that engines compute in, for which PyTorch's errors
    are recorded as well.
    """
    from flamingo_export.validate.expected.oracle import record_numbers
    from flamingo_export.validate.expected.reference_parts import parts_of
    from flamingo_export.validate.expected.trace_oracle import record_traces

    stored = StoredRounding(source.config, manifest.precision, calibration)
    goldens = Goldens(weights_sha256=digest, storage=manifest.precision.key, model=source.config.name)
    with torch_threads(source.config):
        record_numbers(parts_of(source, stored), goldens, progress, media=MediaFormat(manifest.precision, calibration))
        goldens.code_digests, goldens.roundings = dict(stored.code_digests), dict(stored.roundings)
        if arithmetic != "fp32":
            goldens.computed = _errors_in(arithmetic, source, stored, MediaFormat(manifest.precision, calibration), progress)
        goldens.no_traces = no_room(source.config, memory)
        if not goldens.no_traces:
            known = arithmetic if goldens.computed else "fp32"
            goldens.traces = record_traces(source, stored, manifest, tokenizer, progress, arithmetic=known)
    return goldens


def _errors_in(
    arithmetic: StorageType, source: WeightSource, stored: StoredRounding, media: MediaFormat, progress: Progress
) -> dict[str, float]:
    """PyTorch's error in each tensor where it computes in a 16-bit type throughout; empty where it cannot, which is said."""
    from flamingo_export.validate.expected.oracle import record_numbers
    from flamingo_export.validate.expected.reference_parts import parts_of

    found = Goldens(weights_sha256="", storage=arithmetic, model=source.config.name)
    try:
        record_numbers(parts_of(source, stored, arithmetic=arithmetic), found, progress, media=media)
    except RuntimeError as error:  # an operator of a vision encoder of the user's own, say, that PyTorch's CPU has only in fp32
        progress.note(f"PyTorch does not compute this model in {arithmetic} here ({first_line(error)})")
        return {}
    return {key: value.torch_error for key, value in found.expected.items()}


def no_room(config: ModelConfig, memory: int) -> str:
    """Why the whole reference cannot be asked for token traces; empty if it can."""
    return shortage("the reference as a whole", estimates.reference(config), memory)


@contextlib.contextmanager
def torch_threads(config: ModelConfig) -> Iterator[None]:
    """One thread for small models."""
    import torch

    threads = torch.get_num_threads()
    if is_small(config):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
