"""What a tensor should be, and whether an engine's tensor is that. Nothing passes but finite numbers within their limit."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.validate.report.parity_report import Level, Row
from flamingo_export.validate.tolerances import Tolerance
from flamingo_reference.arrays import Array

Float64 = npt.NDArray[np.float64]

NUM_SAMPLES = 8192
"""Numbers kept of a tensor; larger ones are sampled at an odd stride, which visits every channel and row of power-of-two shapes."""


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """fp64 reference values of a tensor, sampled at `stride`, with PyTorch's own error in the bundle's dtype on the same input."""

    values: Float64
    shape: tuple[int, ...]
    stride: int
    rms: float
    peak: float
    torch_error: float

    @property
    def relative_peak(self) -> float:
        """Largest absolute value over the rms."""
        return self.peak / self.rms if self.rms else 1.0


def expect(reference: Array, torch_output: Array, *, num_samples: int = NUM_SAMPLES) -> Expected:
    """What is expected of an engine, from the fp64 reference and PyTorch's output of the same shape."""
    if reference.shape != torch_output.shape:
        raise ValueError(f"reference {reference.shape} and PyTorch's output {torch_output.shape} differ in shape")
    flat = np.asarray(reference, np.float64).reshape(-1)
    stride = -(-flat.size // num_samples) | 1 if flat.size > num_samples else 1
    rms = float(np.sqrt(np.mean(np.square(flat)))) if flat.size else 0.0
    peak = float(np.max(np.abs(flat), initial=0.0))
    own = error(flat, np.asarray(torch_output, np.float64).reshape(-1), rms)
    values = flat[::stride].copy()
    return Expected(values=values, shape=tuple(reference.shape), stride=stride, rms=rms, peak=peak, torch_error=own)


def error(reference: Float64, actual: Float64, rms: float) -> float:
    """Largest absolute difference over the reference's rms; NaN if either holds NaN. An all-zero reference has rms 1."""
    if reference.size == 0:
        return 0.0
    return float(np.max(np.abs(actual - reference)) / (rms or 1.0))


def gate(
    expected: Expected | None,
    actual: Array | None,
    *,
    tolerance: Tolerance,
    level: Level,
    case: str,
    subgraph: str,
    tensor: str,
    note: str = "",
) -> Row:
    """One row of the report. Another shape, NaN and infinity fail; where values are missing nothing is measured."""
    if expected is None:
        return unmeasured(level, case, subgraph, tensor, "no reference value for it")
    if actual is None:
        return unmeasured(level, case, subgraph, tensor, "the engine gave no such output")
    if tuple(actual.shape) != expected.shape:
        return failed(level, case, subgraph, tensor, f"shape {tuple(actual.shape)}, expected {expected.shape}")
    flat = np.asarray(actual).reshape(-1)
    limit = tolerance.limit(torch_error=expected.torch_error, peak=expected.relative_peak)
    if not np.all(np.isfinite(flat)):
        count = int(flat.size - np.isfinite(flat).sum())
        return failed(
            level, case, subgraph, tensor, f"{count} of {flat.size} numbers are NaN or infinite", limit=_finite(limit)
        )
    found = error(expected.values, flat[:: expected.stride].astype(np.float64), expected.rms)
    if not math.isfinite(limit):
        return unmeasured(level, case, subgraph, tensor, "the reference itself is not finite")
    passed = math.isfinite(found) and found <= limit
    if not passed:
        worst = int(np.argmax(np.abs(flat[:: expected.stride] - expected.values))) * expected.stride
        where = [int(place) for place in np.unravel_index(worst, expected.shape)]
        note = f"{note}; worst at {where}".removeprefix("; ")
    return Row(
        level=level,
        case=case,
        subgraph=subgraph,
        tensor=tensor,
        error=_finite(found),
        limit=_finite(limit),
        torch_error=_finite(expected.torch_error),
        passed=passed,
        note=note,
    )


def failed(level: Level, case: str, subgraph: str, tensor: str, note: str, *, limit: float | None = None) -> Row:
    """A gate that failed without a number: what the engine gave cannot be compared."""
    return Row(level=level, case=case, subgraph=subgraph, tensor=tensor, error=None, limit=limit, passed=False, note=note)


def unmeasured(level: Level, case: str, subgraph: str, tensor: str, note: str) -> Row:
    """A gate in which there was nothing to compare, and why."""
    row = failed(level, case, subgraph, tensor, note)
    return msgspec.structs.replace(row, measured=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
