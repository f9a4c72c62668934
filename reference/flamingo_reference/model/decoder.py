"""The frozen language model: a pre-norm decoder, with relative (Transformer-XL), rotary or ALiBi positions.

Hoffmann et al. 2022 (RMSNorm, GELU, tied output), Dai et al. 2019 (relative positions), Touvron et al. 2023 (rotary positions, SwiGLU).
Shape suffixes: B requests, S positions in this call, C keys (cache capacity, or S), W width, H heads, G heads of keys and values,
D head size, X distances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo_reference.config import AlibiPositions, LanguageModelConfig, RelativePositions, RotaryPositions
from flamingo_reference.model.layers import HookPoint, feed_forward, make_norm, make_swish
from flamingo_reference.model.positions import rotate, shift_by_distance, sinusoids


class LanguageModelLayer(nn.Module):
    """One decoder layer; `forward` and `forward_cached` are two ways to the same numbers."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        inner, kv_inner, bias = config.num_heads * config.head_size, config.kv_heads * config.head_size, config.bias
        self.config = config
        self.attention_norm = make_norm(config.norm, config.width, config.norm_eps, bias=config.norm_bias)
        self.q_proj = nn.Linear(config.width, inner, bias=bias)
        self.k_proj = nn.Linear(config.width, kv_inner, bias=bias)
        self.v_proj = nn.Linear(config.width, kv_inner, bias=bias)
        self.q_norm = nn.LayerNorm(inner, config.norm_eps, bias=False) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(kv_inner, config.norm_eps, bias=False) if config.qk_norm else None
        if isinstance(config.positions, RelativePositions):
            self.relative_proj = nn.Linear(config.width, inner, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(config.num_heads, config.head_size))
            self.position_bias = nn.Parameter(torch.zeros(config.num_heads, config.head_size))
        self.operands = HookPoint()
        self.out_proj = nn.Linear(inner, config.width, bias=bias)
        self.ffw_norm = make_norm(config.norm, config.width, config.norm_eps, bias=config.norm_bias)
        self.ffw_swish = make_swish(config.feed_forward, config.width, config.ffw_width, bias=bias)
        self.ffw_up = nn.Linear(config.width, config.ffw_width, bias=bias)
        self.ffw_down = nn.Linear(config.ffw_width, config.width, bias=bias)

    def qkv(self, hidden_BSW: Tensor, positions_BS: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, D], keys and values [B, G, S, D] as the cache holds them; positions are 0, 1, ... unless given."""
        config, normed = self.config, self.attention_norm(hidden_BSW)
        q, k, v = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHSD, k_BGSD, v_BGSD = (self._heads(x) for x in (q, k, v))
        if isinstance(config.positions, RotaryPositions):
            if positions_BS is None:
                positions_BS = torch.arange(hidden_BSW.shape[1], device=hidden_BSW.device)[None]
            q_BHSD, k_BGSD = (rotate(x, positions_BS, config.positions) for x in (q_BHSD, k_BGSD))
        return q_BHSD, k_BGSD, v_BGSD

    def _heads(self, x_BSI: Tensor) -> Tensor:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        x_BHSD: Tensor = x_BSI.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)
        return x_BHSD

    def distance_table(self, num_distances: int) -> Tensor:
        """Projected distances 0 .. num_distances - 1, at most max_positions of them: [X, H, D]. Relative positions only."""
        known = min(num_distances, self.config.max_positions)
        table_XI: Tensor = self.relative_proj(sinusoids(known, self.config.width, self.relative_proj.weight))
        return table_XI.reshape(known, self.config.num_heads, self.config.head_size)

    def position_scores(self, q_BHSD: Tensor, table_XHD: Tensor) -> Tensor:
        """(q + position_bias) . projected distance: [B, H, S, X], not scaled. Relative positions only."""
        return torch.einsum("bhsd,xhd->bhsx", q_BHSD + self.position_bias[:, None, :], table_XHD)

    def alibi_scores(self, distance_BSC: Tensor, like: Tensor) -> Tensor:
        """-slope * distance [B, H, S, C] in the dtype of `like`, before the scale that scores are multiplied by. ALiBi only."""
        assert isinstance(self.config.positions, AlibiPositions)
        slopes_H11 = torch.tensor(self.config.positions.slopes(self.config.num_heads), dtype=torch.float64, device=like.device)[
            :, None, None
        ]
        scores: Tensor = -slopes_H11 * distance_BSC[:, None] * self.config.head_size**0.5
        return scores.to(like.dtype)

    def attend(self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, position_BHSC: Tensor | None, mask_BqSC: Tensor) -> Tensor:
        """Attention output [B, S, W]; rows that may see nothing are zero. position: what distances add to scores, before the scale.

        The hook point `operands` is given queries (with their bias for contents), keys and values as they are multiplied.
        """
        if isinstance(self.config.positions, RelativePositions):
            q_BHSD = q_BHSD + self.content_bias[:, None, :]
        q_BHSD, k_BGCD, v_BGCD = self.operands(q_BHSD, k_BGCD, v_BGCD)
        sharing = self.config.num_heads // self.config.kv_heads
        k_BHCD, v_BHCD = (x if sharing == 1 else x.repeat_interleave(sharing, dim=1) for x in (k_BGCD, v_BGCD))
        scores = q_BHSD @ k_BHCD.transpose(-1, -2)
        if position_BHSC is not None:
            scores = scores + position_BHSC
        scores = (scores * self.config.head_size**-0.5).masked_fill(~mask_BqSC, float("-inf"))
        probs = scores.softmax(dim=-1).masked_fill(~mask_BqSC, 0.0)
        projected: Tensor = self.out_proj((probs @ v_BHCD).transpose(1, 2).flatten(2))
        return projected

    def _residual(self, hidden_BSW: Tensor, attended_BSW: Tensor) -> Tensor:
        """The layer's output from its input and what attention made of it."""
        summed = hidden_BSW + attended_BSW
        normed = self.ffw_norm(hidden_BSW if self.config.parallel else summed)
        return summed + feed_forward(normed, self.config.feed_forward, up=self.ffw_up, down=self.ffw_down, swish=self.ffw_swish)

    def forward(self, hidden_BSW: Tensor) -> Tensor:
        """Whole sequences from position 0, each position seeing itself and those before."""
        q, k, v = self.qkv(hidden_BSW)
        length, device = hidden_BSW.shape[1], hidden_BSW.device
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        position = None
        if isinstance(self.config.positions, RelativePositions):
            position = shift_by_distance(self.position_scores(q, self.distance_table(length)), length)
        elif isinstance(self.config.positions, AlibiPositions):
            places = torch.arange(length, device=device)
            position = self.alibi_scores((places[:, None] - places)[None], q)
        return self._residual(hidden_BSW, self.attend(q, k, v, position, causal))

    def forward_cached(
        self,
        hidden_BSW: Tensor,
        *,
        past_k: Tensor,
        past_v: Tensor,
        write_index_B: Tensor,
        positions_BS: Tensor,
        distance_BSC: Tensor | None,
        mask_B1SC: Tensor,
        table_XHD: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """These positions against a cache [B, G, C, D] into which they are first written at write_index.

        distance_BSC: from each position to each slot, where the model uses distances. table_XHD: `distance_table` worked out before,
        where weights no longer change. in_place: the cache given is written to. Returns hidden [B, S, W] and the updated cache.
        """
        q, k, v = self.qkv(hidden_BSW, positions_BS)
        present_k = scatter_rows(past_k, k, write_index_B, in_place=in_place)
        present_v = scatter_rows(past_v, v, write_index_B, in_place=in_place)
        position = None if distance_BSC is None else self._cached_scores(q, distance_BSC, table_XHD)
        attended = self.attend(q, present_k, present_v, position, mask_B1SC)
        return self._residual(hidden_BSW, attended), present_k, present_v

    def _cached_scores(self, q_BHSD: Tensor, distance_BSC: Tensor, table_XHD: Tensor | None) -> Tensor:
        """What distances add to the scores: [B, H, S, C]."""
        if isinstance(self.config.positions, AlibiPositions):
            return self.alibi_scores(distance_BSC, q_BHSD)
        if table_XHD is None:
            table_XHD = self.distance_table(max(0, int(distance_BSC.max())) + 1)
        distance_BSC = distance_BSC.clamp(0, table_XHD.shape[0] - 1)
        index = distance_BSC[:, None].expand(-1, self.config.num_heads, -1, -1)
        return self.position_scores(q_BHSD, table_XHD).gather(-1, index)


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
        self.embedding = nn.Embedding(config.embedding_rows, config.width)
        self.layers = nn.ModuleList(LanguageModelLayer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config.norm, config.width, config.norm_eps, bias=config.norm_bias)
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
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
        """Final norm and output."""
        return F.linear(self.norm(hidden_BSW), self.embedding.weight if self.head is None else self.head.weight)

    def forward(self, token_ids_BS: Tensor) -> Tensor:
        hidden = self.embedding(token_ids_BS)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.logits(hidden)
