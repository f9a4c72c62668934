"""transformers' IDEFICS: its classes, its parts called as the reference's are, its masks of which token sees which image."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flamingo_export.validate.expected.transformers.text_layers import Ends, Layer, hidden_of
from flamingo_export.validate.expected.transformers.theirs import classes_called
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_export.validate.expected.transformers.streamed import StreamedModel

_TIED = {
    "lm_head.weight": "model.embed_tokens.weight",
    "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
}


class Idefics:
    """`theirs.Theirs` of IDEFICS v1."""

    settings: Mapping[str, Any] = {"alpha_initializer": "zeros"}
    """Gates come from the checkpoint; transformers 5.23 cannot draw scalar ones, which published files ask for."""

    def classes(self) -> tuple[Any, Any]:
        """IdeficsConfig and IdeficsForVisionText2Text."""
        return classes_called("IdeficsConfig", "IdeficsForVisionText2Text")

    def published(self, name: str, config: Any) -> str:
        """The name in the files of a parameter of the live model."""
        return _TIED.get(name, name) if config.tie_word_embeddings else name

    def correct(self, model: Any) -> None:
        """Nothing: it computes what the weights were trained with."""

    def kept(self, model: Any) -> Sequence[Any]:
        """None."""
        return ()

    @contextlib.contextmanager
    def part(self, streamed: StreamedModel, prefix: str) -> Iterator[Any]:
        """A part by the reference's name for it, called as the reference's is. What runs once or is large is read as it runs."""
        whole = streamed.model
        kind, _, index = prefix.rpartition(".")
        if prefix == "vision_encoder":
            yield lambda pixels: whole.model.vision_model(pixel_values=pixels).last_hidden_state
        elif prefix == "resampler":
            with streamed.held(whole.model.perceiver_resampler):
                yield lambda features: whole.model.perceiver_resampler(features.flatten(1, 2))
        elif prefix == "language_model":
            yield Ends(whole.model, whole.lm_head)
        elif kind == "language_model.layers":
            layer = whole.model.layers[int(index)]
            with streamed.held(layer):
                yield Layer(layer)
        elif kind == "cross_attention":
            block = whole.model.gated_cross_attn_layers[int(index)]
            with streamed.held(block):
                yield _Gated(block)
        else:
            raise ValueError(f"{prefix!r} is not part of a Flamingo")

    def inputs(
        self,
        streamed: StreamedModel,
        config: ModelConfig,
        sequences: Sequence[Sequence[int]],
        pixels: Tensor,
        aspects: Sequence[int],
    ) -> dict[str, Tensor]:
        """What the whole model takes. sequences: tokens of equal length; pixels [M, 3, I, I]: the images that each of them shows, in order."""
        dtype = next(streamed.model.parameters()).dtype
        token_ids = torch.tensor([list(sequence) for sequence in sequences])
        if not len(pixels):  # transformers wants an image; this one is seen by no token
            pixels = pixels.new_zeros(1, *pixels.shape[1:])
        mask = _image_attention_mask(token_ids, len(pixels), config)
        return {
            "input_ids": token_ids,
            "pixel_values": pixels.to(dtype)[None].expand(len(token_ids), *pixels.shape),
            "image_attention_mask": mask,
        }


class _Gated:
    """A gated cross-attention layer. It makes its keys and values of images at each call; here they are taken out and put in by hooks."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def media_kv(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[N, R, W'] -> keys and values [N, H, R, D]."""
        attention, found = self._block.cross_attn, {}
        last = attention.k_layer_norm if attention.qk_layer_norms else attention.k_proj
        with contextlib.ExitStack() as hooks:
            for name, module in (("k", last), ("v", attention.v_proj)):

                def keep(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                    found[name] = output

                hooks.callback(module.register_forward_hook(keep).remove)
            attention(latents.new_zeros(len(latents), 1, attention.hidden_size), key_value_states=latents)

        def by_head(tensor: Tensor) -> Tensor:
            if tensor.dim() == 4:
                return tensor
            apart: Tensor = tensor.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            return apart

        return by_head(found["k"]), by_head(found["v"])

    def __call__(self, hidden: Tensor, keys: Tensor, values: Tensor, rows: Tensor, phi: Tensor) -> Tensor:
        """hidden [1, S, W]; keys, values: the bank [N, H, R, D]; rows [1, M], phi [1, S] -> [1, S, W]."""
        attention = self._block.cross_attn
        shown, count = keys[rows[0]], keys.shape[2]
        with contextlib.ExitStack() as hooks:
            for projection, bank in ((attention.k_proj, keys), (attention.v_proj, values)):
                flat = bank[rows[0]].transpose(1, 2).flatten(2).flatten(0, 1)[None]
                hooks.callback(projection.register_forward_hook(lambda _, __, ___, flat=flat: flat).remove)
            if attention.qk_layer_norms:  # the bank's keys are normed already
                hooks.callback(attention.k_layer_norm.register_forward_hook(lambda _, given, ___: given[0]).remove)
            sees = phi[0][:, None] == torch.arange(1, len(shown) + 1)
            mask = torch.zeros(sees.shape, dtype=hidden.dtype).masked_fill(~sees, torch.finfo(hidden.dtype).min)
            output = self._block(
                hidden,
                image_hidden_states=hidden.new_zeros(1, len(shown) * count, attention.k_proj.in_features),
                image_attention_mask=mask.repeat_interleave(count, dim=1)[None, None],
                cross_attention_gate=sees.any(dim=1).to(hidden.dtype)[None],
            )
        return hidden_of(output)


def _image_attention_mask(token_ids: Tensor, num_images: int, config: ModelConfig) -> Tensor:
    """transformers' own [B, S, M]: which image each position sees."""
    processing: Any = importlib.import_module("transformers.models.idefics.processing_idefics")

    class _Ids:
        eos_token_id = config.tokens.reset

        @staticmethod
        def convert_tokens_to_ids(_: Any) -> int:
            return config.tokens.image

    seen, _ = processing.image_attention_mask_for_packed_input_ids(token_ids, _Ids(), "pt")
    mask: Tensor = processing.incremental_to_binary_attention_mask(seen, "pt", num_classes=num_images)
    return mask
