"""The frozen language model: Chinchilla-style decoder with Transformer-XL relative positions.

Hoffmann et al. 2022 (RMSNorm, GELU, tied output), Dai et al. 2019 (relative positions). Shape suffixes: B requests, S positions in
this call, C keys (cache capacity, or S), W width, H heads, D head size, X distances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import LanguageModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def sinusoids(num_distances: int, width: int, like: Tensor) -> Tensor:
    """Transformer-XL's encoding of distances 0, 1, ... [X, W]: sines in the first half, cosines in the second.

    Computed in float64 and returned in the dtype of `like`.
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width)
    angle = torch.arange(num_distances, dtype=torch.float64, device=like.device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


class LanguageModelLayer(nn.Module):
    """One decoder layer; `attend` and `forward_cached` are two ways to the same numbers."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.config = config
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, inner, bias=False)
        self.v_proj = nn.Linear(config.width, inner, bias=False)
        self.relative_proj = nn.Linear(config.width, inner, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(config.num_heads, config.head_size))
        self.position_bias = nn.Parameter(torch.zeros(config.num_heads, config.head_size))
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        self.ffw_norm = RMSNorm(config.width, config.norm_eps)
        self.ffw_up = nn.Linear(config.width, config.ffw_width, bias=False)
        self.ffw_down = nn.Linear(config.ffw_width, config.width, bias=False)

    def qkv(self, hidden_BSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, S, D] of these positions."""
        normed = self.attention_norm(hidden_BSW)
        heads = (self.config.num_heads, self.config.head_size)
        q, k, v = (proj(normed).unflatten(-1, heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def distance_table(self, num_distances: int) -> Tensor:
        """Projected distances 0 .. num_distances - 1, at most max_positions of them: [X, H, D]."""
        known = min(num_distances, self.config.max_positions)
        table_XI: Tensor = self.relative_proj(sinusoids(known, self.config.width, self.relative_proj.weight))
        return table_XI.reshape(known, self.config.num_heads, self.config.head_size)

    def position_scores(self, q_BHSD: Tensor, table_XHD: Tensor) -> Tensor:
        """(q + position_bias) . projected distance: [B, H, S, X], not scaled."""
        return torch.einsum("bhsd,xhd->bhsx", q_BHSD + self.position_bias[:, None, :], table_XHD)

    def attend(self, q_BHSD: Tensor, k_BHCD: Tensor, v_BHCD: Tensor, position_BHSC: Tensor, mask_BqSC: Tensor) -> Tensor:
        """Attention output [B, S, W]; rows that may see nothing are zero."""
        content_BHSC = (q_BHSD + self.content_bias[:, None, :]) @ k_BHCD.transpose(-1, -2)
        scores = (content_BHSC + position_BHSC) * self.config.head_size**-0.5
        scores = scores.masked_fill(~mask_BqSC, float("-inf"))
        probs = scores.softmax(dim=-1).masked_fill(~mask_BqSC, 0.0)
        projected: Tensor = self.out_proj((probs @ v_BHCD).transpose(1, 2).flatten(2))
        return projected

    def feed_forward(self, hidden_BSW: Tensor) -> Tensor:
        """hidden + ffw(hidden)."""
        down: Tensor = self.ffw_down(F.gelu(self.ffw_up(self.ffw_norm(hidden_BSW))))
        return hidden_BSW + down

    def forward(self, hidden_BSW: Tensor) -> Tensor:
        """Whole sequences from position 0, each position seeing itself and those before."""
        q, k, v = self.qkv(hidden_BSW)
        length = hidden_BSW.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden_BSW.device).tril()[None, None]
        position = shift_by_distance(self.position_scores(q, self.distance_table(length)), length)
        hidden_BSW = hidden_BSW + self.attend(q, k, v, position, causal)
        return self.feed_forward(hidden_BSW)

    def forward_cached(
        self,
        hidden_BSW: Tensor,
        *,
        past_k: Tensor,
        past_v: Tensor,
        write_index_B: Tensor,
        distance_BSC: Tensor,
        mask_B1SC: Tensor,
        table_XHD: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """These positions against a cache [B, H, C, D] into which they are first written at write_index.

        table_XHD: `distance_table` worked out before, where weights no longer change. in_place: the cache given is written to.
        Returns hidden [B, S, W] and the updated cache.
        """
        q, k, v = self.qkv(hidden_BSW)
        present_k = scatter_rows(past_k, k, write_index_B, in_place=in_place)
        present_v = scatter_rows(past_v, v, write_index_B, in_place=in_place)
        if table_XHD is None:
            table_XHD = self.distance_table(max(0, int(distance_BSC.max())) + 1)
        distance_BSC = distance_BSC.clamp(0, table_XHD.shape[0] - 1)
        index = distance_BSC[:, None].expand(-1, self.config.num_heads, -1, -1)
        position_BHSC = self.position_scores(q, table_XHD).gather(-1, index)
        hidden_BSW = hidden_BSW + self.attend(q, present_k, present_v, position_BHSC, mask_B1SC)
        return self.feed_forward(hidden_BSW), present_k, present_v


def shift_by_distance(scores_BHSX: Tensor, length: int) -> Tensor:
    """[..., i, distance] -> [..., i, j] with distance = i - j for j <= i; entries above the diagonal mean nothing.

    Dai et al. 2019, appendix B: one padded column and a reshape move row i by i, which is much faster to train through than a gather.
    """
    known = scores_BHSX.shape[-1]
    if known < length:  # distances beyond the table read its last entry
        last = scores_BHSX[..., -1:].expand(*scores_BHSX.shape[:-1], length - known)
        scores_BHSX = torch.cat([scores_BHSX, last], dim=-1)
    padded = F.pad(scores_BHSX.flip(-1), (1, 0))
    batch, heads = padded.shape[:2]
    return padded.reshape(batch, heads, length + 1, length)[:, :, 1:]


def scatter_rows(cache_BHCD: Tensor, new_BHSD: Tensor, write_index_B: Tensor, *, in_place: bool = False) -> Tensor:
    """The cache, or a copy of it, with slots write_index .. write_index + S - 1 of each request replaced."""
    slots_BS = write_index_B[:, None] + torch.arange(new_BHSD.shape[2], device=cache_BHCD.device)
    index = slots_BS[:, None, :, None].expand_as(new_BHSD)
    return cache_BHCD.scatter_(2, index, new_BHSD) if in_place else cache_BHCD.scatter(2, index, new_BHSD)


class LanguageModel(nn.Module):
    """token ids [B, S] -> logits [B, S, V]; the text-only model that Flamingo freezes."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(LanguageModelLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02), the projections back into the residual stream smaller by sqrt(2 * layers) (GPT-2)."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                if parameter.dim() == 2 and not name.endswith("_bias"):
                    into_residual = name.startswith(("out_proj", "ffw_down"))
                    nn.init.normal_(parameter, std=0.02 / (2 * self.config.num_layers) ** 0.5 if into_residual else 0.02)

    def logits(self, hidden_BSW: Tensor) -> Tensor:
        """Final norm and tied output."""
        return F.linear(self.norm(hidden_BSW), self.embedding.weight)

    def forward(self, token_ids_BS: Tensor) -> Tensor:
        hidden = self.embedding(token_ids_BS)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.logits(hidden)
