"""The contrastive encoder: pooled features and texts to embeddings of length 1 in one joint space (see contrastive_config.py).

Shape suffixes: F frames, E pooled width, B texts, S tokens of the longest text, W width, H heads, D head size, J joint width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import ModelConfig
from flamingo_reference.contrastive_config import ClassToken, ContrastiveConfig, Readout, TextConfig
from flamingo_reference.model.encoder_layer import EncoderLayer
from flamingo_reference.model.resampler import PerceiverResampler
from flamingo_reference.model.vision_vit import ViT
from flamingo_reference.names import pooled_width, readout_model

FIRST_SCALE = math.log(1 / 0.07)
"""Of an untrained model: CLIP, section 2.5."""


class TextLayer(EncoderLayer):
    """Attention among the tokens that the mask allows, then a feed-forward layer; both residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.post_norm = config.post_norm

    def forward(self, x_BSW: Tensor, mask_B1SS: Tensor) -> Tensor:
        if self.post_norm:
            x_BSW = self.attention_norm(x_BSW + self.attention(x_BSW, mask_B1SS))
            normed: Tensor = self.ffw_norm(x_BSW + self.feed_forward(x_BSW))
            return normed
        x_BSW = x_BSW + self.attention(self.attention_norm(x_BSW), mask_B1SS)
        return x_BSW + self.feed_forward(self.ffw_norm(x_BSW))


class TextTower(nn.Module):
    """token_ids int64 [B, S], lengths int64 [B] (tokens of each text, 1 at least; what follows them is padding) -> [B, J] of length 1."""

    def __init__(self, config: TextConfig, joint_width: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.embedding_norm = nn.LayerNorm(width, config.norm_eps) if config.embedding_norm else None
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width, config.norm_eps) if config.final_norm else None
        self.proj = nn.Linear(width, joint_width, bias=False)

    def forward(self, token_ids_BS: Tensor, lengths_B: Tensor) -> Tensor:
        places = torch.arange(token_ids_BS.shape[1], device=token_ids_BS.device)
        x_BSW = self.embedding(token_ids_BS) + self.position_embedding(places)
        if self.embedding_norm is not None:
            x_BSW = self.embedding_norm(x_BSW)
        real_BS = places < lengths_B[:, None]
        mask_B1SS = real_BS[:, None, None, :].expand(-1, 1, len(places), -1)
        if self.config.causal:
            mask_B1SS = mask_B1SS & (places <= places[:, None])
        for layer in self.layers:
            x_BSW = layer(x_BSW, mask_B1SS)
        if self.final_norm is not None:
            x_BSW = self.final_norm(x_BSW)
        return F.normalize(self.proj(self._pooled(x_BSW, lengths_B, real_BS)), dim=-1)

    def _pooled(self, x_BSW: Tensor, lengths_B: Tensor, real_BS: Tensor) -> Tensor:
        if self.config.pooling == "mean":
            return x_BSW.masked_fill(~real_BS[:, :, None], 0.0).sum(1) / lengths_B[:, None].to(x_BSW)
        places = torch.zeros_like(lengths_B) if self.config.pooling == "first" else lengths_B - 1
        return x_BSW[torch.arange(len(x_BSW), device=x_BSW.device), places]


class ImageTower(nn.Module):
    """pooled [F, E] -> [F, J] of length 1."""

    def __init__(self, config: ContrastiveConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, config.norm_eps) if config.image_norm else None
        self.proj = nn.Linear(width, config.joint_width, bias=False)

    def forward(self, pooled_FE: Tensor) -> Tensor:
        return F.normalize(self.proj(pooled_FE if self.norm is None else self.norm(pooled_FE)), dim=-1)


class Contrastive(nn.Module):
    """All that a contrastive encoder has beside the vision encoder. The likeness of an image and a text is the product of their
    embeddings, times exp(logit_scale) where probabilities are wanted."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        contrastive = config.contrastive
        assert contrastive is not None
        self.config = contrastive
        pooling = contrastive.pooling
        self.readout = PerceiverResampler(readout_model(config, pooling)) if isinstance(pooling, Readout) else None
        self.image = ImageTower(contrastive, pooled_width(config, contrastive))
        self.text: TextTower | None = None
        self.logit_scale: nn.Parameter | None = None
        if contrastive.text is not None:
            self.text = TextTower(contrastive.text, contrastive.joint_width)
            self.logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE))


def features_and_pooled(
    encoder: nn.Module, pixels_F3II: Tensor, config: ContrastiveConfig, readout: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """features [F, P, E] of a vision encoder, and `pooled`."""
    if isinstance(config.pooling, ClassToken):
        assert isinstance(encoder, ViT)
        tokens_FKE = encoder.tokens(pixels_F3II)
        return encoder.features_of(tokens_FKE), tokens_FKE[:, 0]
    features: Tensor = encoder(pixels_F3II)
    return features, pooled_of(features, readout)


def pooled_of(features_FPE: Tensor, readout: nn.Module | None) -> Tensor:
    """Pooled features where they follow from the features: read by `readout`, their mean where there is none."""
    if readout is None:
        return features_FPE.mean(1)
    latents: Tensor = readout(features_FPE[:, None])
    return latents.flatten(1)
