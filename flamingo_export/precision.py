"""Precision of a bundle: how weights are stored, which products are quantised, and what the portable graphs compute in.

Precision       storage type of all weights, and the policy that quantises some of them
Policy          rules in order, the last that matches a weight wins; presets lie in `quantize/presets/`, users write their own
Quantisation    what a rule says of one matrix: its element type and the rows that share a scale
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable
from typing import Literal

import msgspec

StorageType = Literal["fp32", "fp16", "bf16"]
ComputeType = Literal["fp32"]
QuantisedType = Literal["fp8", "int8", "int4"]
ElementType = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]
PolicyFormat = Literal["storage", "fp32", "fp8", "int8", "int4"]

BYTES_PER_WEIGHT: dict[StorageType, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
E4M3_LARGEST = 448.0
"""The largest number of FP8 in the format E4M3, which has no infinity."""
SMALLEST_BLOCK = 16
"""The smallest block that ONNX Runtime's block-quantised product and TensorRT both take."""


class Quantisation(msgspec.Struct, frozen=True, kw_only=True):
    """How one matrix [in, out] is quantised.

    fp8: E4M3, a scale for each output channel, and one for its input, which is quantised as well. int8, int4: symmetric, a scale for
    each `block` consecutive input channels of an output channel; the input stays as it is.
    """

    element: QuantisedType
    block: int = 0


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Matrices whose names match `weights` (a shell pattern) are kept in `format`; `storage` is the bundle's own type."""

    weights: str
    format: PolicyFormat
    block: int = 0
    """Of int8 and int4. A matrix whose input it does not divide takes the largest power of two that does."""
    reason: str = ""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which matrices are quantised and how: rules in order, the last one that matches wins; what none matches is kept as stored.

    attention: queries, keys and values of self-attention, each with one scale; the cache is kept as it is.
    media: keys and values of media, each tensor with one scale, and so the bank: a byte a number.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    attention: Literal["storage", "fp8"] = "storage"
    media: Literal["storage", "fp8"] = "storage"

    def rule(self, name: str) -> Rule | None:
        """The rule that decides on matrix `name`."""
        found = [rule for rule in self.rules if fnmatch.fnmatchcase(name, rule.weights)]
        return found[-1] if found else None

    @property
    def needs_ranges(self) -> bool:
        """Whether activations are quantised, whose ranges a calibration table gives."""
        return "fp8" in (self.attention, self.media, *(rule.format for rule in self.rules))

    def unmatched(self, names: Iterable[str]) -> list[Rule]:
        """Rules that match none of the matrices `names`."""
        names = list(names)
        return [rule for rule in self.rules if not any(fnmatch.fnmatchcase(name, rule.weights) for name in names)]


class Precision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights are kept in `storage`, matrices that the policy names quantised; the graphs widen them to `compute` where the types differ.

    Normalisation scales, biases and learned embeddings stay in fp32: they are small, and rounding them is felt most.
    """

    storage: StorageType
    compute: ComputeType = "fp32"
    policy: Policy | None = None

    @property
    def name(self) -> str:
        """For people: the storage type, or the policy over it."""
        return self.storage if self.policy is None else f"{self.policy.name} (the rest {self.storage})"

    @property
    def key(self) -> str:
        """Tells apart what computes different numbers: golden values belong to one."""
        if self.policy is None:
            return self.storage
        rules = [(rule.weights, rule.format, rule.block) for rule in self.policy.rules]
        content = msgspec.json.encode([rules, self.policy.attention, self.policy.media])
        return f"{self.storage}, {self.policy.name} {hashlib.sha256(content).hexdigest()[:12]}"

    @property
    def media(self) -> Literal["float", "fp8"]:
        """What the media bank holds: numbers of the compute type, or E4M3 codes."""
        return "fp8" if self.policy is not None and self.policy.media == "fp8" else "float"

    def element(self, name: str) -> StorageType:
        """Type that matrix `name` is kept in where it is not quantised."""
        rule = self.policy.rule(name) if self.policy is not None else None
        return "fp32" if rule is not None and rule.format == "fp32" else self.storage

    def quantisation(self, name: str, input_size: int) -> Quantisation | None:
        """How matrix `name` with this many input channels is quantised; None if it is not, or no block divides its input."""
        rule = self.policy.rule(name) if self.policy is not None else None
        if rule is None or rule.format not in ("fp8", "int8", "int4"):
            return None
        if rule.format == "fp8":
            return Quantisation(element="fp8")
        block = dividing_block(input_size, rule.block)
        return Quantisation(element=rule.format, block=block) if block else None


def dividing_block(size: int, wanted: int) -> int:
    """The largest power of two up to `wanted` that divides `size`; 0 if it is less than SMALLEST_BLOCK."""
    block = 1 << max(0, wanted.bit_length() - 1)
    while block >= SMALLEST_BLOCK and size % block:
        block //= 2
    return block if block >= SMALLEST_BLOCK else 0


def default_precision(num_parameters: int) -> Precision:
    """Nothing quantised, in the default storage."""
    return Precision(storage=default_storage(num_parameters))


def default_storage(num_parameters: int) -> StorageType:
    """fp32 for models of less than a billion parameters, bf16 above (the range of fp32 at half its bytes)."""
    return "fp32" if num_parameters < 1_000_000_000 else "bf16"
