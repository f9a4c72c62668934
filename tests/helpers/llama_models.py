"""Small random models of transformers' Mllama classes, and what its processor makes of a prompt and its images.

transformers' model is used as it is but for two corrections, stated in validate/expected/transformers/mllama.py: the features are the inputs
of the layers that the config lists, and a token that sees no image passes a gated block unchanged. Meta's own code does both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from flamingo_export.validate.expected.transformers.mllama import lower_feature_indices, mask_rows
from flamingo_reference.checkpoints.families import llama_vision
from flamingo_reference.config import ModelConfig
from flamingo_reference.model import Flamingo
from flamingo_reference.phi import media_ranges

VOCAB, IMAGE, BOS, END, TURN = 70, 70, 1, 2, 3
SIDE, PATCH, TILES = 28, 7, 4

PROMPTS: dict[str, tuple[list[int], list[int]]] = {
    "image first": ([BOS, IMAGE, 20, 21, 22], [6]),
    "one tile": ([BOS, IMAGE, 20, 21], [1]),
    "two tiles in a row": ([BOS, IMAGE, 20, 21], [2]),
    "three tiles in a column": ([BOS, IMAGE, 20, 21], [7]),
    "text first": ([BOS, 7, 8, 9, IMAGE, 30, 31], [5]),
    "several images": ([BOS, IMAGE, 12, 13, IMAGE, 14, 15, IMAGE, 16], [1, 4, 6]),
    "adjacent images": ([BOS, 11, IMAGE, IMAGE, 20, 21, IMAGE, 22], [2, 5, 1]),
    "three in a group": ([IMAGE, IMAGE, IMAGE, 40, 41], [3, 8, 2]),
    "text only": ([BOS, 5, 6, 7, 8, 9], []),
}
"""Token ids, and the aspect-ratio id of each image."""


def their_config(*, cross: Sequence[int] = (1, 4), layers: int = 6, heads: int = 4, kv_heads: int = 2) -> MllamaConfig:
    """No two sizes are equal that could be mixed up; the default has gated blocks before LM layers 1 and 3 of 4."""
    return MllamaConfig(
        image_token_index=IMAGE,
        text_config=MllamaTextConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=88, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=128, rms_norm_eps=1e-5, cross_attention_layers=list(cross),
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            bos_token_id=BOS, eos_token_id=[END, TURN], pad_token_id=0, tie_word_embeddings=False,
        ),
        vision_config=MllamaVisionConfig(
            hidden_size=32, image_size=SIDE, patch_size=PATCH, intermediate_size=56, num_hidden_layers=5, num_global_layers=2,
            attention_heads=4, max_num_tiles=TILES, intermediate_layers_indices=[1, 2, 4], vision_output_dim=128,
            supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        ),
    )  # fmt: skip


def their_model(config: MllamaConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A model without a silent part: norms, biases, embeddings of tiles and gates of both signs are drawn too."""
    model = MllamaForConditionalGeneration._from_config(config or their_config(), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "gate" in name.rsplit(".", 1)[-1] or name.endswith("gate"):
                parameter.copy_(0.6 * drawn + 0.3)
            elif "norm" in name:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * drawn)
            else:
                wide = ("embedding.weight" in name and "patch" not in name) or name.endswith(
                    ("embed_tokens.weight", "embedding")
                )
                parameter.copy_(drawn if wide else drawn * 1.2 / parameter[0].numel() ** 0.5)
    return model.to(dtype).eval()


def published(config: MllamaConfig) -> dict[str, Any]:
    """What transformers writes as config.json."""
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return raw


def our_config(config: MllamaConfig, name: str = "llama-vision-tiny") -> ModelConfig:
    """The family's reading of that file."""
    return llama_vision.config_from(published(config), name=name)


def our_model(theirs: Any) -> Flamingo:
    """Ours with their weights, through the family's names."""
    config = our_config(theirs.config)
    tensors = {llama_vision.plain_name(name): tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    state = {
        name: torch.from_numpy(np.array(recipe.make([tensors[each] for each in recipe.sources])))
        for name, recipe in llama_vision.recipes(config).items()
    }
    model = Flamingo(config).to(next(theirs.parameters()).dtype)
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False).eval()


@contextmanager
def corrected(model: Any, *, features: bool = True, rows: bool = True) -> Iterator[Any]:
    """transformers' model as Meta's code computes it.

    features: each index of `intermediate_layers_indices` lowered by one, so that outputs of layers become inputs of the next. rows: the
    attention of a token that sees no image is zero, as its feed-forward is.
    """
    undo = [lower_feature_indices(model)] if features else []
    undo += [mask_rows(model)] if rows else []
    try:
        yield model
    finally:
        for each in undo:
            each()


def tiles_of(aspect_ratio_ids: Sequence[int]) -> list[int]:
    """Tiles of each image."""
    config = our_config(their_config())
    assert config.tiled is not None
    return [config.tiled.num_tiles(each) for each in aspect_ratio_ids]


def pixels(aspect_ratio_ids: Sequence[int], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Images [N, Tmax, 3, I, I], zeros in the padding tiles."""
    drawn = torch.randn(len(aspect_ratio_ids), TILES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for image, count in zip(drawn, tiles_of(aspect_ratio_ids), strict=True):
        image[count:] = 0
    return drawn


def their_inputs(tokens: list[int], aspect_ratio_ids: Sequence[int], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt: the masks are its own functions'."""
    given = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64)}
    if not aspect_ratio_ids:
        return given
    counts = tiles_of(aspect_ratio_ids)
    spans = get_cross_attention_token_mask(tokens, IMAGE)
    dense = convert_sparse_cross_attention_mask_to_dense([spans], [counts], max_num_tiles=TILES, length=len(tokens))
    return given | {
        "pixel_values": images[None],
        "aspect_ratio_ids": torch.tensor([list(aspect_ratio_ids)]),
        "aspect_ratio_mask": torch.tensor([[[int(place < count) for place in range(TILES)] for count in counts]]),
        "cross_attention_mask": torch.from_numpy(np.array(dense)),
    }


def their_logits(model: Any, tokens: list[int], aspect_ratio_ids: Sequence[int], images: torch.Tensor) -> torch.Tensor:
    """transformers' logits [S, V]; images [N, Tmax, 3, I, I]."""
    with torch.no_grad():
        logits: torch.Tensor = model(**their_inputs(tokens, aspect_ratio_ids, images)).logits[0]
    return logits


def our_bank(model: Flamingo, aspect_ratio_ids: Sequence[int], images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all tiles."""
    if not aspect_ratio_ids:
        latents = model.config.resampler
        return model.media_kv(torch.zeros(1, latents.num_latents, latents.width, dtype=images.dtype))
    return model.media_kv(model.latents(images, torch.tensor(list(aspect_ratio_ids))))


def our_logits(model: Flamingo, tokens: list[int], aspect_ratio_ids: Sequence[int], images: torch.Tensor) -> torch.Tensor:
    """The reference's logits [S, V]."""
    counts = np.array([tiles_of(aspect_ratio_ids)], np.int64).reshape(1, -1)
    first, phi = (torch.from_numpy(x) for x in media_ranges(np.array([tokens]), IMAGE, counts))
    rows = torch.arange(max(1, int(counts.sum())))[None]
    return model(torch.tensor([tokens]), our_bank(model, aspect_ratio_ids, images), rows, phi, first)[0]


def generated(
    model: Any, tokens: list[int], aspect_ratio_ids: Sequence[int], images: torch.Tensor, *, beams: int, new_tokens: int
) -> tuple[list[list[int]], list[float]]:
    """transformers' own greedy or beam search, with its cache."""
    out = model.generate(
        **their_inputs(tokens, aspect_ratio_ids, images), num_beams=beams, num_return_sequences=beams, do_sample=False,
        length_penalty=0.0, early_stopping=False, max_new_tokens=new_tokens, eos_token_id=[END, TURN], pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ended = []
    for sequence in out.sequences:
        text = sequence[len(tokens) :].tolist()
        stop = next((place + 1 for place, token in enumerate(text) if token in (END, TURN)), len(text))
        ended.append(text[:stop])
    return ended, out.sequences_scores.tolist() if beams > 1 else []
