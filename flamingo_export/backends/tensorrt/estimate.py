"""Memory and time that an engine takes to build, before it starts: what cannot fit is refused instead of being killed half way."""

from __future__ import annotations

from collections.abc import Mapping

from flamingo_export.backends.compiler import Estimate
from flamingo_export.bundle.manifest import GraphRecord
from flamingo_export.errors import BuildError
from flamingo_export.estimates import BUILD_RATIO, GIB, engine_building, engine_weights, rounded_apart
from flamingo_export.weights.decoder_cuts import fewest_parts, graph_bytes
from flamingo_reference.config import ModelConfig

# Seconds of one core for a gigabyte of weights, and for an engine however small.
SECONDS_PER_GB = 20.0
SECONDS_BASE = 5.0


def estimate(weights: int) -> Estimate:
    """From the bytes of the weights that a graph reads."""
    return Estimate(
        weight_bytes=weights,
        memory=engine_building(weights),
        seconds=SECONDS_BASE + SECONDS_PER_GB * weights / 1e9,
    )


def check_memory(config: ModelConfig, graph: GraphRecord, sizes: Mapping[str, int], available: int) -> Estimate:
    """What the build of a graph's engine will take. sizes: bytes of each of the bundle's weights by name.

    Raises BuildError if it would need more than `available` bytes; of the decoder it says into how many parts it would fit.
    """
    needed = estimate(graph_bytes(config, sizes, graph))
    if needed.memory <= available:
        return needed
    advice = ""
    if graph.layers is not None:
        parts = fewest_parts(config, sizes, engine_weights(available))
        advice = (
            "Even parts of one LM layer would not fit. "
            if parts is None
            else f"In {parts} parts it fits: --parts {parts}. Or: "
        )
    wanted, there = rounded_apart(needed.memory, available)
    raise BuildError(
        f"building the engine of {graph.name} takes about {wanted} of memory ({BUILD_RATIO} times its "
        f"{needed.weight_bytes / GIB:.1f} GiB of weights), {there} are available. {advice}Free some, build on a machine "
        "with more (TensorRT for RTX needs no GPU for it: copy the bundle back), or store weights in fewer bits (--storage)."
    )
