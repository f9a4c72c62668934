"""The `vision_encoder` graph, of the encoder that the config names."""

from __future__ import annotations

import onnx_ir as ir

from flamingo_export.graphs import vision_nfnet, vision_vit
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig, ViTConfig


def vision_encoder(config: ModelConfig, index: WeightIndex) -> ir.Model:
    """pixels [F, 3, I, I] -> features [F, P, E]."""
    if isinstance(config.vision, ViTConfig):
        return vision_vit.vision_encoder(config, config.vision, index)
    return vision_nfnet.vision_encoder(config, config.vision, index)
