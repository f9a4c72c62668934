"""What CLIP's two transformers have in common: a layer of attention and a feed-forward layer, with biases.

Shape suffixes: N sequences, K tokens, E width, H heads, D head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import ViTConfig
from flamingo_reference.contrastive_config import TextConfig
from flamingo_reference.model.layers import feed_forward


class EncoderLayer(nn.Module):
    """The weights of one layer and its two halves; where the norms and the residual sums stand, a subclass says."""

    def __init__(self, config: ViTConfig | TextConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.attention_norm = nn.LayerNorm(width, config.norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.ffw_norm = nn.LayerNorm(width, config.norm_eps)
        self.ffw_up = nn.Linear(width, config.ffw_width)
        self.ffw_down = nn.Linear(config.ffw_width, width)

    def attention(self, x_NKE: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N, K, E] -> [N, K, E]. mask: bool [N, 1, K, K], true where a token is seen; None where all see all."""
        heads = (self.config.num_heads, self.config.head_size)
        q, k, v = (proj(x_NKE).unflatten(-1, heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        seen_NHKD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = self.out_proj(seen_NHKD.transpose(1, 2).flatten(2))
        return projected

    def feed_forward(self, x_NKE: Tensor) -> Tensor:
        """[N, K, E] -> [N, K, E]."""
        return feed_forward(x_NKE, self.config.activation, up=self.ffw_up, down=self.ffw_down, swish=None)
