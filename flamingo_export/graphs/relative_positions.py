"""Transformer-XL's relative positions as an additive attention mask.

    q + position_bias [B,H,S,D]       table of projected distances [H,D,blocks,128]
            |                                      |
            |                                   Reshape
             \\______________ MatMul ________________/  [H,D,X]
                                |  scores of every distance of the table [B,H,S,X]
                          GatherElements (distance of each slot)
                                |  [B,H,S,C]
                               Add (0 where the mask allows, MASKED elsewhere)
                                |
                       mask of the layer's Attention

Distances and the additive mask are the same in all layers and are worked out once (`shared`). A table has all distances that the model knows,
and a step must not read more of them than the cache reaches: a backend gives the graph the table's beginning instead (it is an input that the
stored weight is the default of), or cuts it when compiling. No distance is looked up beyond the blocks of 128 that the capacity reaches.
To gather that beginning in the graph copied it at each step, which took longer than the product. Looking scores up with GatherElements took
half the time of a flat Gather.
"""

from __future__ import annotations

import msgspec
import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder
from flamingo_export.weights import DISTANCE_BLOCK, distance_blocks
from flamingo_reference.config import LanguageModelConfig

# Added to a masked slot's score: exp underflows to exactly zero in fp32 and fp16 alike, and unlike -inf it cannot make a NaN.
MASKED = -30000.0


class Shared(msgspec.Struct, frozen=True):
    """Values that every layer uses."""

    distance: ir.Value
    """int32 [B, H, S, C]: distance from each position to each slot, clamped to those of the tables."""
    mask: ir.Value
    """float [B, 1, S, C]: 0 where the mask allows, MASKED elsewhere."""


def shared(build: GraphBuilder, inputs: dict[str, ir.Value], lm: LanguageModelConfig) -> Shared:
    """What does not depend on the layer, from positions, key_positions and mask."""
    integer = build.constant
    with build.scope("distance"):
        capacity = build.op("Shape", inputs["key_positions"], name="cache")
        capacity = build.op("Gather", capacity, integer(1), name="capacity", axis=0)
        count = build.op("Add", capacity, integer(DISTANCE_BLOCK - 1), name="round_up")
        count = build.op("Div", count, integer(DISTANCE_BLOCK), name="blocks_of_capacity")
        count = build.op("Min", count, integer(distance_blocks(lm.max_positions)), name="num_blocks")
        # A slot in use is never farther away than the cache is long: what lies beyond these blocks is masked anyway.
        last = build.op("Mul", count, integer(DISTANCE_BLOCK), name="num_distances")
        last = build.op("Sub", last, integer(1), name="last")
        here = build.op("Unsqueeze", inputs["positions"], integer([1, 3]), name="positions")
        there = build.op("Unsqueeze", inputs["key_positions"], integer([1, 2]), name="key_positions")
        distance = build.op("Sub", here, there, name="distance")
        distance = build.op("Max", build.op("Min", distance, last, name="at_most"), integer(0), name="at_least")
        distance = build.op("Cast", distance, name="int32", to=ir.DataType.INT32)  # half of what every layer's lookup reads
        distance = build.op("Expand", distance, integer([1, lm.num_heads, 1, 1]), name="heads")
    allowed, masked = (build.constant(value, dtype=np.float32) for value in (0.0, MASKED))
    return Shared(distance, build.op("Where", inputs["mask"], allowed, masked, name="mask"))


def additive_mask(build: GraphBuilder, weights: str, q: ir.Value, shared: Shared) -> ir.Value:
    """Scores of the distances, MASKED where the mask forbids: float [B, H, S, C]. The table holds the 1/sqrt(D) already."""
    with build.scope("position_bias"):
        query = build.op("Add", q, build.weight(f"{weights}/position_bias"), name="query")
        table = build.replaceable(f"{weights}/distances", axis=2, size="distance_blocks")
        table = build.widened(table, f"{weights}/distances", name="fp32")
        table = build.reshape(table, [0, 0, -1], name="table")
        scores = build.op("MatMul", query, table, name="scores")
        scores = build.op("GatherElements", scores, shared.distance, name="by_distance", axis=3)
        added: ir.Value = build.op("Add", scores, shared.mask, name="mask")
        return added
