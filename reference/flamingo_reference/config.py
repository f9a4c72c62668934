"""What a Flamingo model is made of: typed configuration and the paper's sizes.

Nothing here imports torch: the exporter and the runtime read the same description as the reference model.
Sources: Flamingo (arXiv 2204.14198, tables 1 and 5), Brock et al. 2021 (NFNet), Hoffmann et al. 2022 (Chinchilla).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec


class ConfigError(ValueError):
    """A model configuration that cannot be built; the message names the field."""


class NFNetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="nfnet"):
    """NFNet vision encoder (Brock et al. 2021) without classifier; the final grid is the output.

    The four stem convolutions stride by 4, the first stage by 1, each later one by 2.
    """

    image_size: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stem_widths: tuple[int, int, int, int]
    feature_width: int
    group_width: int = 128
    bottleneck_ratio: float = 0.5
    squeeze_excite_ratio: float = 0.5
    alpha: float = 0.2

    @property
    def stride(self) -> int:
        """Pixels of the image a position of the final grid stands for, along one side."""
        return 4 << (len(self.widths) - 1)

    @property
    def num_patches(self) -> int:
        """P: positions of the final grid (SAME padding rounds up)."""
        side = -(-self.image_size // self.stride)
        return side * side


class ResamplerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Perceiver Resampler: [T, P, E] features of one medium to [R, W] latents."""

    num_layers: int
    width: int
    num_heads: int
    head_size: int
    ffw_width: int
    num_latents: int = 64
    num_time_embeddings: int = 8


class CrossAttentionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gated xattn-dense blocks, one before language model layer i when i % every == 0."""

    every: int
    num_heads: int
    head_size: int
    ffw_width: int


class LanguageModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Chinchilla-style decoder: RMSNorm, Transformer-XL relative positions, GELU feed-forward, tied output."""

    num_layers: int
    width: int
    num_heads: int
    head_size: int
    ffw_width: int
    vocab_size: int
    max_positions: int
    """Distances beyond max_positions - 1 read the table's last entry."""
    norm_eps: float = 1e-6


class TokenIds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids of the tokens that carry structure."""

    pad: int
    bos: int
    eoc: int
    image: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole Flamingo."""

    name: str
    vision: NFNetConfig
    resampler: ResamplerConfig
    cross_attention: CrossAttentionConfig
    language_model: LanguageModelConfig
    tokens: TokenIds
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of RGB in 0..1; also the colour images are padded with."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """LM layers with a gated cross-attention block before them, in order; media_k.i is the i-th of them."""
        return tuple(range(0, self.language_model.num_layers, self.cross_attention.every))

    def validate(self) -> None:
        """Raises ConfigError naming each field that makes the model impossible to build."""
        faults = []
        vision, lm = self.vision, self.language_model
        if len(vision.widths) != len(vision.depths) or not vision.widths:
            faults.append(f"vision.widths {vision.widths} and vision.depths {vision.depths} differ in length or are empty")
        for part in ("vision", "resampler", "cross_attention", "language_model"):
            for field, value in msgspec.structs.asdict(getattr(self, part)).items():
                counts = value if isinstance(value, tuple) else (value,)
                if any(isinstance(count, int) and count < 1 for count in counts):
                    faults.append(f"{part}.{field} is {value}, expected at least 1")
        for width in vision.widths:
            middle = int(width * vision.bottleneck_ratio)
            if vision.group_width > 0 and (middle < 1 or middle % vision.group_width):
                faults.append(f"vision.group_width {vision.group_width} does not divide bottleneck width {middle}")
        if lm.width % 2:
            faults.append(f"language_model.width {lm.width} is odd; the sinusoids of relative positions come in pairs")
        for field in ("pad", "bos", "eoc", "image"):
            token = getattr(self.tokens, field)
            if not 0 <= token < lm.vocab_size:
                faults.append(f"tokens.{field} {token} is outside the vocabulary of {lm.vocab_size}")
        if self.tokens.image in (self.tokens.pad, self.tokens.bos, self.tokens.eoc):
            faults.append(f"tokens.image {self.tokens.image} is also another token; every occurrence of it stands for a medium")
        if min(self.pixel_std) <= 0:
            faults.append(f"pixel_std {self.pixel_std} has an entry that is not positive")
        if faults:
            raise ConfigError(f"model config {self.name!r}: " + "; ".join(faults))


# F6's widths and depths: Brock et al. 2021, table 6. 320 pixels: Flamingo, section 3.1.1 of the appendix.
NFNET_F6 = NFNetConfig(
    image_size=320,
    widths=(256, 512, 1536, 1536),
    depths=(7, 14, 42, 21),
    stem_widths=(16, 32, 64, 128),
    feature_width=3072,
)
# Flamingo, table 5: the resampler is the same in all sizes.
PAPER_RESAMPLER = ResamplerConfig(num_layers=6, width=1536, num_heads=16, head_size=96, ffw_width=6144)
PAPER_TOKENS = TokenIds(pad=0, bos=1, eoc=2, image=3)


def _paper_model(name: str, *, layers: int, width: int, every: int) -> ModelConfig:
    """Flamingo, table 5: heads of 128, feed-forward 4 times the width; 32k vocabulary and 2048 positions: Chinchilla."""
    heads = width // 128
    return ModelConfig(
        name=name,
        vision=NFNET_F6,
        resampler=PAPER_RESAMPLER,
        cross_attention=CrossAttentionConfig(every=every, num_heads=heads, head_size=128, ffw_width=4 * width),
        language_model=LanguageModelConfig(
            num_layers=layers,
            width=width,
            num_heads=heads,
            head_size=128,
            ffw_width=4 * width,
            vocab_size=32000,
            max_positions=2048,
        ),
        tokens=PAPER_TOKENS,
    )


# Trained here (flamingo_reference.nano): every choice is ours. Three stages, so stride 16: 64x64 pixels give 4x4 positions.
NANO = ModelConfig(
    name="nano",
    vision=NFNetConfig(
        image_size=64, widths=(32, 96, 192), depths=(1, 2, 1), stem_widths=(8, 16, 16, 32), feature_width=192, group_width=16
    ),
    resampler=ResamplerConfig(num_layers=2, width=128, num_heads=4, head_size=32, ffw_width=256, num_latents=16),
    cross_attention=CrossAttentionConfig(every=2, num_heads=4, head_size=32, ffw_width=256),
    language_model=LanguageModelConfig(
        num_layers=6, width=128, num_heads=4, head_size=32, ffw_width=512, vocab_size=512, max_positions=512
    ),
    tokens=PAPER_TOKENS,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "nano": NANO,
        "3b": _paper_model("3b", layers=24, width=2048, every=1),
        "9b": _paper_model("9b", layers=40, width=4096, every=4),
        "80b": _paper_model("80b", layers=80, width=8192, every=7),
    }
)

# Parameter counts the paper quotes (sections 3.1 and appendix B.1); they do not all follow from its own table of shapes.
QUOTED_PARAMETERS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "3b": {"vision_encoder": 435e6, "resampler": 194e6, "cross_attention": 1.2e9, "language_model": 1.4e9, "total": 3.2e9},
        "9b": {"vision_encoder": 435e6, "resampler": 194e6, "cross_attention": 1.6e9, "language_model": 7.1e9, "total": 9.3e9},
        "80b": {"vision_encoder": 435e6, "resampler": 194e6, "cross_attention": 10e9, "language_model": 70e9, "total": 80e9},
    }
)
