"""Build a bundle from a model in memory, one that was just trained, say. Needs PyTorch.

python examples/build_live_model.py live.bundle
"""

from __future__ import annotations

import sys

import flamingo_export
from flamingo_reference.config import (
    CrossAttentionConfig,
    LanguageModelConfig,
    ModelConfig,
    NFNetConfig,
    ResamplerConfig,
    TokenIds,
)
from flamingo_reference.model import Flamingo

SMALL = ModelConfig(
    name="small",
    vision=NFNetConfig(
        image_size=32, widths=(16, 32), depths=(1, 1), stem_widths=(4, 8, 8, 16), feature_width=32, group_width=8
    ),
    resampler=ResamplerConfig(num_layers=1, width=32, num_heads=2, head_size=16, ffw_width=64, num_latents=8),
    cross_attention=CrossAttentionConfig(every=2, num_heads=2, head_size=16, ffw_width=64),
    language_model=LanguageModelConfig(
        num_layers=2, width=32, num_heads=2, head_size=16, ffw_width=64, vocab_size=64, max_positions=64
    ),
    tokens=TokenIds(pad=0, bos=1, eoc=2, image=3),
)


def main(out: str) -> None:
    """Builds, proves the graphs against the very model that is given, and generates token ids."""
    model = Flamingo(SMALL).eval()
    result = flamingo_export.build(model, out=out)
    print(f"{result.path}: parity {result.manifest.parity.state}")
    with flamingo_export.load(result.path) as loaded:
        print(loaded.generate([1, 5, 6], max_new_tokens=4).token_ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
