"""Phi cross-attention as its definition says it, row by row of the bank: in fp64 to compare with, in the kernel's own dtype as the yardstick."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_seen(media_rows: Tensor, phi: Tensor, bank_rows: int) -> Tensor:
    """Bank row of each position, int64 [B,S]; -1 where phi or the row is out of range."""
    batch, positions = phi.shape
    if media_rows.shape[1] == 0:
        return torch.full_like(phi, -1)
    inside = (phi >= 1) & (phi <= media_rows.shape[1])
    rows = media_rows.gather(1, torch.where(inside, phi, 1).reshape(batch, positions) - 1)
    return torch.where(inside & (rows >= 0) & (rows < bank_rows), rows, -1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, media_rows: Tensor, phi: Tensor, *,
    dtype: torch.dtype, k_scale: float = 1.0, v_scale: float = 1.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """[B,S,H,D] in `dtype`, everything computed in it by torch's attention. Zeros where there is no medium; unread rows are not touched."""
    rows = rows_seen(media_rows, phi, k.shape[0])
    y = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for row in rows.unique().tolist():
        if row < 0:
            continue
        here = rows == row
        queries = q[here].to(dtype).transpose(0, 1)  # [H, n, D]
        keys, values = ((t[row].float().to(torch.float64) * s).to(dtype) for t, s in ((k, k_scale), (v, v_scale)))
        if dtype == torch.float64:
            scores = queries @ keys.transpose(1, 2) * (scale if scale is not None else q.shape[-1] ** -0.5)
            found = scores.softmax(-1) @ values
        else:
            found = F.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=scale)[0]
        y[here] = found.transpose(0, 1)
    return y
