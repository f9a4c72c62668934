"""Codes and scales of a quantised bundle beside those that the checkpoint, the policy and the calibration table give, byte by byte.

Gates on numbers allow for what a policy costs, and where that is much (int4) a wrong scale of one matrix hides below it. Not here.
Quantisation is comparisons, roundings and sums in a fixed order, the same on every machine.

Codes that checkpoint and policy give are still wrong where the function that makes them is, since both sides call it. In int8 there is one right
answer, whatever makes it: `int8_rounding` measures each number of a matrix against it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from flamingo_export.quantize.matrices import SMALLEST_SCALE
from flamingo_export.validate.checks.tensor_checks import failed, unmeasured
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.report.parity_report import Row
from flamingo_export.weights import INPUT_SCALE, SCALE, WeightIndex
from flamingo_reference.arrays import Array

TENSOR = "codes and scales"
ROUNDING = "rounding to int8"
INT8_STEPS = 127
LARGEST_ROUNDING = 1.001
"""Most that `int8_rounding` may be: scales and products are fp32 numbers."""
_SHOWN_NAMES = 8


def codes_digest(*pieces: Array) -> str:
    """SHA-256 of a matrix's codes, its scales and, under fp8, its input's scale, as they are stored; of an operand only its scale."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def int8_rounding(matrix: Array, found: Array, block: int) -> float:
    """The largest difference of two matrices [in, out] over half a step of int8: what a block's largest number allows, `block` consecutive input
    channels of an output channel. 1 at most where `found` is the nearest that int8 has under the smallest scale that clips nothing."""
    worst = 0.0
    for start in range(0, len(matrix), block):
        part = np.asarray(matrix[start : start + block], np.float64)
        half_step = np.maximum(np.abs(part).max(axis=0) / INT8_STEPS, SMALLEST_SCALE) / 2
        worst = max(worst, float((np.abs(part - found[start : start + block]).max(axis=0) / half_step).max()))
    return worst


def check_roundings(goldens: Goldens) -> list[Row]:
    """A gate for each part of the model that holds matrices in int8: the largest `int8_rounding` of them. None where none was recorded."""
    parts: dict[str, dict[str, float]] = {}
    for name, found in goldens.roundings.items():
        parts.setdefault(_part(name), {})[name] = found
    rows = []
    for part, roundings in parts.items():
        name, worst = max(roundings.items(), key=lambda item: item[1])
        passed = worst <= LARGEST_ROUNDING
        rows.append(
            Row(
                level="weights",
                case="all",
                subgraph=part,
                tensor=ROUNDING,
                error=worst,
                limit=LARGEST_ROUNDING,
                passed=passed,
                note="" if passed else f"{name} is further from the checkpoint's numbers than int8 has to be: a wrong scale",
            )
        )
    return rows


def check_codes(bundle: Path, goldens: Goldens) -> list[Row]:
    """A gate for each part of the model (`resampler`, `media_kv`, `decoder/layer.0`, ...) that holds quantised matrices or operands; its
    error is how many of them differ. Not measured where no codes at all were recorded."""
    index = WeightIndex.read(bundle)
    parts: dict[str, list[str]] = {}
    stored = {name.removesuffix(SCALE).removesuffix(INPUT_SCALE) for name in index if name.endswith((SCALE, INPUT_SCALE))}
    for name in sorted(stored | goldens.code_digests.keys()):
        parts.setdefault(_part(name), []).append(name)
    rows = []
    for part, names in parts.items():
        if not goldens.code_digests:
            rows.append(unmeasured("weights", "all", part, TENSOR, "no codes were recorded"))
            continue
        wrong = []
        for name in names:
            pieces = [index.read_tensor(bundle, piece) for piece in (name, name + SCALE, name + INPUT_SCALE) if piece in index]
            if codes_digest(*pieces) != goldens.code_digests.get(name):
                wrong.append(name)
        if wrong:
            more = f" and {len(wrong) - _SHOWN_NAMES} more" if len(wrong) > _SHOWN_NAMES else ""
            note = f"not what checkpoint, policy and calibration table give: {', '.join(wrong[:_SHOWN_NAMES])}{more}"
            rows.append(failed("weights", "all", part, TENSOR, note, limit=0.0))
        else:
            rows.append(
                Row(
                    level="weights",
                    case="all",
                    subgraph=part,
                    tensor=TENSOR,
                    error=0.0,
                    limit=0.0,
                    passed=True,
                    note=f"{len(names)}",
                )
            )
    return rows


def _part(name: str) -> str:
    """`decoder/layer.3` of `decoder/layer.3/ffw_up`; the subgraph of what lies in no layer of the decoder."""
    subgraph, _, rest = name.partition("/")
    return f"{subgraph}/{rest.partition('/')[0]}" if rest.startswith("layer.") and subgraph == "decoder" else subgraph
