"""The towers against transformers' CLIP and BERT and against open_clip, read from each layout of CLIP's files."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kinds import BERT
from torch import Tensor
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from variations import MPT

from flamingo_reference.checkpoints.conversions import Recipe
from flamingo_reference.checkpoints.families import clip, clip_towers
from flamingo_reference.config import ConfigError, ModelConfig
from flamingo_reference.model.contrastive import Contrastive, TextTower, features_and_pooled
from flamingo_reference.model.vision_vit import ViT

SIDE, PATCH, CONTEXT, VOCAB, END = 28, 7, 12, 96, 95
LENGTHS = (5, 12, 2, 9)


def draw(module: Any, seed: int) -> Any:
    """Numbers for every parameter, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            norm = any(part in name for part in ("norm", "ln_", "LayerNorm")) and name.endswith("weight")
            if name == "logit_scale":
                parameter.fill_(2.5)
            elif parameter.dim() == 1:
                parameter.copy_((1.0 if norm else 0.0) + 0.3 * drawn)
            elif "embedding" in name and parameter.dim() == 2:
                parameter.copy_(drawn)
            else:
                parameter.copy_(drawn * 1.2 / parameter[0].numel() ** 0.5)
    return module.double().eval()


def texts() -> Tensor:
    """Tokens of four texts, each ending with END, which is the largest id; END after it too, as CLIP pads."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, END, (len(LENGTHS), CONTEXT), generator=generator)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[length - 1 :] = END
    return ids


def pixels() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def ours(
    tensors: Mapping[str, Any], settings: Mapping[str, Any], open_clip: Mapping[str, Any], vision: Any
) -> tuple[Contrastive, ViT]:
    """Our towers and image encoder, of the tensors in a file."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    towers = clip_towers.towers_of(shapes, settings, open_clip, vision)
    assert towers.config is not None, towers.note
    config = msgspec.structs.replace(MPT, vision=vision, contrastive=towers.config)

    def filled(module: Any, recipes: Mapping[str, Recipe], prefix: str) -> Any:
        made = {
            name.removeprefix(prefix): torch.from_numpy(np.array(recipe.make([np.asarray(tensors[s]) for s in recipe.sources])))
            for name, recipe in recipes.items()
        }
        module.double().load_state_dict(made, strict=True)
        return module

    contrastive = filled(Contrastive(config), clip_towers.recipes(towers.config, vision, shapes), "contrastive.")
    return contrastive, filled(ViT(vision), clip.recipes_for(vision, shapes), "vision_encoder.")


def embeddings(contrastive: Contrastive, encoder: ViT) -> tuple[Tensor, Tensor]:
    assert contrastive.text is not None
    with torch.no_grad():
        _, pooled = features_and_pooled(encoder, pixels(), contrastive.config, None)
        return contrastive.image(pooled), contrastive.text(texts(), torch.tensor(LENGTHS))


def transformers_clip(activation: str) -> Any:
    text = CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, hidden_act=activation,
        max_position_embeddings=CONTEXT, eos_token_id=END, layer_norm_eps=1e-4,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=PATCH,
        hidden_act=activation, layer_norm_eps=1e-4,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return draw(CLIPModel._from_config(config, attn_implementation="eager"), 1)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_clip(activation: str) -> None:
    theirs = transformers_clip(activation)
    settings = theirs.config.to_dict()
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    contrastive, encoder = ours(tensors, settings, {}, clip.config_from(settings))
    with torch.no_grad():
        wanted = theirs(input_ids=texts(), pixel_values=pixels())
    images, of_texts = embeddings(contrastive, encoder)
    # transformers takes softmax in fp32 whatever the model's type.
    torch.testing.assert_close(images, wanted.image_embeds, rtol=0, atol=2e-6)
    torch.testing.assert_close(of_texts, wanted.text_embeds, rtol=0, atol=2e-6)
    assert contrastive.logit_scale is not None
    logits = images @ of_texts.T * contrastive.logit_scale.exp()
    torch.testing.assert_close(logits, wanted.logits_per_image, rtol=0, atol=1e-4)


class Anything(ModuleType):
    """A module that has every name. torchvision decodes and augments images, which nothing here does; it is not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or MagicMock(name=name)


def imported_open_clip() -> Any:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: pip install --no-deps open-clip-torch ftfy wcwidth")
    names = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.ops",
        "torchvision.ops.misc",
    ]
    absent = importlib.util.find_spec("torchvision") is None
    with pytest.MonkeyPatch.context() as patch:
        for name in names if absent else ():
            module = Anything(name)
            module.__path__ = []
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("open_clip.model")


def open_clip_model(
    quick_gelu: bool, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    open_clip = imported_open_clip()
    text = {"context_length": CONTEXT, "vocab_size": VOCAB, "width": 48, "heads": 3, "layers": 2, **(text or {})}
    vision = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": PATCH, **(vision or {})}
    raw = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    model = draw(open_clip.CLIP(24, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu=quick_gelu), 2)
    return model, {"model_cfg": raw, "preprocess_cfg": {}}


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
def test_open_clip(quick_gelu: bool) -> None:
    theirs, raw = open_clip_model(quick_gelu)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    contrastive, encoder = ours(tensors, {}, raw, clip._open_clip_encoder(shapes, raw).vision)
    with torch.no_grad():
        wanted_images = theirs.encode_image(pixels(), normalize=True)
        wanted_texts = theirs.encode_text(texts(), normalize=True)
    images, of_texts = embeddings(contrastive, encoder)
    torch.testing.assert_close(images, wanted_images, rtol=0, atol=1e-9)
    torch.testing.assert_close(of_texts, wanted_texts, rtol=0, atol=1e-9)
    assert contrastive.logit_scale is not None
    assert math.isclose(contrastive.logit_scale.item(), 2.5, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("vision", "text", "why"),
    [
        ({"pool_type": "avg"}, {}, "pool_type is 'avg', which is not supported"),
        ({}, {"qk_norm": True}, r"the text encoder holds transformer.resblocks.0.attn.ln_q.weight, which CLIP's has not"),
        ({}, {"scale_heads": True}, "the text encoder holds transformer.resblocks.0.attn.head_scale"),
        ({"final_ln_after_pool": True}, {}, None),
        ({}, {"block_type": "custom"}, None),
    ],
)
def test_open_clips_towers_are_right_or_left_out(vision: dict[str, Any], text: dict[str, Any], why: str | None) -> None:
    """What is not CLIP's changes open_clip's embeddings; those kinds that do not are computed as it does."""
    theirs, raw = open_clip_model(True, vision=vision, text=text)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    encoder_config = clip._open_clip_encoder(shapes, raw).vision
    if why is not None:
        found = clip_towers.towers_of(shapes, {}, raw, encoder_config)
        assert found.config is None
        assert why in found.note
        return
    images, of_texts = embeddings(*ours(tensors, {}, raw, encoder_config))
    with torch.no_grad():
        torch.testing.assert_close(images, theirs.encode_image(pixels(), normalize=True), rtol=0, atol=1e-9)
        torch.testing.assert_close(of_texts, theirs.encode_text(texts(), normalize=True), rtol=0, atol=1e-9)


def test_openais_own_layout() -> None:
    """transformers' tensors by the names of OpenAI's file, q, k and v joined, projections the other way round; heads are of 64."""
    text = CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, eos_token_id=END,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=1, image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    theirs = draw(CLIPModel._from_config(config, attn_implementation="eager"), 5)
    tensors = as_openais({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    contrastive, encoder = ours(tensors, {}, {}, clip.config_from_shapes(shapes))
    with torch.no_grad():
        wanted = theirs(input_ids=texts(), pixel_values=pixels())
    images, of_texts = embeddings(contrastive, encoder)
    torch.testing.assert_close(images, wanted.image_embeds, rtol=0, atol=2e-6)
    torch.testing.assert_close(of_texts, wanted.text_embeds, rtol=0, atol=2e-6)


def as_openais(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of ViT-L-14.pt: how OpenAI's names stand to transformers'."""
    found: dict[str, Any] = {
        "visual.class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": tensors["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": tensors["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": tensors["visual_projection.weight"].T,
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T,
        "logit_scale": tensors["logit_scale"],
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = tensors[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = tensors[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
        for i in range(2):
            for side, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
                mine, at = f"{side}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                joined = [tensors[f"{at}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                found[f"{mine}.attn.in_proj_{kind}"] = np.concatenate(joined)
                for name, other in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    found[f"{mine}.{name}.{kind}"] = tensors[f"{at}.{other}.{kind}"]
    return found


def test_transformers_bert_read_by_its_mean() -> None:
    """The paper's text tower; the embedding of the first segment is part of the positions'."""
    raw = BertConfig(
        vocab_size=BERT.vocab_size, hidden_size=BERT.width, num_hidden_layers=BERT.num_layers, num_attention_heads=BERT.num_heads,
        intermediate_size=BERT.ffw_width, max_position_embeddings=BERT.max_positions,
    )  # fmt: skip
    theirs = draw(BertModel._from_config(raw, attn_implementation="eager", add_pooling_layer=False), 6)
    proj = torch.randn(9, BERT.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = theirs.state_dict()
    tower = TextTower(BERT, 9).double()
    mine = {
        "embedding.weight": state["embeddings.word_embeddings.weight"],
        "position_embedding.weight": state["embeddings.position_embeddings.weight"]
        + state["embeddings.token_type_embeddings.weight"][0],
        "proj.weight": proj,
    }
    layer = {
        "q_proj": "attention.self.query", "k_proj": "attention.self.key", "v_proj": "attention.self.value",
        "out_proj": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        "ffw_up": "intermediate.dense", "ffw_down": "output.dense", "ffw_norm": "output.LayerNorm",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        mine[f"embedding_norm.{kind}"] = state[f"embeddings.LayerNorm.{kind}"]
        for i in range(BERT.num_layers):
            mine |= {f"layers.{i}.{name}.{kind}": state[f"encoder.layer.{i}.{other}.{kind}"] for name, other in layer.items()}
    tower.load_state_dict(mine, strict=True)
    lengths = torch.tensor([4, 13, 1])
    ids = torch.randint(0, BERT.vocab_size, (3, 13), generator=torch.Generator().manual_seed(2))
    real = (torch.arange(13) < lengths[:, None]).double()
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=real).last_hidden_state
        mean = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        found = tower(ids, lengths)
    torch.testing.assert_close(found, F.normalize(mean @ proj.T, dim=-1), rtol=0, atol=2e-6)


def test_padding_changes_no_embedding() -> None:
    for config in (BERT, msgspec.structs.replace(BERT, causal=True, pooling="last")):
        tower = draw(TextTower(config, 9), 7)
        ids = torch.randint(0, config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(2))
        lengths = torch.tensor([6, 10])
        with torch.no_grad():
            padded = tower(ids, lengths)[0]
            torch.testing.assert_close(padded, tower(ids[:1, :6], lengths[:1])[0], rtol=0, atol=1e-12)


def settings_of(**text: Any) -> dict[str, Any]:
    return {"model_cfg": {"embed_dim": 24, "vision_cfg": {}, "text_cfg": text}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ({"hf_model_name": "roberta-base"}, "hf_model_name is 'roberta-base'"),
        ({"no_causal_mask": True}, "no_causal_mask is True"),
        ({"pool_type": "last"}, "pool_type is 'last'"),
        ({"act_kwargs": {"approximate": "tanh"}}, "act_kwargs is"),
    ],
)
def test_text_towers_that_compute_something_else_are_left_out_by_name(text: dict[str, Any], why: str) -> None:
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in _openai_tensors().items()}
    found = clip_towers.towers_of(shapes, {}, settings_of(**text), clip.config_from_shapes(shapes))
    assert found.config is None
    assert why in found.note


def _openai_tensors() -> dict[str, Any]:
    theirs = transformers_clip("gelu")
    return as_openais({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})


def test_an_image_encoder_that_was_pooled_by_its_mean_in_earlier_open_clip() -> None:
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in _openai_tensors().items()}
    raw = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"global_average_pool": True}, "text_cfg": {}}}
    found = clip_towers.towers_of(shapes, {}, raw, clip.config_from_shapes(shapes))
    assert found.config is None
    assert "global_average_pool is True, which is not supported" in found.note


def test_files_without_towers_and_with_half_of_them() -> None:
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in _openai_tensors().items()}
    vision = clip.config_from_shapes(shapes)
    images_alone = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    found = clip_towers.towers_of(images_alone, {}, {}, vision)
    assert found.config is not None
    assert found.config.text is None
    assert (
        clip_towers.towers_of({n: s for n, s in images_alone.items() if n != "visual.proj"}, {}, {}, vision)
        == clip_towers.Towers()
    )
    half = {name: shape for name, shape in shapes.items() if name != "text_projection"}
    assert "text_projection missing" in clip_towers.towers_of(half, {}, {}, vision).note
    other = {**shapes, "visual.proj": (7, 24)}
    assert "visual.proj has shape (7, 24)" in clip_towers.towers_of(other, {}, {}, vision).note


def test_a_config_of_the_whole_model_names_a_fault_of_its_text_tower() -> None:
    text = msgspec.structs.replace(BERT, max_positions=0)
    bad: ModelConfig = msgspec.structs.replace(MPT, contrastive=msgspec.structs.replace(_clip_config(), text=text))
    with pytest.raises(ConfigError, match=r"contrastive\.text\.max_positions is 0"):
        bad.validate()


def _clip_config() -> Any:
    shapes = {name: tuple(np.shape(tensor)) for name, tensor in _openai_tensors().items()}
    return clip_towers.towers_of(shapes, {}, {}, clip.config_from_shapes(shapes)).config
