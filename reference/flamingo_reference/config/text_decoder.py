"""The language model and its positions."""

from __future__ import annotations

import math

import msgspec

from flamingo_reference.config.choices import FeedForward, Norm


class RelativePositions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="relative"):
    """Transformer-XL (Dai et al. 2019): a learned projection of the distance. Beyond max_positions - 1 it reads the last entry."""


class Llama3Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Llama 3.1's slower turning for longer texts: pairs of channels whose wave is longer than original / low are slowed by `factor`,
    those shorter than original / high are left, and between the two the change is gradual (transformers, `rope_type` llama3)."""

    factor: float
    low: float
    high: float
    original: int
    """Positions that the model was first trained with."""

    def rate(self, frequency: float) -> float:
        """What a pair's angle for one position is multiplied with."""
        waves = self.original * frequency / (2 * math.pi)
        smooth = min(1.0, max(0.0, (waves - self.low) / (self.high - self.low)))
        return (1 - smooth) / self.factor + smooth


class RotaryPositions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="rotary"):
    """Queries and keys turned by their position (Su et al. 2021), halves paired: channel c goes with c + size / 2."""

    size: int
    """Channels of a head that are turned, the first ones; the others are left as they are (GPT-NeoX)."""
    base: float = 10000.0
    scaling: Llama3Scaling | None = None

    def rates(self) -> list[float] | None:
        """What each pair's angle is multiplied with; None: nothing."""
        if self.scaling is None:
            return None
        half = self.size // 2
        return [self.scaling.rate(self.base ** (-pair / half)) for pair in range(half)]


class AlibiPositions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alibi"):
    """A penalty that grows with the distance, at another rate for each head (Press et al. 2022)."""

    max_bias: float = 8.0
    rounded: bool = True
    """Whether slopes are those of the next power of two heads (MPT), or of as many heads as there are (MosaicGPT, before it was MPT)."""

    def slopes(self, num_heads: int) -> list[float]:
        """Each head's penalty for a distance of one: 2 ** (-max_bias * (head + 1) / heads).

        MPT takes heads as the next power of two, and of its slopes every second one, the finer ones first.
        """
        whole = 2 ** math.ceil(math.log2(num_heads)) if self.rounded else num_heads
        slopes = [2.0 ** (-self.max_bias * (head + 1) / whole) for head in range(whole)]
        return slopes if whole == num_heads else [*slopes[1::2], *slopes[::2]][:num_heads]


class LanguageModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pre-norm decoder. The defaults are Chinchilla's: RMSNorm, Transformer-XL positions, GELU feed-forward, no biases, tied output."""

    num_layers: int
    width: int
    num_heads: int
    head_size: int
    ffw_width: int
    vocab_size: int
    max_positions: int
    """Relative: distances beyond max_positions - 1 read the table's last entry. Rotary: the table's length, positions beyond are refused."""
    norm_eps: float = 1e-6
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by as many query heads; None: one for each."""
    positions: RelativePositions | RotaryPositions | AlibiPositions = RelativePositions()
    norm: Norm = "rms_norm"
    norm_bias: bool = False
    """Whether LayerNorms have a bias."""
    qk_norm: bool = False
    """LayerNorm, without bias, of queries and keys before they are split into heads (MPT)."""
    feed_forward: FeedForward = "gelu"
    bias: bool = False
    """Whether the projections of attention and feed-forward have biases."""
    parallel: bool = False
    """Whether attention and feed-forward both read the layer's input (GPT-NeoX), or the feed-forward what attention made of it."""
    tied_head: bool = True
    """Whether the output is the embedding, or a matrix of its own."""
    extra_embeddings: int = 0
    """Rows that the embedding has beyond the output's `vocab_size`: tokens that are read and can never be generated."""

    @property
    def embedding_rows(self) -> int:
        """Tokens that the model can read."""
        return self.vocab_size + self.extra_embeddings

    @property
    def kv_heads(self) -> int:
        """Heads in the cache."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def uses_distances(self) -> bool:
        """Whether attention depends on how far apart positions are; otherwise keys hold all that is to be known of theirs."""
        return not isinstance(self.positions, RotaryPositions)

    @property
    def position_limit(self) -> int | None:
        """Positions that the model has; None where there is no end."""
        return self.max_positions if isinstance(self.positions, RotaryPositions) else None
