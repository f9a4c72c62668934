"""Where a position stands, as attention sees it: sinusoids of relative positions, and rotations.

Shape suffixes: B requests, S positions, H heads, D head size, W width, X distances, Z turned channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo_reference.config import RotaryPositions


def sinusoids(num_distances: int, width: int, like: Tensor) -> Tensor:
    """Transformer-XL's encoding of distances 0, 1, ... [X, W]: sines in the first half, cosines in the second.

    Computed in float64 and returned in the dtype of `like`.
    """
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width)
    angle = torch.arange(num_distances, dtype=torch.float64, device=like.device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


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


def rotate(x_BHSD: Tensor, positions_BS: Tensor, config: RotaryPositions) -> Tensor:
    """The first `size` channels of each head turned by their position (Su et al. 2021), pairs of channels half of `size` apart.

    Angles are computed in float64.
    """
    half = config.size // 2
    frequency = config.base ** (-torch.arange(half, dtype=torch.float64, device=x_BHSD.device) / half)
    if (rates := config.rates()) is not None:
        frequency = frequency * torch.tensor(rates, dtype=torch.float64, device=x_BHSD.device)
    angle_B1SZ = (positions_BS[..., None].double() * frequency)[:, None]
    cos, sin = angle_B1SZ.cos().to(x_BHSD.dtype), angle_B1SZ.sin().to(x_BHSD.dtype)
    first, second, rest = x_BHSD[..., :half], x_BHSD[..., half : config.size], x_BHSD[..., config.size :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
