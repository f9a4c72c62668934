"""The `vision_encoder` graph, of the encoder that the config names."""

from __future__ import annotations

import onnx_ir as ir

from flamingo_export.graphs import vision_nfnet, vision_tiled, vision_vit
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig, NFNetConfig, OwnVisionConfig, TiledViTConfig, ViTConfig


def vision_encoder(config: ModelConfig, index: WeightIndex) -> ir.Model:
    """pixels -> features, with aspect ratios where images are tiles (`specs`). Raises ValueError for an encoder that is traced instead."""
    if isinstance(config.vision, TiledViTConfig):
        return vision_tiled.vision_encoder(config, config.vision, index)
    if isinstance(config.vision, ViTConfig):
        return vision_vit.vision_encoder(config, config.vision, index)
    if isinstance(config.vision, OwnVisionConfig):
        raise ValueError("the vision encoder is not one of ours: its graph is traced from its module (vision_trace)")
    assert isinstance(config.vision, NFNetConfig)
    return vision_nfnet.vision_encoder(config, config.vision, index)
