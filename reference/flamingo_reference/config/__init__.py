"""What a Flamingo model is made of: typed configuration and the paper's sizes.

Defaults are the paper's model; the other values of a choice are those of the families whose checkpoints people have (OpenFlamingo,
IDEFICS, Llama 3.2 Vision). Nothing here imports torch: the exporter and the runtime read the same description as the reference model.
Sources: Flamingo (arXiv 2204.14198, tables 1 and 5), Brock et al. 2021 (NFNet), Hoffmann et al. 2022 (Chinchilla).
"""

from __future__ import annotations

from flamingo_reference.config.bridge import CrossAttentionConfig, ResamplerConfig, projector_config
from flamingo_reference.config.choices import Activation, ConfigError, FeedForward, Norm
from flamingo_reference.config.model_config import ModelConfig, TokenIds
from flamingo_reference.config.sizes import NANO, NFNET_F6, PAPER_RESAMPLER, PAPER_TOKENS, QUOTED_PARAMETERS, SIZES
from flamingo_reference.config.text_decoder import (
    AlibiPositions,
    LanguageModelConfig,
    Llama3Scaling,
    RelativePositions,
    RotaryPositions,
)
from flamingo_reference.config.vision_encoders import NFNetConfig, OwnVisionConfig, TiledViTConfig, VisionConfig, ViTConfig

__all__ = [
    "NANO",
    "NFNET_F6",
    "PAPER_RESAMPLER",
    "PAPER_TOKENS",
    "QUOTED_PARAMETERS",
    "SIZES",
    "Activation",
    "AlibiPositions",
    "ConfigError",
    "CrossAttentionConfig",
    "FeedForward",
    "LanguageModelConfig",
    "Llama3Scaling",
    "ModelConfig",
    "NFNetConfig",
    "Norm",
    "OwnVisionConfig",
    "RelativePositions",
    "ResamplerConfig",
    "RotaryPositions",
    "TiledViTConfig",
    "TokenIds",
    "ViTConfig",
    "VisionConfig",
    "projector_config",
]
