"""How far an engine may be from the reference: one table, each row with its reason.

Error of a tensor: the largest absolute difference from the fp64 reference, over the root mean square of the reference. Errors of a
whole tensor are compared, not of single numbers: a number near zero has no relative error of its own, it inherits that of the sums it
came from, whose size the rms tells.

Rule: the engine's error may be twice that of PyTorch in the same dtype (weights rounded to the bundle's storage, computed in fp32) on
the same input, plus a floor of a few ulps of the tensor's largest number. For logits, PyTorch's error is the largest over all cases of
the decoder: it is one computation, and a case of few numbers does not find its largest error by itself.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import msgspec

from flamingo_export.precision import StorageType

FP32_ULP = 2.0**-23


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """`factor` times PyTorch's error, plus `floor_ulps` ulps (fp32) of the reference's largest absolute value."""

    factor: float
    floor_ulps: float
    reason: str

    def limit(self, *, torch_error: float, peak: float) -> float:
        """The largest error that passes. `peak` is max(abs(reference)) / rms(reference). NaN if PyTorch's own error is not finite."""
        if not math.isfinite(torch_error):
            return math.nan
        return self.factor * torch_error + self.floor_ulps * FP32_ULP * peak


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

TABLE = MappingProxyType(
    {
        "vision_encoder": RULE,
        "vision_encoder, 16-bit storage": INDEPENDENT_ROUNDING,
        "resampler": RULE,
        "media_kv": RULE,
        "decoder": RULE,
        "layer": RULE,
    }
)
"""What is compared -> its tolerance. A kind without a row of its own for 16-bit storage has the same in all types."""


def tolerance(kind: str, storage: StorageType = "fp32") -> Tolerance:
    """The row of TABLE for `kind`. Raises KeyError: a comparison without a row is a fault of the caller, not a default."""
    narrow = f"{kind}, 16-bit storage"
    return TABLE[narrow] if storage != "fp32" and narrow in TABLE else TABLE[kind]


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
