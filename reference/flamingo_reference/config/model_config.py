"""A whole model: its components, its special tokens, and what makes it impossible to build."""

from __future__ import annotations

import msgspec

from flamingo_reference.config.bridge import CrossAttentionConfig, ResamplerConfig
from flamingo_reference.config.choices import ConfigError
from flamingo_reference.config.faults import faults_of
from flamingo_reference.config.text_decoder import LanguageModelConfig
from flamingo_reference.config.vision_encoders import TiledViTConfig, VisionConfig
from flamingo_reference.contrastive_config import ContrastiveConfig


class TokenIds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids of the tokens that carry structure."""

    pad: int
    bos: int
    eoc: int
    image: int
    reset: int | None = None
    """After this token no medium is seen until the next one (IDEFICS: the end of a text); None: the last one is seen on."""
    ends: tuple[int, ...] = ()
    """Tokens that end a text besides `eoc`."""
    banned: tuple[int, ...] = ()
    """Tokens that are never generated besides `image`."""

    @property
    def stops(self) -> tuple[int, ...]:
        """All tokens that end a text, `eoc` first."""
        return (self.eoc, *self.ends)

    @property
    def never(self) -> tuple[int, ...]:
        """All tokens that are never generated, `image` first. Those that have a logit (`ModelConfig.banned_logits`) are taken out before
        the softmax."""
        return (self.image, *self.banned)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole Flamingo."""

    name: str
    vision: VisionConfig
    resampler: ResamplerConfig
    cross_attention: CrossAttentionConfig
    language_model: LanguageModelConfig
    tokens: TokenIds
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of RGB in 0..1; also the colour images are padded with."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    contrastive: ContrastiveConfig | None = None
    """The contrastive encoder beside the model, which shares its vision encoder; None where the checkpoint has none."""

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """LM layers with a gated cross-attention block before them, in order; media_k.i is the i-th of them."""
        return tuple(range(self.cross_attention.offset, self.language_model.num_layers, self.cross_attention.every))

    @property
    def banned_logits(self) -> tuple[int, ...]:
        """The columns of the logits that are taken out before the softmax: `tokens.never`, but for tokens beyond the output's rows."""
        return tuple(token for token in self.tokens.never if token < self.language_model.vocab_size)

    @property
    def sees_groups(self) -> bool:
        """Whether a token sees a range of media, first_media to phi, or the one that phi names."""
        return self.cross_attention.sees == "group"

    @property
    def tiled(self) -> TiledViTConfig | None:
        """The vision encoder where an image is several media, its tiles; None where an image is one."""
        return self.vision if isinstance(self.vision, TiledViTConfig) else None

    def validate(self) -> None:
        """Raises ConfigError naming each field that makes the model impossible to build."""
        if faults := list(faults_of(self)):
            raise ConfigError(f"model config {self.name!r}: " + "; ".join(faults))
