"""The sizes by name, each number with its source; the paper's count of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flamingo_reference.config.bridge import CrossAttentionConfig, ResamplerConfig, projector_config
from flamingo_reference.config.model_config import ModelConfig, TokenIds
from flamingo_reference.config.text_decoder import LanguageModelConfig, Llama3Scaling, RotaryPositions
from flamingo_reference.config.vision_encoders import NFNetConfig, TiledViTConfig

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


def _llama_vision(name: str, *, layers: int, width: int, heads: int, ffw_width: int, image_size: int = 560) -> ModelConfig:
    """Llama 3.2 Vision (config.json of its checkpoints): vision tower and tokens are the same in both sizes; 448 pixels in 11B base."""
    vision = TiledViTConfig(
        image_size=image_size, patch_size=14, width=1280, num_layers=32, num_global_layers=8, num_heads=16, ffw_width=5120,
        feature_layers=(3, 7, 15, 23, 30),
    )  # fmt: skip
    return ModelConfig(
        name=name,
        vision=vision,
        resampler=projector_config(num_latents=vision.num_patches, width=width),
        cross_attention=CrossAttentionConfig(
            every=4, offset=3, num_heads=heads, num_kv_heads=8, head_size=128, ffw_width=ffw_width, norm="rms_norm",
            qk_norm=True, feed_forward="swiglu", sees="group", without_media="nothing",
        ),
        language_model=LanguageModelConfig(
            num_layers=layers, width=width, num_heads=heads, num_kv_heads=8, head_size=128, ffw_width=ffw_width,
            vocab_size=128256, extra_embeddings=8, max_positions=131072, norm_eps=1e-5, feed_forward="swiglu", tied_head=False,
            positions=RotaryPositions(
                size=128, base=500000.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=8192)
            ),
        ),
        tokens=TokenIds(pad=128004, bos=128000, eoc=128009, image=128256, ends=(128001, 128008)),
        pixel_mean=(0.48145466, 0.4578275, 0.40821073),
        pixel_std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip


SIZES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "nano": NANO,
        "3b": _paper_model("3b", layers=24, width=2048, every=1),
        "9b": _paper_model("9b", layers=40, width=4096, every=4),
        "80b": _paper_model("80b", layers=80, width=8192, every=7),
        "llama-3.2-11b-vision": _llama_vision("llama-3.2-11b-vision", layers=32, width=4096, heads=32, ffw_width=14336),
        "llama-3.2-90b-vision": _llama_vision("llama-3.2-90b-vision", layers=80, width=8192, heads=64, ffw_width=28672),
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
