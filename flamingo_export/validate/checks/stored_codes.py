"""Codes and scales of a quantised bundle beside those that the checkpoint, the policy and the calibration table give, byte by byte.

Gates on numbers allow for what a policy costs, and where that is much (int4) a wrong scale of one matrix hides below it. Not here.
Quantisation is comparisons, roundings and sums in a fixed order, the same on every machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from flamingo_export.validate.checks.compare import failed
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.report.parity_report import Row
from flamingo_export.weights import INPUT_SCALE, SCALE, WeightIndex
from flamingo_reference.arrays import Array

TENSOR = "codes and scales"
_SHOWN_NAMES = 8


def codes_digest(*pieces: Array) -> str:
    """SHA-256 of a matrix's codes, its scales and, under fp8, its input's scale, as they are stored; of an operand only its scale."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_codes(bundle: Path, goldens: Goldens) -> list[Row]:
    """A gate for each part of the model (`resampler`, `media_kv`, `decoder/layer.0`, ...) that holds quantised matrices or operands; its
    error is how many of them differ."""
    index = WeightIndex.read(bundle)
    parts: dict[str, list[str]] = {}
    stored = {name.removesuffix(SCALE).removesuffix(INPUT_SCALE) for name in index if name.endswith((SCALE, INPUT_SCALE))}
    for name in sorted(stored | goldens.codes.keys()):
        parts.setdefault(_part(name), []).append(name)
    rows = []
    for part, names in parts.items():
        wrong = []
        for name in names:
            pieces = [index.read_tensor(bundle, piece) for piece in (name, name + SCALE, name + INPUT_SCALE) if piece in index]
            if codes_digest(*pieces) != goldens.codes.get(name):
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
