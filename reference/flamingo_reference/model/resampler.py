"""Perceiver Resampler: features of one medium, however many frames, to a fixed number of latents.

Flamingo (arXiv 2204.14198), section 3.1 and appendix A.1. Shape suffixes: N media, T frames, P patches, E feature width,
R latents, W width, L = T * P + R keys, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import ModelConfig, ResamplerConfig
from flamingo_reference.model.layers import feed_forward


class ResamplerLayer(nn.Module):
    """Latents attend to media and latents, then a feed-forward layer; both residual, pre-norm."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.config = config
        self.media_norm = nn.LayerNorm(config.width)
        self.latent_norm = nn.LayerNorm(config.width)
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, inner, bias=False)
        self.v_proj = nn.Linear(config.width, inner, bias=False)
        self.q_norm = nn.LayerNorm(config.head_size) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(config.head_size) if config.qk_norm else None
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        self.ffw_norm = nn.LayerNorm(config.width)
        self.ffw_up = nn.Linear(config.width, config.ffw_width, bias=False)
        self.ffw_down = nn.Linear(config.ffw_width, config.width, bias=False)

    def _heads(self, x_NLI: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        x_NLHD = x_NLI.unflatten(-1, (self.config.num_heads, self.config.head_size))
        x_NHLD: Tensor = (x_NLHD if norm is None else norm(x_NLHD)).transpose(1, 2)
        return x_NHLD

    def forward(self, latents_NRW: Tensor, media_NTPxW: Tensor) -> Tensor:
        latents = self.latent_norm(latents_NRW)
        keys_NLW = torch.cat([self.media_norm(media_NTPxW), latents], dim=1)
        q_NHRD = self._heads(self.q_proj(latents), self.q_norm)
        k_NHLD = self._heads(self.k_proj(keys_NLW), self.k_norm)
        v_NHLD = self._heads(self.v_proj(keys_NLW))
        attended = F.scaled_dot_product_attention(q_NHRD, k_NHLD, v_NHLD)
        latents_NRW = latents_NRW + self.out_proj(attended.transpose(1, 2).flatten(2))
        normed = self.ffw_norm(latents_NRW)
        return latents_NRW + feed_forward(normed, self.config.activation, up=self.ffw_up, down=self.ffw_down, swish=None)


class MediaProjector(nn.Module):
    """features [N, 1, P, E] -> latents [N, P, W]: a projector in the resampler's place (Llama 3.2 Vision)."""

    time_embeddings = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(config.vision.feature_width, config.resampler.width)

    def forward(self, features_NTPE: Tensor, time_weights_T8: Tensor | None = None) -> Tensor:
        """Raises ValueError for more than one frame."""
        if features_NTPE.shape[1] != 1:
            raise ValueError(f"a medium has {features_NTPE.shape[1]} frames; a projector takes one")
        latents_NPW: Tensor = self.input_proj(features_NTPE[:, 0])
        return latents_NPW


class PerceiverResampler(nn.Module):
    """features [N, T, P, E], time_weights [T, 8] (None where there are no time embeddings) -> latents [N, R, W]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        resampler = config.resampler
        self.input_proj = nn.Linear(config.vision.feature_width, resampler.width, bias=False) if resampler.input_proj else None
        self.latents = nn.Parameter(torch.randn(resampler.num_latents, resampler.width))
        self.time_embeddings = (
            nn.Parameter(torch.randn(resampler.num_time_embeddings, resampler.width)) if resampler.num_time_embeddings else None
        )
        self.layers = nn.ModuleList(ResamplerLayer(resampler) for _ in range(resampler.num_layers))
        self.norm = nn.LayerNorm(resampler.width)

    def forward(self, features_NTPE: Tensor, time_weights_T8: Tensor | None = None) -> Tensor:
        media = features_NTPE if self.input_proj is None else self.input_proj(features_NTPE)
        if self.time_embeddings is not None:
            if time_weights_T8 is None:
                raise ValueError("time_weights [T, 8] are missing: the resampler has time embeddings")
            media = media + (time_weights_T8 @ self.time_embeddings)[:, None, :]
        media = media.flatten(1, 2)
        latents = self.latents.expand(media.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, media)
        normed: Tensor = self.norm(latents)
        return normed


Resampler = PerceiverResampler | MediaProjector


def make_resampler(config: ModelConfig) -> Resampler:
    """What the config names between vision encoder and gated blocks."""
    return MediaProjector(config) if config.resampler.kind == "projector" else PerceiverResampler(config)
