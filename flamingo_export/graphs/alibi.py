"""ALiBi as an additive attention mask: -slope * distance where the mask allows, MASKED elsewhere. All layers share it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flamingo_export.graphs.builder import GraphBuilder
from flamingo_export.graphs.relative_positions import MASKED
from flamingo_reference.config import AlibiPositions, LanguageModelConfig


def additive_mask(
    build: GraphBuilder, inputs: dict[str, ir.Value], lm: LanguageModelConfig, positions: AlibiPositions
) -> ir.Value:
    """float [B, H, S, C], from positions, key_positions and mask."""
    with build.scope("alibi"):
        here = build.op("Unsqueeze", inputs["positions"], build.constant([1, 3]), name="positions")
        there = build.op("Unsqueeze", inputs["key_positions"], build.constant([1, 2]), name="key_positions")
        closeness = build.op("Cast", build.op("Sub", there, here, name="closeness"), name="float", to=ir.DataType.FLOAT)
        slopes = np.array(positions.slopes(lm.num_heads), np.float32)[:, None, None]
        bias = build.op("Mul", closeness, build.constant(slopes, dtype=np.float32, name="slopes"), name="bias")
        masked = build.constant(MASKED, dtype=np.float32)
        return build.op("Where", inputs["mask"], bias, masked, name="mask")  # type: ignore[no-any-return]
