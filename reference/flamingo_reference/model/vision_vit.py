"""CLIP's vision transformer (Radford et al. 2021, arXiv 2103.00020), without its projection: pixels to features of patches.

Shape suffixes: F frames, I image side, G patches of the grid, K = G + 1 tokens, P features, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flamingo_reference.config import ViTConfig
from flamingo_reference.model.encoder_layer import EncoderLayer


class ViTLayer(EncoderLayer):
    """Attention among all tokens, then a feed-forward layer; both residual, pre-norm."""

    def forward(self, x_FKE: Tensor) -> Tensor:
        x_FKE = x_FKE + self.attention(self.attention_norm(x_FKE))
        return x_FKE + self.feed_forward(self.ffw_norm(x_FKE))


class ViT(nn.Module):
    """pixels [F, 3, I, I] -> features [F, P, E]: the class token first where it is kept, then rows of the grid."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.grid_size + 1, config.width)
        self.pre_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width, config.norm_eps) if config.final_norm else None

    def forward(self, pixels_F3II: Tensor) -> Tensor:
        return self.features_of(self.tokens(pixels_F3II))

    def tokens(self, pixels_F3II: Tensor) -> Tensor:
        """The class token and the patches [F, K, E] as they leave the last layer."""
        patches_FGE = self.patch_embedding(pixels_F3II).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches_FGE), 1, -1)
        places = torch.arange(self.config.grid_size + 1, device=pixels_F3II.device)
        x_FKE = self.pre_norm(torch.cat([first, patches_FGE], dim=1) + self.position_embedding(places))
        for layer in self.layers:
            x_FKE = layer(x_FKE)
        last: Tensor = x_FKE
        return last

    def features_of(self, x_FKE: Tensor) -> Tensor:
        """Features [F, P, E] from `tokens`."""
        features: Tensor = x_FKE if self.final_norm is None else self.final_norm(x_FKE)
        return features if self.config.class_token else features[:, 1:]
