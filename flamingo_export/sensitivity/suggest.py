"""Matrices whose error stands out, and the policy that keeps them in more bits."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Literal

import msgspec

from flamingo_export.precision import Policy, Precision, QuantisedType, Rule
from flamingo_export.quantize.policies import policy_text
from flamingo_export.sensitivity.findings import MatrixError, Sensitivity
from flamingo_export.weights import bundle_weights, stored_bytes
from flamingo_reference.config import ModelConfig

STANDS_OUT = 2.0
"""Times the median error of all that is quantised to the same format. One more bit halves an error, so this is a bit's worth."""
_BLOCK = 128
_MEDIA = "media_kv/"
"""What the names of media's keys and values begin with; other operands are those of self-attention."""


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """matrices: what stands out, worst first. text: a policy file that keeps them in more bits. extra_bytes: what that adds to a bundle of
    weight_bytes."""

    matrices: tuple[str, ...]
    text: str
    extra_bytes: int
    weight_bytes: int


def suggest(found: Sensitivity) -> Suggestion | None:
    """What to keep in more bits; None where no error stands out (is more than STANDS_OUT times the median of its kind and format)."""
    chosen = [each for each in found.matrices if each.error > STANDS_OUT * _median(found, each)]
    policy = found.precision.policy
    if not chosen or policy is None:
        return None
    rules = [_kept(each, policy) for each in chosen if each.kind == "matrix"]
    operands = [each.name for each in chosen if each.kind == "operand"]
    media: Literal["storage"] | None = "storage" if any(name.startswith(_MEDIA) for name in operands) else None
    attention: Literal["storage"] | None = "storage" if not all(name.startswith(_MEDIA) for name in operands) else None
    changed = msgspec.structs.replace(
        policy, rules=(*policy.rules, *rules), attention=attention or policy.attention, media=media or policy.media
    )
    before = _sizes(found.config, found.precision)
    after = _sizes(found.config, msgspec.structs.replace(found.precision, policy=changed))
    return Suggestion(
        matrices=tuple(each.name for each in chosen),
        text=policy_text(policy, rules, attention=attention, media=media),
        extra_bytes=sum(after.values()) - sum(before.values()),
        weight_bytes=sum(before.values()),
    )


def kept_format(element: QuantisedType) -> Literal["storage", "int8"]:
    """The next format with more bits. fp8 has none among the quantised: a GPU computes it, and int8 in blocks is for CPUs."""
    return "int8" if element == "int4" else "storage"


def extra_bytes(config: ModelConfig, precision: Precision) -> dict[str, int]:
    """What each quantised matrix takes more of a bundle when it is kept in the next format."""
    policy = precision.policy
    if policy is None:
        return {}
    elements = {weight.name: weight.quantisation(precision) for weight in bundle_weights(config, precision)}
    rules = [_rule(name, how.element, policy) for name, how in elements.items() if how is not None]
    kept = msgspec.structs.replace(policy, rules=(*policy.rules, *rules))
    before, after = _sizes(config, precision), _sizes(config, msgspec.structs.replace(precision, policy=kept))
    return {rule.weights: after.get(rule.weights, 0) - before[rule.weights] for rule in rules}


def _median(found: Sensitivity, one: MatrixError) -> float:
    return statistics.median(each.error for each in _alike(found.matrices, one))


def _alike(matrices: Iterable[MatrixError], one: MatrixError) -> Iterable[MatrixError]:
    return (each for each in matrices if (each.kind, each.element) == (one.kind, one.element))


def _kept(matrix: MatrixError, policy: Policy) -> Rule:
    reason = f"adds an error of {100 * matrix.error:.2g} % to {matrix.layer} in {matrix.element}"
    return msgspec.structs.replace(_rule(matrix.name, matrix.element, policy), reason=reason)


def _rule(name: str, element: QuantisedType, policy: Policy) -> Rule:
    keep, rule = kept_format(element), policy.rule(name)
    block = (rule.block if rule is not None else 0) or _BLOCK
    return Rule(weights=name, format=keep, block=block if keep == "int8" else 0)


def _sizes(config: ModelConfig, precision: Precision) -> dict[str, int]:
    return {weight.name: stored_bytes(weight, precision) for weight in bundle_weights(config, precision)}
