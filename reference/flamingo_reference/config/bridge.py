"""What stands between vision encoder and language model: the resampler or projector, and the gated blocks."""

from __future__ import annotations

from typing import Literal

import msgspec

from flamingo_reference.config.choices import Activation, FeedForward, Norm


class ResamplerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From [T, P, E] features of one medium to [R, W] latents: the Perceiver Resampler, or a projector in its place."""

    num_layers: int
    width: int
    num_heads: int
    head_size: int
    ffw_width: int
    num_latents: int = 64
    num_time_embeddings: int = 8
    """0: frames are distinguished by nothing, and the subgraph has no `time_weights`."""
    activation: Activation = "squared_relu"
    input_proj: bool = True
    """Whether features are projected to the resampler's width, or have it already."""
    qk_norm: bool = False
    """LayerNorm of each head's queries and keys."""
    kind: Literal["perceiver", "projector"] = "perceiver"
    """projector: one matrix with a bias; a medium is one frame, whose P projected features are its latents (`projector_config`)."""


def projector_config(*, num_latents: int, width: int) -> ResamplerConfig:
    """A projector: no layers, no heads, no time embeddings. num_latents: P, the features of a medium."""
    return ResamplerConfig(
        kind="projector", num_layers=0, width=width, num_heads=0, head_size=0, ffw_width=0, num_latents=num_latents,
        num_time_embeddings=0,
    )  # fmt: skip


class CrossAttentionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gated xattn-dense blocks, one before language model layer i when i % every == offset."""

    every: int
    num_heads: int
    head_size: int
    ffw_width: int
    offset: int = 0
    norm: Norm = "layer_norm"
    """Of both halves' inputs; media are not normalised."""
    norm_eps: float = 1e-5
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys."""
    feed_forward: FeedForward = "squared_relu"
    gate: Literal["scalar", "vector", "none"] = "scalar"
    """tanh gates: one number, or one for each channel; none: both halves are added as they are (the paper's ablation without gates)."""
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by as many query heads; None: one for each."""
    sees: Literal["last", "group"] = "last"
    """What a token sees: the last image, or of the images that stand side by side, with no token between them, those up to the last."""
    without_media: Literal["feed_forward", "nothing"] = "feed_forward"
    """What the block does to a token that sees no medium: only its attention is zero, or the token passes the block unchanged."""

    @property
    def kv_heads(self) -> int:
        """Heads in the media bank."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads
