"""Small models with a contrastive encoder of each kind. No two sizes are equal that could be mixed up."""

from __future__ import annotations

import msgspec
from variations import GROUPED, IDEFICS, MPT

from flamingo_reference.contrastive_config import ClassToken, ContrastiveConfig, Readout, TextConfig, bert, paper_contrastive

CLIP_TEXT = TextConfig(num_layers=2, width=24, num_heads=3, ffw_width=56, vocab_size=90, max_positions=11)
CLIP = msgspec.structs.replace(
    MPT,
    name="with-clip",
    contrastive=ContrastiveConfig(
        joint_width=18, pooling=ClassToken(), image_norm=True, text=CLIP_TEXT, template="a photo of a {}."
    ),
)
KEPT = msgspec.structs.replace(
    IDEFICS,
    name="with-clip-images",
    contrastive=ContrastiveConfig(joint_width=14, pooling=ClassToken(), image_norm=True, norm_eps=1e-6),
)
BERT = bert(num_layers=2, width=20, num_heads=5, ffw_width=44, vocab_size=80, max_positions=13)
PAPER = msgspec.structs.replace(
    GROUPED, name="as-the-paper", contrastive=msgspec.structs.replace(paper_contrastive(BERT), joint_width=26)
)
READ = msgspec.structs.replace(
    GROUPED,
    name="with-readout",
    contrastive=ContrastiveConfig(
        joint_width=22,
        pooling=Readout(num_latents=3, width=12, num_layers=2, num_heads=2, head_size=7, ffw_width=28),
        text=msgspec.structs.replace(CLIP_TEXT, causal=False, pooling="first", embedding_norm=True, activation="gelu"),
    ),
)
KINDS = {config.name: config for config in (CLIP, KEPT, PAPER, READ)}
