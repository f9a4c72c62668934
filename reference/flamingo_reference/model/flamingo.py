"""Flamingo: frozen vision encoder, Perceiver Resampler, frozen language model with gated cross-attention.

Parameter names are those of `flamingo_reference.names.expected_tensors`. Shape suffixes: F frames, N media, T frames
of a medium, P patches, E feature width, R latents, B requests, S positions, M media of a request, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import torch
from torch import Tensor, nn

from flamingo_reference.arrays import Array
from flamingo_reference.checkpoints.families import native
from flamingo_reference.config import ModelConfig
from flamingo_reference.model.contrastive import Contrastive
from flamingo_reference.model.cross_attention import GatedCrossAttention
from flamingo_reference.model.decoder import LanguageModel
from flamingo_reference.model.resampler import make_resampler
from flamingo_reference.model.vision import make_vision_encoder
from flamingo_reference.names import expected_tensors
from flamingo_reference.time_weights import time_weights

MediaKV = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [N, H, R, D] of the media bank, one pair per gated layer."""


class Flamingo(nn.Module):
    """The whole model. Untrained gates are zero, so that an untrained bridge leaves the language model as it is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.vision_encoder: nn.Module = make_vision_encoder(config.vision)
        self.resampler = make_resampler(config)
        self.cross_attention = nn.ModuleList(GatedCrossAttention(config) for _ in config.gated_layers)
        self.language_model = LanguageModel(config.language_model)
        self.contrastive = Contrastive(config) if config.contrastive is not None else None

    def latents(self, pixels_NT3II: Tensor, aspect_ratio_ids_N: Tensor | None = None) -> Tensor:
        """Latents [N, R, W] of media of T frames each.

        aspect_ratio_ids: where media are tiles, and T is the most of them that an image has; latents are those of the tiles that there
        are, one image after the other. Raises ValueError where they are missing.
        """
        if (tiled := self.config.tiled) is not None:
            if aspect_ratio_ids_N is None:
                raise ValueError("aspect_ratio_ids [N] are missing: an image of this model is several tiles")
            features_NTPE = self.vision_encoder(pixels_NT3II, aspect_ratio_ids_N)
            real = [features[: tiled.num_tiles(int(i))] for features, i in zip(features_NTPE, aspect_ratio_ids_N, strict=True)]
            tiles_KRW: Tensor = self.resampler(torch.cat(real)[:, None])
            return tiles_KRW
        num_frames = pixels_NT3II.shape[1]
        features = self.vision_encoder(pixels_NT3II.flatten(0, 1)).unflatten(0, (-1, num_frames))
        num_embeddings = self.config.resampler.num_time_embeddings
        weights = torch.from_numpy(time_weights(num_frames, num_embeddings)).to(features) if num_embeddings else None
        latents: Tensor = self.resampler(features, weights)
        return latents

    def media_kv(self, latents_NRW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of media for every gated layer."""
        return [block.media_kv(latents_NRW) for block in self.gated_blocks()]

    def gated_blocks(self) -> list[GatedCrossAttention]:
        """The blocks before the LM layers `config.gated_layers`, in order."""
        return [block for block in self.cross_attention if isinstance(block, GatedCrossAttention)]

    def forward(
        self,
        token_ids_BS: Tensor,
        media_kv: MediaKV,
        media_rows_BM: Tensor,
        phi_BS: Tensor,
        first_media_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of whole sequences from position 0.

        token_ids, media_rows, phi and first_media are int64; phi n means bank row media_rows[b, n - 1], 0 no medium. first_media: the
        first medium that each position sees, where the config says that tokens see groups; raises ValueError where it is missing or too
        much.
        """
        if (first_media_BS is not None) != self.config.sees_groups:
            raise ValueError(
                f"first_media is {'missing' if self.config.sees_groups else 'given, and no token sees a range of media'}"
            )
        blocks = iter(zip(self.cross_attention, media_kv, strict=True))
        hidden = self.language_model.embedding(token_ids_BS)
        for index, layer in enumerate(self.language_model.layers):
            if index in self.config.gated_layers:
                block, (k_NHRD, v_NHRD) = next(blocks)
                hidden = block(hidden, k_NHRD, v_NHRD, media_rows_BM, phi_BS, first_media_BS)
            hidden = layer(hidden)
        return self.language_model.logits(hidden)

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> Flamingo:
        """The model of a checkpoint folder in our own format. Raises CheckpointError."""
        config, reader = native.load_native(Path(path))
        with torch.device("meta"):
            model = cls(config)
        state = {name: torch_from_numpy(reader.read(name)) for name in reader.names()}
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def save(self, path: Path | str, *, tokenizer: Path | None = None) -> None:
        """Writes a checkpoint folder in our own format. A vision encoder that is not ours is left out."""
        known = expected_tensors(self.config)
        tensors = ((name, numpy_from_torch(tensor)) for name, tensor in self.state_dict().items() if name in known)
        native.save_native(Path(path), self.config, tensors, tokenizer=tokenizer)


def numpy_from_torch(tensor: Tensor) -> Array:
    """An array of the same numbers, sharing memory where the tensor lies on the host; bfloat16 is that of ml_dtypes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def torch_from_numpy(array: Array) -> Tensor:
    """A tensor of the same numbers; bfloat16, which numpy lacks, is reinterpreted."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
