"""transformers' model asked as a whole: its own masks of which token sees which image, its own generation loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from flamingo_export.progress import SILENT, Progress
from flamingo_export.runtime.media import medium_of
from flamingo_export.validate.checks.tensor_checks import expect
from flamingo_export.validate.expected.cases import DecoderCase, encoder_cases
from flamingo_export.validate.expected.decoder_calls import plan_case
from flamingo_export.validate.expected.golden import Goldens
from flamingo_export.validate.expected.oracle import encoder_feeds, fed_positions
from flamingo_export.validate.expected.trace_prompts import TracePrompt
from flamingo_export.validate.expected.transformers.streamed import StreamedModel
from flamingo_reference.arrays import Floats
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


def record_whole(
    fp64: StreamedModel,
    rounded: StreamedModel,
    config: ModelConfig,
    cases: Sequence[DecoderCase],
    goldens: Goldens,
    progress: Progress = SILENT,
) -> None:
    """Logits of the cases that begin with pixels, in place of those that came of the parts one after the other."""
    (frames,) = (case for case in encoder_cases(config) if case.subgraph == "vision_encoder")
    pixels, *rest = (torch.from_numpy(array) for array in encoder_feeds(config, frames).values())
    aspects = rest[0].tolist() if rest else [0] * len(pixels)
    chosen = [case for case in cases if case.from_pixels]
    progress.stage("transformers as a whole", len(chosen))
    found = {}
    for case in chosen:
        plan = plan_case(config, case)
        ((index, fed),) = fed_positions(plan).items()
        sequence = plan.sequences[index]
        images, shown = list(sequence.media), [aspects[image] for image in sequence.media]
        both = [logits(each, config, [sequence.tokens], pixels[images], shown)[0, fed] for each in (fp64, rounded)]
        found[case.name] = expect(both[0].numpy(), both[1].numpy())
        progress.advance(1)
    # As for the cases of drawn media: it is one computation, and a case of few numbers does not find its largest error by itself.
    largest = float(np.max([value.torch_error for value in found.values()]))
    for name, value in found.items():
        goldens.put(name, "logits", msgspec.structs.replace(value, torch_error=largest))


def logits(
    streamed: StreamedModel, config: ModelConfig, sequences: Sequence[Sequence[int]], pixels: Tensor, aspects: Sequence[int]
) -> Tensor:
    """[B, S, V] in the model's type. sequences: tokens of equal length; pixels [M, 3, I, I], of tiles [M, Tmax, 3, I, I]: the images that
    each of them shows, in order; aspects: aspect-ratio ids of images of tiles, else 0."""
    with torch.no_grad(), streamed.mode():
        output = streamed.model(use_cache=False, **streamed.theirs.inputs(streamed, config, sequences, pixels, aspects))
    found: Tensor = output.logits
    return found


class WholeModel:
    """A prompt's images and transformers' model, all of whose weights are held, as traces ask them."""

    def __init__(self, streamed: StreamedModel, config: ModelConfig, prompt: TracePrompt) -> None:
        self._streamed, self._config = streamed, config
        media = [medium_of(frames, config) for frames in prompt.media]
        side = config.vision.image_size
        empty = torch.zeros(0, 3, side, side)
        self._pixels = torch.cat([torch.from_numpy(medium.pixels) for medium in media]) if media else empty
        self._aspects = [medium.aspect for medium in media]

    def logits(self, token_ids: npt.NDArray[np.int64]) -> Floats:
        """[B, S] -> [B, S, V]."""
        return np.asarray(
            logits(self._streamed, self._config, token_ids.tolist(), self._pixels, self._aspects).double().numpy()
        )

    def generate(self, tokens: Sequence[int], *, beams: int, new_tokens: int) -> list[tuple[int, ...]]:
        """New tokens of every hypothesis, best first, of transformers' own loop with its cache; tokens that are
        never generated are taken out before the softmax."""
        ids = self._config.tokens
        model = self._streamed.model
        banned = torch.tensor(self._config.banned_logits, dtype=torch.int64)
        hook = model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, banned, -torch.inf))
        try:
            with torch.no_grad(), self._streamed.mode():
                out = model.generate(
                    **self._streamed.theirs.inputs(self._streamed, self._config, [tokens], self._pixels, self._aspects),
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
