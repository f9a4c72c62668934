"""How far an engine may be from the reference: one table, each row with its reason.

Error of a tensor: the largest absolute difference from the fp64 reference, over the root mean square of the reference. Errors of a
whole tensor are compared, not of single numbers: a number near zero has no relative error of its own, it inherits that of the sums it
came from, whose size the rms tells.

Rule: the engine's error may be twice that of PyTorch in the same dtype on the same input, plus a floor of a few ulps of the tensor's largest
number. The same dtype: weights rounded to the bundle's storage, computed in what the engine computes in, fp32 or the storage type throughout.
For logits, PyTorch's error is the largest over all cases of the decoder: it is one computation, and a case of few numbers does not find its
largest error by itself.

Of a quantised bundle PyTorch's error is that of the reference with weights and activations rounded as the policy says (rounding.py), so
it is the cost of the policy, and the engine may not pay much more. The cost itself is bounded as well: a wrong scale in a calibration
table makes both wrong alike. Of a layer by its rms too (POLICY_COSTS): the largest of a tensor's numbers grows with their count and with
outliers.
In int8, whose weights have one right rounding, each number of a matrix is held to that in place of a bound on what a layer makes of it.
Of logits by nano's largest error, or by what already arrives at the head (`logits_tolerance`): how far a deep model carries the errors of its
layers, each within its own bound, depends on depth and weights.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import msgspec

from flamingo_export.precision import Precision, StorageType

FP32_ULP = 2.0**-23
FP32 = Precision(storage="fp32")


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """`factor` times PyTorch's error, plus `floor_ulps` ulps (fp32) of the reference's largest absolute value, `most` at most."""

    factor: float
    floor_ulps: float
    reason: str
    most: float = math.inf

    def limit(self, *, torch_error: float, peak: float) -> float:
        """The largest error that passes. `peak` is max(abs(reference)) / rms(reference). NaN if PyTorch's own error is not finite."""
        if not math.isfinite(torch_error):
            return math.nan
        return min(self.most, self.factor * torch_error + self.floor_ulps * FP32_ULP * peak)


RULE = Tolerance(
    factor=2.0,
    floor_ulps=4.0,
    reason=(
        "Twice PyTorch's error. The floor: PyTorch may be exact by chance (a product with few terms), inputs and golden values are fp32 "
        "(half an ulp each), and the engine's own output is rounded once."
    ),
)

INDEPENDENT_ROUNDING = Tolerance(
    factor=4.0,
    floor_ulps=4.0,
    reason=(
        "The bundle rounds NFNet's kernels to 16 bits after standardising and scaling them, PyTorch rounds them before. The two errors are "
        "equally large but independent draws, and they pass through up to 85 blocks: the largest of one may be several times that of the other."
    ),
)

_QUANTISED = (
    "Engine and PyTorch round the same weights to the same codes, so their errors agree but where an activation lies so close between two "
    "codes that fp32's own rounding decides. Measured on nano: 1.03 times PyTorch's error at most."
)


_IN_16_BITS = (
    "Computed in 16 bits, each operator's rounding decides to which of two codes an activation goes, and that of the engine is independent of "
    "PyTorch's: twice its error, as everywhere."
)


def _quantised(most: float, bounds: str) -> Tolerance:
    return Tolerance(factor=1.5, floor_ulps=4.0, reason=f"{_QUANTISED} {bounds}", most=most)


TABLE = MappingProxyType(
    {
        "vision_encoder": RULE,
        "vision_encoder, 16-bit storage": INDEPENDENT_ROUNDING,
        "resampler": RULE,
        "resampler of encoded frames": RULE,
        "resampler of encoded frames, 16-bit storage": msgspec.structs.replace(
            INDEPENDENT_ROUNDING, reason=f"{INDEPENDENT_ROUNDING.reason} Here they have passed through the resampler too."
        ),
        "media_kv": RULE,
        "image_tower": RULE,
        "text_tower": RULE,
        "decoder": RULE,
        "layer": RULE,
        "quantised, int8": _quantised(0.5, "Largest error of nano: 0.14 of the rms, in the resampler."),
        "quantised, fp8": _quantised(1.0, "Largest error of nano: 0.34 of the rms, in the logits."),
        "quantised, int4": _quantised(1.5, "Largest error of nano: 0.57 of the rms, in the logits."),
        "quantised layer, int8": _quantised(0.1, "Largest error of a layer of nano: 0.025 of the rms."),
        "quantised layer, fp8": _quantised(0.4, "Largest error of a layer of nano: 0.15 of the rms."),
        "quantised layer, int4": _quantised(
            2.0,
            "Largest error of a layer: 0.34 of the rms in nano, 1.08 in the first of 9b, whose cost by POLICY_COSTS is 0.16 at most.",
        ),
    }
)
"""What is compared -> its tolerance. A kind without a row of its own for 16-bit storage has the same in all types."""

POLICY_COSTS = MappingProxyType({"int8": 0.07, "fp8": 0.14, "int4": 0.42})
"""Most that a policy of this coarsest format may cost in a layer: rms of the difference from fp64 over the rms of what the layer adds.
A third above what layers of 9b's shapes pay, whose outliers are as hard as trained ones' (tests/export/quantize/test_real_block.py); a range an
eighth of what it should be costs several times that."""


def tolerance(kind: str, precision: Precision = FP32, arithmetic: StorageType = "fp32") -> Tolerance:
    """The row of TABLE for `kind`. Raises KeyError: a comparison without a row is a fault of the caller, not a default.

    A policy is judged by the coarsest of its formats. The vision encoder, which no preset quantises, is by its storage. arithmetic: what the
    engines compute in. In 16 bits their errors and PyTorch's no longer agree in quantised layers either: the factor is RULE's, the bound stays.
    """
    found = coarsest(precision)
    if found is not None and kind != "vision_encoder":
        row = TABLE[f"quantised layer, {found}" if kind == "layer" else f"quantised, {found}"]
        if arithmetic == "fp32":
            return row
        return msgspec.structs.replace(row, factor=RULE.factor, reason=f"{row.reason} {_IN_16_BITS}")
    narrow = f"{kind}, 16-bit storage"
    return TABLE[narrow] if precision.storage != "fp32" and narrow in TABLE else TABLE[kind]


_WEIGHTS_CHECKED = (
    "Each number of each matrix is held to half a step of int8 (stored_codes.py), and the layer's cost by its rms: nothing is left that engine "
    "and PyTorch could have wrong alike, so the largest number is judged as in 16 bits, by PyTorch's own error with these codes."
)


def layer_tolerance(precision: Precision, arithmetic: StorageType = "fp32", *, weights_checked: bool) -> Tolerance:
    """The row for what a layer makes of exact hidden states, and for hidden states carried through layers.

    weights_checked: whether the rounding of each matrix was measured number by number, which int8 allows. The row's bound is then of no use: it
    stands for a wrong scale that both sides share, and honest largest errors grow with a tensor's tail (SwiGLU's products: 6.8 times their rms
    in a layer whose cost is 0.018, where nano has 4).
    """
    row = tolerance("layer", precision, arithmetic)
    if coarsest(precision) != "int8" or not weights_checked:
        return row
    return msgspec.structs.replace(row, most=math.inf, reason=f"{row.reason} {_WEIGHTS_CHECKED}")


def logits_tolerance(precision: Precision, arriving: float, arithmetic: StorageType = "fp32") -> Tolerance:
    """The row for logits. arriving: PyTorch's error of the hidden states that leave the last layer, carried through all of them.

    In int4 the head may not cost more than what arrives at it, where that is more than the row allows: in 9b of random weights int4's errors
    of single layers, 0.07 to 1.1, have grown to 2.9 there and are 3.6 in the logits.
    """
    row = tolerance("decoder", precision, arithmetic)
    if coarsest(precision) != "int4" or not math.isfinite(arriving):
        return row
    return msgspec.structs.replace(row, most=max(row.most, 2 * arriving))


def coarsest(precision: Precision) -> str | None:
    """The format of a policy that costs most; None where nothing is quantised."""
    policy = precision.policy
    formats = set() if policy is None else {policy.attention, policy.media, *(rule.format for rule in policy.rules)}
    return next((name for name in ("int4", "fp8", "int8") if name in formats), None)


def trace_limit(*, torch_error: float, peak: float) -> float:
    """Largest error of a generated token's log-probability, in nats: RULE, on absolute numbers.

    torch_error: PyTorch's largest error over the whole vocabulary at the trace's positions. peak: the largest logit or log-probability
    there in absolute value; the softmax adds its own rounding to that of the logits, so the floor counts twice.
    """
    if not math.isfinite(torch_error):
        return math.nan
    return RULE.factor * torch_error + 2 * RULE.floor_ulps * FP32_ULP * peak


def tie_margin(*, limit: float, steps: int) -> float:
    """Largest margin between two choices that log-probabilities within `limit` may turn round, after sums over `steps` tokens.

    Each of the two may move by `limit` a token; errors of different tokens are independent, so they add up in quadrature.
    """
    return 2.0 * limit * math.sqrt(max(1, steps))
