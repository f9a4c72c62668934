"""Other ways to compute phi cross-attention, each given its inputs in the layout that suits it best and only the work that it must do.

    SDPA image by image        torch's attention over the gathered keys of each image, its positions as a batch; the gather is part of it
    variable-length attention  torch's FlashAttention over runs of positions and their images, keys packed position first
    FlexAttention              torch.compile'd, with the block mask that leaves each position its image
    FlashInfer                 its paged decode: an image is a page, in the bank's own layout; beams are requests of their own
    masked SDPA                torch's attention over all images with an additive mask: what a model without phi's structure does

A rival takes a Problem and returns a call that gives [B,S,H,D]; what can be done once for a prompt (masks, plans, layouts) is done before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Tensor]


class NotAtHand(Exception):
    """A rival that is not installed, or not in this PyTorch."""


@dataclass(frozen=True)
class Problem:
    """q [B,S,H,D]; bank k, v [N,H,R,D]; media_rows int64 [B,M]; phi int64 [B,S], ascending, none of it 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    media_rows: Tensor
    phi: Tensor

    @property
    def latents(self) -> int:
        return int(self.k.shape[2])

    def by_media(self, bank: Tensor) -> Tensor:
        """A request's media one after the other: [B, H, M * R, D]."""
        rows = bank[self.media_rows]  # [B, M, H, R, D]
        return rows.transpose(1, 2).flatten(2, 3).contiguous()


def sdpa_by_image(problem: Problem) -> Call:
    """Runs of equal length only: positions of an image are the queries of one batch entry."""
    batch, positions, heads, size = problem.q.shape
    counts = problem.phi[0].unique_consecutive(return_counts=True)[1]
    runs = len(counts)
    if bool((counts != counts[0]).any()) or bool((problem.phi != problem.phi[0]).any()):
        raise NotAtHand("SDPA image by image wants runs of one length")
    medium = problem.phi[:, :: positions // runs] - 1
    rows = problem.media_rows.gather(1, medium).reshape(-1)  # [B * runs]

    def call() -> Tensor:
        q = problem.q.reshape(batch * runs, positions // runs, heads, size).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, problem.k[rows], problem.v[rows])
        return y.transpose(1, 2).reshape(batch, positions, heads, size)

    return call


def variable_length(problem: Problem) -> Call:
    """One request."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotAtHand("this PyTorch has no torch.nn.attention.varlen") from error
    _, counts = problem.phi[0].unique_consecutive(return_counts=True)
    zero = torch.zeros(1, dtype=torch.int32, device=problem.q.device)
    runs = torch.cat([zero, counts.cumsum(0).int()])
    keys = torch.arange(len(counts) + 1, dtype=torch.int32, device=problem.q.device) * problem.latents
    seen = problem.media_rows[0][problem.phi[0].unique_consecutive() - 1]
    packed = [bank[seen].transpose(1, 2).flatten(0, 1).contiguous() for bank in (problem.k, problem.v)]
    longest = int(counts.max())

    def call() -> Tensor:
        found: Tensor = varlen_attn(problem.q[0], *packed, runs, keys, longest, problem.latents)  # type: ignore[arg-type, assignment, call-arg]
        return found[None]

    return call


def flex(problem: Problem, *, compiled: bool = True) -> Call:
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise NotAtHand("this PyTorch has no FlexAttention") from error
    batch, positions = problem.phi.shape
    medium, latents = problem.phi - 1, problem.latents
    k, v = problem.by_media(problem.k), problem.by_media(problem.v)

    def own(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return medium[b, query] == key // latents

    attention: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    q = problem.q.transpose(1, 2)

    def with_blocks(size: int, options: dict[str, int] | None) -> Call:
        mask = create_block_mask(own, batch, None, positions, k.shape[2], device=str(q.device), BLOCK_SIZE=(128, size))

        def call() -> Tensor:
            found: Tensor = attention(q, k, v, block_mask=mask, kernel_options=options)
            return found.transpose(1, 2)

        call()
        return call

    try:
        return with_blocks(latents, {"BLOCK_N": latents})  # a block an image: nothing is masked within
    except Exception:  # what compilers raise; tiles of that size are not everywhere
        return with_blocks(128, None)


def flashinfer(problem: Problem) -> Call:
    """Decoding: each position sees one image."""
    if importlib.util.find_spec("flashinfer") is None:
        raise NotAtHand("flashinfer is not installed")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, positions, heads, size = problem.q.shape
    count, device = batch * positions, problem.q.device
    pages = problem.media_rows.gather(1, problem.phi - 1).reshape(-1).int()
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device)
    last = torch.full((count,), problem.latents, dtype=torch.int32, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_cuda_graph=True,
        paged_kv_indptr_buffer=starts.clone(), paged_kv_indices_buffer=pages.clone(), paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    wrapper.plan(
        starts, pages, last, heads, heads, size, problem.latents, q_data_type=problem.q.dtype, kv_data_type=problem.k.dtype
    )
    q = problem.q.reshape(count, heads, size)

    def call() -> Tensor:
        found: Tensor = wrapper.run(q, (problem.k, problem.v))
        return found.reshape(batch, positions, heads, size)

    return call


def masked_sdpa(problem: Problem) -> Call:
    k, v = problem.by_media(problem.k), problem.by_media(problem.v)
    medium_of_key = torch.arange(k.shape[2], device=k.device) // problem.latents
    mask = torch.zeros(*problem.phi.shape, k.shape[2], device=k.device, dtype=problem.q.dtype)
    mask.masked_fill_((problem.phi - 1)[:, :, None] != medium_of_key, -torch.inf)
    q = problem.q.transpose(1, 2)

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)

    return call


PREFILL: dict[str, Callable[[Problem], Call]] = {
    "SDPA image by image": sdpa_by_image,
    "variable-length attention": variable_length,
    "FlexAttention": flex,
    "masked SDPA": masked_sdpa,
}
DECODE: dict[str, Callable[[Problem], Call]] = {
    "SDPA over the gathered image": sdpa_by_image,
    "FlexAttention": flex,
    "FlashInfer": flashinfer,
    "masked SDPA": masked_sdpa,
}
