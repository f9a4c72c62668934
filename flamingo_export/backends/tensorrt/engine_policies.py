"""Which policies engines can follow."""

from __future__ import annotations

from collections.abc import Collection

from flamingo_export.errors import BuildError
from flamingo_export.precision import Policy

WITHOUT_FP8 = ("sm75", "sm80", "sm86", "sm87")
"""Targets whose tensor cores have no FP8."""


def check_policy(policy: Policy, backend: str, native_functions: Collection[str], target: str | None) -> None:
    """Raises BuildError if engines of the backend for the target cannot compute what the policy says, with the nearest that they can.

    native_functions: those that a plugin computes.
    """
    if policy.media == "fp8" and not native_functions:
        raise BuildError(
            f"policy {policy.name!r} keeps media in FP8, which TensorRT reads only in a plugin, and {backend} runs without one. The nearest "
            'that it has: the same policy with media = "storage"; or --backend tensorrt, with the plugin.'
        )
    if policy.needs_ranges and target in WITHOUT_FP8:
        raise BuildError(
            f"policy {policy.name!r} computes products in FP8, which {target} has no units for (from sm89 on there are). The nearest that it "
            "has: --int8 or --int4 (weights only), or --precision bf16."
        )
