"""transformers' Llama 3.2 Vision (Mllama), with two corrections, its parts called as the reference's are, its masks of which token sees what.

Meta's own code, with which the weights were trained, and transformers since 4.57 differ in two things; both are mended here:

    features   Meta takes the inputs of the layers that the config lists, transformers their outputs: each index is lowered by one
    rows       a token that sees no image passes a gated block unchanged; transformers masks its feed-forward and not its attention
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flamingo_export.validate.expected.transformers.text_layers import Ends, Layer, hidden_of
from flamingo_export.validate.expected.transformers.theirs import classes_called
from flamingo_reference.checkpoints.families import llama_vision
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_export.validate.expected.transformers.streamed import StreamedModel


def lower_feature_indices(model: Any) -> Callable[[], None]:
    """The first correction, in place; returns what ends it."""
    vision = model.model.vision_model
    listed = list(vision.intermediate_layers_indices)
    vision.intermediate_layers_indices = [index - 1 for index in listed]

    def undo() -> None:
        vision.intermediate_layers_indices = listed

    return undo


def mask_rows(model: Any) -> Callable[[], None]:
    """The second correction, in place; returns what ends it."""
    hooks = [hook for layer in model.model.language_model.layers if hasattr(layer, "cross_attn") for hook in _masked(layer)]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def _masked(layer: Any) -> list[Any]:
    """The mask of rows that the layer is given, on what its attention returns."""
    given: list[Tensor | None] = [None]

    def remember(_: Any, __: Any, arguments: Mapping[str, Any]) -> None:
        given[0] = arguments.get("full_text_row_masked_out_mask")

    def mask(_: Any, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return (output[0] if given[0] is None else output[0] * given[0][:, 0], output[1])

    return [
        layer.register_forward_pre_hook(remember, with_kwargs=True),
        layer.cross_attn.register_forward_hook(mask),
    ]


class Mllama:
    """`theirs.Theirs` of Llama 3.2 Vision."""

    settings: Mapping[str, Any] = {}

    def __init__(self, names: Collection[str]) -> None:
        """names: of the files' tensors, published ones or those of the live model."""
        self._live = llama_vision.has_live_names(names)

    def classes(self) -> tuple[Any, Any]:
        """MllamaConfig and MllamaForConditionalGeneration."""
        return classes_called("MllamaConfig", "MllamaForConditionalGeneration")

    def published(self, name: str, config: Any) -> str:
        """The name in the files of a parameter of the live model."""
        return name if self._live else llama_vision.plain_name(name)

    def correct(self, model: Any) -> None:
        """Both corrections."""
        lower_feature_indices(model)
        mask_rows(model)

    def kept(self, model: Any) -> Sequence[Any]:
        """The embedding of patches, whose device the vision model asks for."""
        return (model.model.vision_model.patch_embedding,)

    @contextlib.contextmanager
    def part(self, streamed: StreamedModel, prefix: str) -> Iterator[Any]:
        """A part by the reference's name for it, called as the reference's is. What runs once or is large is read as it runs."""
        whole = streamed.model
        text, vision = whole.model.language_model, whole.model.vision_model
        kind, _, index = prefix.rpartition(".")
        if prefix == "vision_encoder":
            yield lambda pixels, aspects: _features(vision, pixels, aspects)
        elif prefix == "resampler":
            yield lambda features: whole.model.multi_modal_projector(_interleaved(features[:, 0], vision.hidden_size))
        elif prefix == "language_model":
            yield Ends(whole.model.language_model, whole.lm_head)
        elif kind == "language_model.layers":
            layer = [each for each in text.layers if not hasattr(each, "cross_attn")][int(index)]
            with streamed.held(layer):
                yield Layer(layer, text.rotary_emb)
        elif kind == "cross_attention":
            block = [each for each in text.layers if hasattr(each, "cross_attn")][int(index)]
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
        """What the whole model takes. sequences: tokens of equal length; pixels [M, Tmax, 3, I, I]: the images that each of them shows, in
        order, and their aspect-ratio ids. Which token sees which tile is said by transformers' own processor."""
        given = {"input_ids": torch.tensor([list(sequence) for sequence in sequences])}
        if not len(aspects):
            return given
        assert config.tiled is not None
        most, count = config.tiled.max_tiles, len(sequences)
        tiles = [config.tiled.num_tiles(aspect) for aspect in aspects]
        processing: Any = importlib.import_module("transformers.models.mllama.processing_mllama")
        spans = [processing.get_cross_attention_token_mask(list(sequence), config.tokens.image) for sequence in sequences]
        dense = processing.convert_sparse_cross_attention_mask_to_dense(
            spans, [tiles] * count, max_num_tiles=most, length=len(sequences[0])
        )
        dtype = next(streamed.model.parameters()).dtype
        real = torch.tensor([[int(place < tile) for place in range(most)] for tile in tiles])
        return given | {
            "pixel_values": pixels.to(dtype)[None].expand(count, *pixels.shape),
            "aspect_ratio_ids": torch.tensor([list(aspects)]).expand(count, -1),
            "aspect_ratio_mask": real[None].expand(count, *real.shape),
            "cross_attention_mask": torch.from_numpy(dense),
        }


def _features(vision: Any, pixels: Tensor, aspects: Tensor) -> Tensor:
    """[F, T, P, E] of images [F, T, 3, I, I], in our order: the chosen layers one after the other, where theirs are interleaved."""
    sizes = torch.tensor(_tile_counts(vision))
    real = torch.arange(vision.max_num_tiles) < sizes[aspects][:, None]
    found = vision(
        pixel_values=pixels[None], aspect_ratio_ids=aspects[None], aspect_ratio_mask=real[None].to(torch.int64)
    ).last_hidden_state[0]
    width = vision.hidden_size
    layered = found[..., width:].unflatten(-1, (width, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat([found[..., :width], layered], dim=-1)


def _tile_counts(vision: Any) -> list[int]:
    """Tiles of each aspect-ratio id, 0 first."""
    return [0, *(rows * columns for rows, columns in vision.config.supported_aspect_ratios)]


def _interleaved(features: Tensor, width: int) -> Tensor:
    """Features [..., E] in the order of their projector's columns."""
    layered = features[..., width:].unflatten(-1, (-1, width)).transpose(-1, -2).flatten(-2)
    return torch.cat([features[..., :width], layered], dim=-1)


class _Gated:
    """A gated cross-attention layer. It makes its keys and values of images at each call; here they are taken out and put in by hooks."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def media_kv(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """[N, R, W] -> keys and values [N, G, R, D]."""
        attention, found = self._block.cross_attn, {}
        with contextlib.ExitStack() as hooks:
            for name, module in (("k", attention.k_norm), ("v", attention.v_proj)):

                def keep(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                    found[name] = output

                hooks.callback(module.register_forward_hook(keep).remove)
            attention(latents.new_zeros(len(latents), 1, attention.hidden_size), cross_attention_states=latents)
        values = found["v"].unflatten(-1, (attention.num_key_value_heads, attention.head_dim)).transpose(1, 2)
        return found["k"], values

    def __call__(self, hidden: Tensor, keys: Tensor, values: Tensor, rows: Tensor, phi: Tensor, first: Tensor) -> Tensor:
        """hidden [1, S, W]; keys, values: the bank [N, G, R, D]; rows [1, M], phi and first [1, S] -> [1, S, W]."""
        attention = self._block.cross_attn
        shown, count = keys[rows[0]], keys.shape[2]
        media = torch.arange(1, len(shown) + 1)
        sees = (first[0][:, None] <= media) & (media <= phi[0][:, None])
        with contextlib.ExitStack() as hooks:
            for projection, bank in ((attention.k_proj, keys), (attention.v_proj, values)):
                flat = bank[rows[0]].transpose(1, 2).flatten(2).flatten(0, 1)[None]
                hooks.callback(projection.register_forward_hook(lambda _, __, ___, flat=flat: flat).remove)
            # The bank's keys are normed already.
            hooks.callback(attention.k_norm.register_forward_hook(lambda _, given, ___: given[0]).remove)
            modeling: Any = importlib.import_module("transformers.models.mllama.modeling_mllama")
            mask, seeing = modeling._prepare_cross_attention_mask(
                sees[None, :, None].to(torch.int64), num_vision_tokens=count, dtype=hidden.dtype
            )
            output = self._block(
                hidden,
                cross_attention_states=hidden.new_zeros(1, len(shown) * count, attention.k_proj.in_features),
                cross_attention_mask=mask,
                attention_mask=None,
                full_text_row_masked_out_mask=seeing,
            )
        return hidden_of(output)
