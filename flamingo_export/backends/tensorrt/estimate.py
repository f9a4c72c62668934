"""Memory and time that an engine takes to build, before it starts: what cannot fit is refused instead of being killed half way."""

from __future__ import annotations

import msgspec

from flamingo_export.errors import BuildError
from flamingo_export.lowering.lint import Expected

GIB = 1 << 30
# Peak memory of a streamed build over the bytes of its weights, and what any build takes: measured with benchmarks/engine_build_memory.py.
MEMORY_RATIO = 2.7
MEMORY_BASE = GIB
# Seconds of one core for a gigabyte of weights, and for an engine however small.
SECONDS_PER_GB = 20.0
SECONDS_BASE = 5.0


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a build will take, in bytes and seconds."""

    weight_bytes: int
    memory: int
    seconds: float


def estimate(expected: Expected) -> Estimate:
    """From the weights that a graph reads."""
    weights = sum(tensor.nbytes for tensor in expected.weights.values())
    return Estimate(
        weight_bytes=weights,
        memory=int(weights * MEMORY_RATIO) + MEMORY_BASE,
        seconds=SECONDS_BASE + SECONDS_PER_GB * weights / 1e9,
    )


def available_memory() -> int:
    """Bytes that programs can take without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def check_memory(name: str, needed: Estimate, available: int) -> None:
    """Raises BuildError if the build of `name` would need more than is available."""
    if needed.memory > available:
        raise BuildError(
            f"building the engine of {name} takes about {needed.memory / GIB:.1f} GiB of memory ({MEMORY_RATIO} times its "
            f"{needed.weight_bytes / GIB:.1f} GiB of weights), {available / GIB:.1f} GiB are available. Free some, build on a machine with "
            "more (TensorRT for RTX needs no GPU for it: copy the bundle back), store weights in 16 bits (--precision bf16), or cut the "
            "decoder into parts (graphs.build_graph with layers=...)."
        )
