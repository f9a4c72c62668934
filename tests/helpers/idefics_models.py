"""Small random IDEFICS models of transformers' own class, and what its processor makes of a prompt."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.configuration_idefics import IdeficsPerceiverConfig, IdeficsVisionConfig

from flamingo_reference.checkpoints.families import idefics
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo

FAKE, IMAGE, END = 60, 61, 2
SIDE = 30  # four patches of 7 and two pixels that are not read

PROMPTS = {
    "one image": [1, 7, FAKE, IMAGE, FAKE, 20, 21],
    "several images": [1, FAKE, IMAGE, FAKE, IMAGE, FAKE, 30, 31, FAKE, IMAGE, FAKE, 12],
    "text before the first image": [1, 8, 9, 10, 11, FAKE, IMAGE, FAKE, 33],
    "text only after an end": [1, FAKE, IMAGE, FAKE, 20, END, 21, 22],
    "an end, then another image": [1, FAKE, IMAGE, FAKE, 20, END, 1, 40, FAKE, IMAGE, FAKE, 41],
    "an end before the first image": [1, 5, END, 6, FAKE, IMAGE, FAKE, 7],
}


def their_config(*, qk_norm: bool = True, vector: bool = False, tied: bool = False) -> IdeficsConfig:
    """No two sizes are equal that could be mixed up; gated before layers 0, 2 and 4."""
    return IdeficsConfig(
        vocab_size=60,
        additional_vocab_size=2,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=6,
        num_attention_heads=4,
        alpha_type="vector" if vector else "float",
        cross_layer_interval=2,
        qk_layer_norms=qk_norm,
        use_resampler=True,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        vision_config=IdeficsVisionConfig(
            embed_dim=40, image_size=SIDE, patch_size=7, intermediate_size=72, num_hidden_layers=2, num_attention_heads=5
        ),
        perceiver_config=IdeficsPerceiverConfig(
            use_resampler=True,
            resampler_n_latents=6,
            resampler_depth=2,
            resampler_n_heads=3,
            resampler_head_dim=10,
            qk_layer_norms_perceiver=qk_norm,
        ),
    )


def their_model(config: IdeficsConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A model without a silent part: norms, biases and gates of both signs are drawn too."""
    model = IdeficsForVisionText2Text._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "alpha" in name:
                parameter.copy_(0.6 * drawn + 0.3)
            elif name.endswith("norm.weight") or "layer_norm" in name or "layrnorm" in name or "layernorm" in name:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * drawn)
            else:
                wide = name.endswith(("latents", "embed_tokens.weight", "additional_embedding.weight"))
                parameter.copy_(drawn if wide else drawn * 1.2 / parameter[0].numel() ** 0.5)
    return model.to(dtype).eval()


def published(config: IdeficsConfig) -> dict[str, Any]:
    """What transformers writes as config.json."""
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return raw


def our_config(config: IdeficsConfig, name: str = "idefics-tiny") -> ModelConfig:
    """The family's reading of that file."""
    return idefics.config_from(published(config), name=name)


def our_model(theirs: Any) -> Flamingo:
    """Ours with their weights, through the family's names."""
    config = our_config(theirs.config)
    tensors = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    recipes = idefics.recipes(config, additional_vocab=theirs.config.additional_vocab_size)
    state = {
        name: torch.from_numpy(np.array(recipe.make([tensors[each] for each in recipe.sources])))
        for name, recipe in recipes.items()
    }
    model = Flamingo(config).to(next(theirs.parameters()).dtype)
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False).eval()


def pixels(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Images [1, count, 3, I, I]."""
    return torch.randn(1, count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def image_attention_mask(tokens: list[int], num_images: int) -> torch.Tensor:
    """transformers' own mask [1, S, M] of a prompt: which image each position sees."""
    from transformers.models.idefics import processing_idefics as processing

    class _Tokenizer:
        eos_token_id = END

        @staticmethod
        def convert_tokens_to_ids(token: str) -> int:
            assert token == processing.IMAGE_TOKEN
            return IMAGE

    seen, _ = processing.image_attention_mask_for_packed_input_ids(torch.tensor([tokens]), _Tokenizer(), "pt")
    mask: torch.Tensor = processing.incremental_to_binary_attention_mask(seen, "pt", num_classes=num_images)
    return mask


def their_logits(model: Any, tokens: list[int], images: torch.Tensor) -> torch.Tensor:
    """transformers' logits [S, V]; images [1, M, 3, I, I]."""
    mask = image_attention_mask(tokens, images.shape[1])
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), pixel_values=images, image_attention_mask=mask)
    logits: torch.Tensor = out.logits[0]
    return logits


def generated(
    model: Any, tokens: list[int], images: torch.Tensor, *, beams: int, new_tokens: int
) -> tuple[list[list[int]], list[float]]:
    """transformers' own greedy or beam search, with its cache; tags of images are taken out before the softmax, as they are
    here."""
    hook = model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([IMAGE, FAKE]), -torch.inf))
    out = model.generate(
        input_ids=torch.tensor([tokens]), pixel_values=images, image_attention_mask=image_attention_mask(tokens, images.shape[1]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64), num_beams=beams, num_return_sequences=beams, do_sample=False,
        length_penalty=0.0, early_stopping=False, max_new_tokens=new_tokens, eos_token_id=END, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    hook.remove()
    texts = [sequence[len(tokens) :].tolist() for sequence in out.sequences]
    ended = [text[: text.index(END) + 1] if END in text else text for text in texts]
    return ended, out.sequences_scores.tolist() if beams > 1 else []
