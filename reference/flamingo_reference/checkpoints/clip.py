"""CLIP's vision transformer as transformers names its tensors, also inside of IDEFICS."""

from __future__ import annotations

from flamingo_reference.checkpoints.recipes import Recipe, as_is, with_bias
from flamingo_reference.config import ViTConfig

# CLIP's preprocessing (Radford et al. 2021): mean and standard deviation of RGB in 0..1.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def recipes(vision: ViTConfig, prefix: str) -> dict[str, Recipe]:
    """Our names, below `vision_encoder.`, to transformers' below `prefix`."""
    width, inner = vision.width, vision.ffw_width
    found = {
        "class_embedding": as_is(f"{prefix}embeddings.class_embedding", (width,)),
        "patch_embedding.weight": as_is(
            f"{prefix}embeddings.patch_embedding.weight", (width, 3, vision.patch_size, vision.patch_size)
        ),
        "position_embedding.weight": as_is(f"{prefix}embeddings.position_embedding.weight", (vision.grid_size + 1, width)),
        **with_bias("pre_norm", f"{prefix}pre_layrnorm", (width,)),  # sic
    }
    for i in range(vision.num_layers):
        ours, theirs = f"layers.{i}", f"{prefix}encoder.layers.{i}"
        found |= with_bias(f"{ours}.attention_norm", f"{theirs}.layer_norm1", (width,))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= with_bias(f"{ours}.{name}", f"{theirs}.self_attn.{name}", (width, width))
        found |= with_bias(f"{ours}.ffw_norm", f"{theirs}.layer_norm2", (width,))
        found |= with_bias(f"{ours}.ffw_up", f"{theirs}.mlp.fc1", (inner, width))
        found |= with_bias(f"{ours}.ffw_down", f"{theirs}.mlp.fc2", (width, inner))
    if vision.final_norm:
        found |= with_bias("final_norm", f"{prefix}post_layernorm", (width,))
    return {f"vision_encoder.{name}": recipe for name, recipe in found.items()}
