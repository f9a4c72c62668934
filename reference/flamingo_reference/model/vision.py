"""The vision encoder that a config names."""

from __future__ import annotations

from torch import Tensor, nn

from flamingo_reference.config import OwnVisionConfig, TiledViTConfig, VisionConfig, ViTConfig
from flamingo_reference.model.vision_nfnet import NFNet
from flamingo_reference.model.vision_tiled import TiledViT
from flamingo_reference.model.vision_vit import ViT


class OwnVisionEncoder(nn.Module):
    """Stands in the model until an encoder of one's own is put in its place: `model.vision_encoder = mine`."""

    def __init__(self, config: OwnVisionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixels: Tensor) -> Tensor:
        """Raises RuntimeError."""
        raise RuntimeError("the model's config says that its vision encoder is your own. Set it: model.vision_encoder = MODULE")


VisionEncoder = NFNet | ViT | TiledViT | OwnVisionEncoder


def make_vision_encoder(config: VisionConfig) -> VisionEncoder:
    """pixels [F, 3, I, I] -> features [F, P, E]; of tiles: pixels [F, Tmax, 3, I, I], aspect_ratio_ids [F] -> features [F, Tmax, P, E]."""
    if isinstance(config, TiledViTConfig):
        return TiledViT(config)
    if isinstance(config, OwnVisionConfig):
        return OwnVisionEncoder(config)
    return ViT(config) if isinstance(config, ViTConfig) else NFNet(config)
