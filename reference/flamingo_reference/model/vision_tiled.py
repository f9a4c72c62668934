"""Llama 3.2 Vision's transformer over the tiles of an image: pixels to features of several layers side by side.

Every image fills Tmax places of tiles; what it does not fill is padding (`TiledViTConfig`). Sources: Meta's `llama-models` (multimodal
model, `VisionEncoder`) and transformers' `modeling_mllama.py`, which takes the outputs of the layers whose inputs Meta takes.
Shape suffixes: F images, T places of tiles, I tile side, G patches of the grid, P = G + 1 features of a tile, L = T * padded tokens of
a tile, E width, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import TiledViTConfig
from flamingo_reference.model.layers import feed_forward


class TiledViTLayer(nn.Module):
    """Attention among the tokens of all tiles, then a feed-forward layer; both residual, pre-norm, behind tanh gates where gated."""

    def __init__(self, config: TiledViTConfig, *, gated: bool) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.attention_norm = nn.LayerNorm(width, config.norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.ffw_norm = nn.LayerNorm(width, config.norm_eps)
        self.ffw_up = nn.Linear(width, config.ffw_width)
        self.ffw_down = nn.Linear(config.ffw_width, width)
        self.attention_gate = nn.Parameter(torch.zeros(())) if gated else None
        self.ffw_gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(self, x_FLE: Tensor, real_FL: Tensor) -> Tensor:
        """real: which tokens are not padding."""
        normed = self.attention_norm(x_FLE)
        heads = (self.config.num_heads, self.config.head_size)
        q, k, v = (proj(normed).unflatten(-1, heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mask_F1LL = (real_FL[:, :, None] | real_FL[:, None, :])[:, None]
        seen_FHLD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_F1LL)
        seen = self.out_proj(seen_FHLD.transpose(1, 2).flatten(2))
        x_FLE = x_FLE + (seen if self.attention_gate is None else torch.tanh(self.attention_gate) * seen)
        normed = self.ffw_norm(x_FLE)
        down = feed_forward(normed, self.config.activation, up=self.ffw_up, down=self.ffw_down, swish=None)
        return x_FLE + (down if self.ffw_gate is None else torch.tanh(self.ffw_gate) * down)


class TiledViT(nn.Module):
    """pixels [F, T, 3, I, I], aspect_ratio_ids [F] -> features [F, T, P, E]: of each tile the class token, then rows of its grid; of each
    feature the final state, then the inputs of `feature_layers`. Features of padding tiles mean nothing."""

    def __init__(self, config: TiledViTConfig) -> None:
        super().__init__()
        width, ids = config.width, len(config.aspect_ratios) + 1
        self.config = config
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches, width)
        self.tile_position_embedding = nn.Embedding(ids, config.max_tiles * config.num_patches * width)
        self.position_gate = nn.Parameter(torch.zeros(()))
        self.pre_tile_embedding = nn.Embedding(ids, config.max_tiles * width)
        self.pre_tile_gate = nn.Parameter(torch.zeros(()))
        self.pre_norm = nn.LayerNorm(width, config.norm_eps)
        self.post_tile_embedding = nn.Embedding(ids, config.max_tiles * width)
        self.post_tile_gate = nn.Parameter(torch.zeros(()))
        self.post_norm = nn.LayerNorm(width, config.norm_eps)
        self.layers = nn.ModuleList(TiledViTLayer(config, gated=False) for _ in range(config.num_layers))
        self.global_layers = nn.ModuleList(TiledViTLayer(config, gated=True) for _ in range(config.num_global_layers))

    def embed(self, pixels_FT3II: Tensor, aspect_ratio_ids_F: Tensor) -> Tensor:
        """What enters the first layer, before padding: [F, T, P, E]."""
        config = self.config
        tiles = (config.max_tiles, config.num_patches)
        patches = self.patch_embedding(pixels_FT3II.flatten(0, 1)).flatten(2).transpose(1, 2)
        patches_FTGE = patches.unflatten(0, (-1, config.max_tiles))
        patches_FTGE = patches_FTGE + self._tile(self.pre_tile_embedding, self.pre_tile_gate, aspect_ratio_ids_F)
        first = self.class_embedding.expand(*patches_FTGE.shape[:2], 1, -1)
        gate = torch.tanh(self.position_gate)
        own = self.tile_position_embedding(aspect_ratio_ids_F).unflatten(-1, (*tiles, config.width))
        x_FTPE = (
            torch.cat([first, patches_FTGE], dim=2) + (1 - gate) * self.position_embedding.weight.to(own.dtype) + gate * own
        )
        normed: Tensor = self.pre_norm(x_FTPE)
        return normed

    def real_tokens(self, aspect_ratio_ids_F: Tensor) -> Tensor:
        """Which tokens of the padded tiles are not padding: bool [F, L]."""
        config = self.config
        counts = torch.tensor(
            [config.num_tiles(i) for i in range(len(config.aspect_ratios) + 1)], device=aspect_ratio_ids_F.device
        )
        places = torch.arange(config.max_tiles, device=aspect_ratio_ids_F.device)
        tiles_FT = places < counts[aspect_ratio_ids_F][:, None]
        tokens_K = torch.arange(config.padded_patches, device=aspect_ratio_ids_F.device) < config.num_patches
        return (tiles_FT[:, :, None] & tokens_K).flatten(1)

    def forward(self, pixels_FT3II: Tensor, aspect_ratio_ids_F: Tensor) -> Tensor:
        config = self.config
        tiles = (config.max_tiles, config.padded_patches)
        x_FTPE = self.embed(pixels_FT3II, aspect_ratio_ids_F)
        x_FLE = F.pad(x_FTPE, (0, 0, 0, config.padded_patches - config.num_patches)).flatten(1, 2)
        real_FL = self.real_tokens(aspect_ratio_ids_F)
        kept = {}
        for index, layer in enumerate(self.layers):
            if index in config.feature_layers:
                kept[index] = x_FLE
            x_FLE = layer(x_FLE, real_FL)
        post = self._tile(self.post_tile_embedding, self.post_tile_gate, aspect_ratio_ids_F)
        x_FLE = (self.post_norm(x_FLE).unflatten(1, tiles) + post).flatten(1, 2)
        for layer in self.global_layers:
            x_FLE = layer(x_FLE, real_FL)
        features = torch.cat([x_FLE, *(kept[index] for index in config.feature_layers)], dim=-1)
        unpadded: Tensor = features.unflatten(1, tiles)[:, :, : config.num_patches]
        return unpadded

    def _tile(self, embedding: nn.Embedding, gate: Tensor, aspect_ratio_ids_F: Tensor) -> Tensor:
        """A tile's own embedding behind its gate: [F, T, 1, E]."""
        own: Tensor = embedding(aspect_ratio_ids_F).unflatten(-1, (self.config.max_tiles, 1, self.config.width))
        gated: Tensor = torch.tanh(gate) * own
        return gated
