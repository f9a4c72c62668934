"""Precision of a bundle: how weights are stored and what the portable graphs compute in."""

from __future__ import annotations

from typing import Literal

import msgspec

StorageType = Literal["fp32", "fp16", "bf16"]
ComputeType = Literal["fp32"]

BYTES_PER_WEIGHT: dict[StorageType, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


class Precision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights are kept in `storage`; the graphs cast them to `compute` where the two differ.

    Normalisation scales, biases and learned embeddings stay in fp32: they are small, and rounding them is felt most.
    """

    storage: StorageType
    compute: ComputeType = "fp32"


def default_precision(num_parameters: int) -> Precision:
    """fp32 for models of less than a billion parameters, bf16 storage above (the range of fp32 at half its bytes)."""
    return Precision(storage="fp32" if num_parameters < 1_000_000_000 else "bf16")
