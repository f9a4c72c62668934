"""The vision encoder that a config names."""

from __future__ import annotations

from flamingo_reference.config import NFNetConfig, ViTConfig
from flamingo_reference.vision_nfnet import NFNet
from flamingo_reference.vision_vit import ViT

VisionEncoder = NFNet | ViT


def make_vision_encoder(config: NFNetConfig | ViTConfig) -> VisionEncoder:
    """pixels [F, 3, I, I] -> features [F, P, E]."""
    return ViT(config) if isinstance(config, ViTConfig) else NFNet(config)
