"""CLIP's image encoder against transformers, with and without class token, last norm and QuickGELU, read from either layout of its files."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from openflamingo_models import as_openai, draw
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

from flamingo_reference.checkpoints.families import clip
from flamingo_reference.config import ConfigError
from flamingo_reference.model.vision_vit import ViT


def their_encoder(activation: str = "quick_gelu") -> Any:
    """Pictures of 30 pixels hold 4 x 4 patches of 7; two pixels are not read."""
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=7,
        hidden_act=activation, layer_norm_eps=1e-4,
    )  # fmt: skip
    return draw(CLIPVisionModel._from_config(config, attn_implementation="eager"), 1)


def published(model: Any) -> dict[str, Any]:
    """Its tensors by the names that CLIP's files have."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {name if name.startswith("vision_model.") else f"vision_model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["openai", "transformers"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("class_token", "final_norm"), [(False, False), (True, False), (False, True), (True, True)])
def test_features(activation: str, class_token: bool, final_norm: bool, layout: str) -> None:
    theirs = their_encoder(activation)
    tensors = published(theirs) if layout == "transformers" else as_openai(published(theirs))
    config = msgspec.structs.replace(clip.config_from(theirs.config.to_dict()), class_token=class_token, final_norm=final_norm)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    recipes = clip.recipes_for(config, shapes)
    encoder = ViT(config).double()
    encoder.load_state_dict(
        {
            name.removeprefix("vision_encoder."): torch.from_numpy(
                np.array(recipe.make([tensors[source] for source in recipe.sources]))
            )
            for name, recipe in recipes.items()
        }
    )
    pixels = torch.randn(2, 3, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels).last_hidden_state
        wanted = (
            theirs.get_submodule("post_layernorm" if hasattr(theirs, "post_layernorm") else "vision_model.post_layernorm")(
                wanted
            )
            if final_norm
            else wanted
        )
        found = encoder(pixels)
    assert found.shape[1] == config.num_patches
    # transformers takes softmax in fp32 whatever the model's type.
    torch.testing.assert_close(found, wanted if class_token else wanted[:, 1:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["openai", "transformers"])
def test_sizes_are_read_off_the_shapes(layout: str) -> None:
    tensors = published(their_encoder())
    tensors = tensors if layout == "transformers" else as_openai(tensors)
    found = clip.config_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert (found.image_size, found.patch_size, found.width, found.num_layers, found.ffw_width) == (28, 7, 64, 2, 96)
    assert (found.num_heads, found.num_patches, found.activation) == (1, 16, "quick_gelu")


def test_the_published_encoder() -> None:
    """ViT-L/14: 224 pixels, 256 patches of 1024, 24 layers of 16 heads (facts of its file)."""
    shapes = {
        "visual.conv1.weight": (1024, 3, 14, 14), "visual.positional_embedding": (257, 1024),
        **{f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": (4096, 1024) for i in range(24)},
    }  # fmt: skip
    found = clip.config_from_shapes(shapes)
    assert (found.image_size, found.num_patches, found.feature_width, found.num_layers, found.num_heads) == (
        224,
        256,
        1024,
        24,
        16,
    )
    assert (found.class_token, found.final_norm, found.activation, found.ffw_width) == (False, False, "quick_gelu", 4096)


def test_a_whole_clip_has_nothing_that_is_not_accounted_for() -> None:
    import re

    from transformers import CLIPConfig, CLIPTextConfig

    text = CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    vision = their_encoder().config
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    names = set(model.state_dict())
    read = {source for recipe in clip.recipes_for(clip.config_from(vision.to_dict()), {}).values() for source in recipe.sources}
    assert read < names
    left = {name for name in names - read if not any(re.fullmatch(pattern, name) for pattern, _ in clip.IGNORED)}
    assert not left


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_act is 'relu', which is not supported; expected 'quick_gelu', 'gelu'"):
        clip.config_from({"hidden_act": "relu"})
