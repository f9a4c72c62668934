"""Small models of every kind that the configuration knows, none with a silent part. No two sizes are equal that could be mixed up."""

from __future__ import annotations

import msgspec
import torch

from flamingo_reference.config import (
    AlibiPositions,
    CrossAttentionConfig,
    LanguageModelConfig,
    Llama3Scaling,
    ModelConfig,
    NFNetConfig,
    ResamplerConfig,
    RotaryPositions,
    TiledViTConfig,
    TokenIds,
    ViTConfig,
    projector_config,
)
from flamingo_reference.model import Flamingo

_NFNET = NFNetConfig(image_size=24, widths=(16, 32), depths=(1, 1), stem_widths=(4, 8, 8, 16), feature_width=20, group_width=8)
_TOKENS = TokenIds(pad=0, bos=1, eoc=2, image=3)

IDEFICS = ModelConfig(
    name="idefics-like",
    vision=ViTConfig(
        image_size=30, patch_size=7, width=40, num_layers=2, num_heads=5, ffw_width=72, activation="gelu", class_token=True
    ),
    resampler=ResamplerConfig(
        num_layers=2, width=40, num_heads=3, head_size=10, ffw_width=160, num_latents=6, num_time_embeddings=0,
        activation="relu", input_proj=False, qk_norm=True,
    ),
    cross_attention=CrossAttentionConfig(
        every=2, num_heads=4, head_size=12, ffw_width=88, norm="rms_norm", norm_eps=1e-6, qk_norm=True, feed_forward="swiglu",
        gate="vector",
    ),
    language_model=LanguageModelConfig(
        num_layers=3, width=48, num_heads=4, head_size=12, ffw_width=88, vocab_size=62, max_positions=128,
        positions=RotaryPositions(size=12), feed_forward="swiglu", tied_head=False,
    ),
    tokens=TokenIds(pad=0, bos=1, eoc=2, image=61, reset=2),
)  # fmt: skip

MPT = ModelConfig(
    name="openflamingo-mpt-like",
    vision=ViTConfig(image_size=28, patch_size=7, width=32, num_layers=2, num_heads=4, ffw_width=64),
    resampler=ResamplerConfig(
        num_layers=2, width=32, num_heads=2, head_size=10, ffw_width=128, num_latents=6, num_time_embeddings=0,
        activation="gelu", input_proj=False,
    ),
    cross_attention=CrossAttentionConfig(every=2, offset=1, num_heads=3, head_size=8, ffw_width=96, feed_forward="gelu"),
    language_model=LanguageModelConfig(
        num_layers=4, width=24, num_heads=6, head_size=4, ffw_width=96, vocab_size=70, max_positions=96, norm_eps=1e-5,
        positions=AlibiPositions(), norm="layer_norm", qk_norm=True,
    ),
    tokens=_TOKENS,
)  # fmt: skip

NEOX = msgspec.structs.replace(
    MPT,
    name="openflamingo-neox-like",
    vision=ViTConfig(
        image_size=28, patch_size=14, width=32, num_layers=1, num_heads=4, ffw_width=64, class_token=True, final_norm=True
    ),
    resampler=msgspec.structs.replace(MPT.resampler, num_time_embeddings=4),
    language_model=LanguageModelConfig(
        num_layers=4, width=24, num_heads=3, head_size=8, ffw_width=96, vocab_size=70, max_positions=128, norm_eps=1e-5,
        positions=RotaryPositions(size=4, base=5000.0), norm="layer_norm", norm_bias=True, bias=True, parallel=True,
        tied_head=False,
    ),
)  # fmt: skip

GROUPED = ModelConfig(
    name="grouped-heads",
    vision=_NFNET,
    resampler=ResamplerConfig(num_layers=1, width=24, num_heads=2, head_size=8, ffw_width=40, num_latents=6, qk_norm=True),
    cross_attention=CrossAttentionConfig(every=3, offset=2, num_heads=2, head_size=12, ffw_width=48, gate="vector", qk_norm=True),
    language_model=LanguageModelConfig(
        num_layers=3, width=32, num_heads=6, num_kv_heads=2, head_size=10, ffw_width=56, vocab_size=70, max_positions=128,
        positions=RotaryPositions(size=10),
    ),
    tokens=TokenIds(pad=0, bos=1, eoc=2, image=3, reset=4),
)  # fmt: skip

LLAMA = ModelConfig(
    name="llama-vision-like",
    vision=TiledViTConfig(
        image_size=28, patch_size=7, width=32, num_layers=4, num_global_layers=2, num_heads=4, ffw_width=56, feature_layers=(1, 3),
    ),
    resampler=projector_config(num_latents=17, width=48),
    cross_attention=CrossAttentionConfig(
        every=2, offset=1, num_heads=4, num_kv_heads=2, head_size=12, ffw_width=88, norm="rms_norm", qk_norm=True,
        feed_forward="swiglu", sees="group", without_media="nothing",
    ),
    language_model=LanguageModelConfig(
        num_layers=4, width=48, num_heads=4, num_kv_heads=2, head_size=12, ffw_width=88, vocab_size=70, extra_embeddings=8,
        max_positions=128, norm_eps=1e-5, feed_forward="swiglu", tied_head=False,
        positions=RotaryPositions(size=12, base=500.0, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=16)),
    ),
    tokens=TokenIds(pad=0, bos=1, eoc=2, image=70, ends=(3,)),
)  # fmt: skip

VARIATIONS = {config.name: config for config in (IDEFICS, MPT, NEOX, GROUPED, LLAMA)}


def drawn_model(config: ModelConfig, seed: int = 7, dtype: torch.dtype = torch.float32) -> Flamingo:
    """Seeded weights: gates of both signs, biases and scales that are neither zero nor one."""
    generator = torch.Generator().manual_seed(seed)
    model = Flamingo(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gate"):
                parameter.copy_(0.3 + 0.6 * drawn)
            elif name.endswith("skip_gain"):
                parameter.copy_(0.3 + 0.4 * drawn.abs())
            elif "norm" in name or name.endswith(("gain", "logit_scale")):
                parameter.copy_(parameter + 0.3 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * drawn)
            elif name.endswith(("latents", "time_embeddings", "embedding.weight")) and "patch" not in name:
                parameter.copy_(drawn)
            else:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
    return model.to(dtype).requires_grad_(False).eval()
