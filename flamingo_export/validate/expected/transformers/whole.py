"""transformers' IDEFICS asked as a whole: its own masks of which token sees which image, its own generation loop."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.media import medium_of
from flamingo_export.validate.checks.compare import expect
from flamingo_export.validate.expected.cases import DecoderCase, encoder_cases
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.oracle import encoder_feeds, fed_positions
from flamingo_export.validate.expected.plan import plan_case
from flamingo_export.validate.expected.trace_prompts import TracePrompt
from flamingo_export.validate.expected.transformers.streamed import StreamedModel
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]


def record_whole(
    wide: StreamedModel,
    narrow: StreamedModel,
    config: ModelConfig,
    cases: Sequence[DecoderCase],
    goldens: Goldens,
    progress: Progress = SILENT,
) -> None:
    """Logits of the cases that begin with pixels, in place of those that came of the parts one after the other."""
    (frames,) = (case for case in encoder_cases(config) if case.subgraph == "vision_encoder")
    pixels = torch.from_numpy(encoder_feeds(config, frames)["pixels"])
    chosen = [case for case in cases if case.from_pixels]
    progress.stage("transformers as a whole", len(chosen))
    found = {}
    for case in chosen:
        plan = plan_case(config, case)
        ((index, fed),) = fed_positions(plan).items()
        sequence = plan.sequences[index]
        both = [logits(each, config, [sequence.tokens], pixels[list(sequence.media)])[0, fed] for each in (wide, narrow)]
        found[case.name] = expect(both[0].numpy(), both[1].numpy())
        progress.advance(1)
    # As for the cases of drawn media: it is one computation, and a case of few numbers does not find its largest error by itself.
    largest = float(np.max([value.torch_error for value in found.values()]))
    for name, value in found.items():
        goldens.put(name, "logits", msgspec.structs.replace(value, torch_error=largest))


def logits(streamed: StreamedModel, config: ModelConfig, sequences: Sequence[Sequence[int]], pixels: Tensor) -> Tensor:
    """[B, S, V] in the model's type. sequences: tokens of equal length; pixels [M, 3, I, I]: the images that each of them shows, in order."""
    with torch.no_grad(), streamed.mode():
        output = streamed.model(use_cache=False, **_inputs(streamed, config, sequences, pixels))
    found: Tensor = output.logits
    return found


class WholeModel:
    """A prompt's images and transformers' model, all of whose weights are held, as traces ask them."""

    def __init__(self, streamed: StreamedModel, config: ModelConfig, prompt: TracePrompt) -> None:
        self._streamed, self._config = streamed, config
        frames = [torch.from_numpy(medium_of(medium, config).pixels) for medium in prompt.media]
        side = config.vision.image_size
        self._pixels = torch.cat(frames) if frames else torch.zeros(0, 3, side, side)

    def logits(self, token_ids: npt.NDArray[np.int64]) -> Floats:
        """[B, S] -> [B, S, V]."""
        return np.asarray(logits(self._streamed, self._config, token_ids.tolist(), self._pixels).double().numpy())

    def generate(self, tokens: Sequence[int], *, beams: int, new_tokens: int) -> list[tuple[int, ...]]:
        """New tokens of every hypothesis, best first, of transformers' own loop with its cache; tokens that are
        never generated are taken out before the softmax."""
        ids = self._config.tokens
        model = self._streamed.model
        hook = model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor(ids.never), -torch.inf))
        try:
            with torch.no_grad(), self._streamed.mode():
                out = model.generate(
                    **_inputs(self._streamed, self._config, [tokens], self._pixels),
                    attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
                    num_beams=beams,
                    num_return_sequences=beams,
                    do_sample=False,
                    length_penalty=0.0,
                    early_stopping=False,
                    max_new_tokens=new_tokens,
                    eos_token_id=list(ids.stops),
                    pad_token_id=ids.pad,
                )
        finally:
            hook.remove()
        texts = [tuple(sequence[len(tokens) :].tolist()) for sequence in out]
        return [_up_to_end(text, ids.stops) for text in texts]


def _up_to_end(text: tuple[int, ...], stops: Sequence[int]) -> tuple[int, ...]:
    """A text without the padding after its end."""
    end = next((place for place, token in enumerate(text) if token in stops), len(text))
    return text[: end + 1]


def _inputs(
    streamed: StreamedModel, config: ModelConfig, sequences: Sequence[Sequence[int]], pixels: Tensor
) -> dict[str, Tensor]:
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
