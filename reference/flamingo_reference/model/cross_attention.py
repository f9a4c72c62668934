"""Gated cross-attention blocks (gated xattn-dense): what the frozen language model sees of the media.

Flamingo (arXiv 2204.14198), section 3.2. Shape suffixes: B requests, S positions, N rows of the media bank, M media of a
request, R latents of a medium, W width, H heads, G heads of keys and values, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flamingo_reference.config import ModelConfig
from flamingo_reference.model.layers import HookPoint, RMSNorm, feed_forward, make_norm, make_swish


def phi_cross_attention(
    q_BSHD: Tensor,
    k_NGRD: Tensor,
    v_NGRD: Tensor,
    media_rows_BM: Tensor,
    phi_BS: Tensor,
    first_BS: Tensor | None = None,
) -> Tensor:
    """Each position attends to the R latents of its medium phi, bank row media_rows[b, phi - 1]; exactly 0 where phi is 0.

    first: it attends to those of all media first to phi, the request's media counted from 1. Returns [B, S, H, D].
    Raises ValueError if phi exceeds the request's media.
    """
    num_media = media_rows_BM.shape[1]
    if phi_BS.numel() and int(phi_BS.max()) > num_media:
        raise ValueError(f"phi {int(phi_BS.max())} is beyond the request's {num_media} media")
    sharing = q_BSHD.shape[2] // k_NGRD.shape[1]
    k_NHRD, v_NHRD = (x if sharing == 1 else x.repeat_interleave(sharing, dim=1) for x in (k_NGRD, v_NGRD))
    if first_BS is not None:
        return _range_attention(q_BSHD, k_NHRD, v_NHRD, media_rows_BM, first_BS, phi_BS)
    attended = torch.zeros_like(q_BSHD)
    scale = q_BSHD.shape[-1] ** -0.5
    for medium in range(1, num_media + 1):
        here_BS = phi_BS == medium
        if not bool(here_BS.any()):
            continue
        rows_B = media_rows_BM[:, medium - 1]
        scores_BHSR = torch.einsum("bshd,bhrd->bhsr", q_BSHD, k_NHRD[rows_B]) * scale
        seen_BSHD = torch.einsum("bhsr,bhrd->bshd", scores_BHSR.softmax(dim=-1), v_NHRD[rows_B])
        attended = torch.where(here_BS[:, :, None, None], seen_BSHD, attended)
    return attended


def _range_attention(
    q_BSHD: Tensor, k_NHRD: Tensor, v_NHRD: Tensor, media_rows_BM: Tensor, first_BS: Tensor, phi_BS: Tensor
) -> Tensor:
    """Attention to the latents of media first to phi, side by side. [B, S, H, D]."""
    media_M = torch.arange(1, media_rows_BM.shape[1] + 1, device=phi_BS.device)
    seen_BSM = (first_BS[..., None] <= media_M) & (media_M <= phi_BS[..., None])
    mask_B1SK = seen_BSM.repeat_interleave(k_NHRD.shape[2], dim=-1)[:, None]
    keys_BHKD, values_BHKD = (x[media_rows_BM].transpose(1, 2).flatten(2, 3) for x in (k_NHRD, v_NHRD))
    scores_BHSK = (q_BSHD.transpose(1, 2) @ keys_BHKD.transpose(-1, -2)) * q_BSHD.shape[-1] ** -0.5
    probs_BHSK = scores_BHSK.masked_fill(~mask_B1SK, float("-inf")).softmax(dim=-1).masked_fill(~mask_B1SK, 0.0)
    attended: Tensor = (probs_BHSK @ values_BHKD).transpose(1, 2)
    return attended


def project_media(projection: nn.Module, latents_NRW: Tensor, heads: tuple[int, int], norm: nn.Module | None = None) -> Tensor:
    """Keys or values of media [N, G, R, D]; heads is (G, D), norm that of each head's keys."""
    projected: Tensor = projection(latents_NRW).unflatten(-1, heads)
    return (projected if norm is None else norm(projected)).transpose(1, 2)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else torch.tanh(gate) * x


class GatedCrossAttention(nn.Module):
    """hidden + tanh(gate) * attention to the current medium, then + tanh(gate) * feed-forward. Gates start at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        block, width = config.cross_attention, config.language_model.width
        inner, kv_inner = block.num_heads * block.head_size, block.kv_heads * block.head_size
        self.config = block
        self.norm = make_norm(block.norm, width, block.norm_eps)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(config.resampler.width, kv_inner, bias=False)
        self.v_proj = nn.Linear(config.resampler.width, kv_inner, bias=False)
        self.q_norm = RMSNorm(block.head_size, block.norm_eps) if block.qk_norm else None
        self.k_norm = RMSNorm(block.head_size, block.norm_eps) if block.qk_norm else None
        self.media = HookPoint()
        self.out_proj = nn.Linear(inner, width, bias=False)
        gate = () if block.gate == "scalar" else (width,)
        gated = block.gate != "none"
        self.attention_gate = nn.Parameter(torch.zeros(gate)) if gated else None
        self.ffw_norm = make_norm(block.norm, width, block.norm_eps)
        self.ffw_swish = make_swish(block.feed_forward, width, block.ffw_width)
        self.ffw_up = nn.Linear(width, block.ffw_width, bias=False)
        self.ffw_down = nn.Linear(block.ffw_width, width, bias=False)
        self.ffw_gate = nn.Parameter(torch.zeros(gate)) if gated else None

    def media_kv(self, latents_NRW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of media, which the hook point `media` is given: latents [N, R, W of the resampler] -> two [N, G, R, D]."""
        heads = (self.config.kv_heads, self.config.head_size)
        k_NGRD = project_media(self.k_proj, latents_NRW, heads, self.k_norm)
        k_NGRD, v_NGRD = self.media(k_NGRD, project_media(self.v_proj, latents_NRW, heads))
        return k_NGRD, v_NGRD

    def forward(
        self,
        hidden_BSW: Tensor,
        k_NGRD: Tensor,
        v_NGRD: Tensor,
        media_rows_BM: Tensor,
        phi_BS: Tensor,
        first_BS: Tensor | None = None,
    ) -> Tensor:
        """first: where tokens see ranges of media, as in `phi_cross_attention`."""
        q_BSHD = self.q_proj(self.norm(hidden_BSW)).unflatten(-1, (self.config.num_heads, self.config.head_size))
        if self.q_norm is not None:
            q_BSHD = self.q_norm(q_BSHD)
        attended = phi_cross_attention(q_BSHD, k_NGRD, v_NGRD, media_rows_BM, phi_BS, first_BS)
        hidden_BSW = hidden_BSW + _gated(self.out_proj(attended.flatten(2)), self.attention_gate)
        normed, kind = self.ffw_norm(hidden_BSW), self.config.feed_forward
        down = feed_forward(normed, kind, up=self.ffw_up, down=self.ffw_down, swish=self.ffw_swish)
        if self.config.without_media == "nothing":
            down = torch.where(phi_BS[..., None] > 0, down, torch.zeros_like(down))
        return hidden_BSW + _gated(down, self.ffw_gate)
