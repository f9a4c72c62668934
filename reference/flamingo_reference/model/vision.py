"""The vision encoder that a config names."""

from __future__ import annotations

from torch import Tensor, nn

from flamingo_reference.config import OwnVisionConfig, VisionConfig, ViTConfig
from flamingo_reference.model.vision_nfnet import NFNet
from flamingo_reference.model.vision_vit import ViT


class OwnVisionEncoder(nn.Module):
    """Stands in the model until an encoder of one's own is put in its place: `model.vision_encoder = mine`."""

    def __init__(self, config: OwnVisionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixels: Tensor) -> Tensor:
        """Raises RuntimeError."""
        raise RuntimeError("the model's config says that its vision encoder is your own. Set it: model.vision_encoder = MODULE")


VisionEncoder = NFNet | ViT | OwnVisionEncoder


def make_vision_encoder(config: VisionConfig) -> VisionEncoder:
    """pixels [F, 3, I, I] -> features [F, P, E]."""
    if isinstance(config, OwnVisionConfig):
        return OwnVisionEncoder(config)
    return ViT(config) if isinstance(config, ViTConfig) else NFNet(config)
