"""Token traces of the reference: its plain search on the whole model in fp64, and how far PyTorch's fp32 is from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.bundle.manifest import Manifest, ShapeLimits
from flamingo_export.errors import CapacityError
from flamingo_export.precision import StorageType
from flamingo_export.progress import Progress
from flamingo_export.runtime.cache import check_capacity, check_positions
from flamingo_export.runtime.media import Medium, medium_of
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sources import LiveSource, WeightSource
from flamingo_export.validate.expected.golden import GoldenText, GoldenTrace
from flamingo_export.validate.expected.reference_parts import torch_dtype
from flamingo_export.validate.expected.rounding import StoredRounding
from flamingo_export.validate.expected.trace_prompts import TracePrompt, to_png, trace_prompts
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import Tags
from flamingo_reference.phi import media_ranges, phi_from_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_reference.model import Flamingo

BEAMS = (1, 3)


def record_traces(
    source: WeightSource,
    stored: StoredRounding,
    manifest: Manifest,
    tokenizer: Path | None,
    progress: Progress,
    *,
    arithmetic: StorageType = "fp32",
) -> tuple[GoldenTrace, ...]:
    """Greedy and beam-3 traces of every prompt that fits the bundle's limits. Needs torch, and memory for the whole model.

    arithmetic: fp16 or bf16 to record PyTorch's error in that type, beside its error in fp32 on stored weights.
    """
    import torch

    fp64, *rounded = reference_models(source, stored)
    if arithmetic != "fp32":
        rounded.append(copy.deepcopy(rounded[0]).to(torch_dtype(arithmetic)))
    with torch.no_grad():
        return traces_of(
            msgspec.structs.replace(source.config, tokens=manifest.config.tokens),
            manifest.limits,
            tokenizer,
            source.inputs.tags,
            lambda prompt: [_AskedReference(model, prompt) for model in (fp64, *rounded)],
            progress,
        )


class AskedModel(Protocol):
    """A whole model and the media of one prompt."""

    def logits(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[B, S] -> [B, S, V]."""

    def generate(self, tokens: Sequence[int], *, beams: int, new_tokens: int) -> list[tuple[int, ...]] | None:
        """New tokens of every hypothesis by a search of the model's own, best first; None if it has none."""


def traces_of(
    config: ModelConfig,
    limits: ShapeLimits,
    tokenizer: Path | None,
    tags: Tags,
    models: Callable[[TracePrompt], Sequence[AskedModel]],
    progress: Progress,
) -> tuple[GoldenTrace, ...]:
    """Greedy and beam-3 traces of every prompt that fits the bundle's limits. models: for a prompt, those in fp64 and fp32, and in 16 bits
    where that is wanted."""
    decode = Tokenizer.open(tokenizer.parent.parent, config, tags).decode if tokenizer is not None else None
    prompts = trace_prompts(config, tokenizer)
    progress.stage("reference token traces", len(prompts) * len(BEAMS))
    traces = []
    for prompt in prompts:
        fp64, *rounded = models(prompt)
        for beams in BEAMS:
            try:
                check_capacity(prompt=len(prompt.tokens), width=beams, new_tokens=prompt.new_tokens, limits=limits)
                known = config.language_model.position_limit
                check_positions(prompt=len(prompt.tokens), new_tokens=prompt.new_tokens, position_limit=known)
            except CapacityError:
                progress.advance(1)
                continue
            trace = _trace(config, fp64, rounded, prompt, beams)
            if decode is not None:
                trace = _with_text(trace, decode(trace.tokens).strip())
            traces.append(trace)
            progress.advance(1)
    return tuple(traces)


def reference_models(source: WeightSource, stored: StoredRounding) -> tuple[Flamingo, Flamingo]:
    """The whole reference in fp64, and in fp32 with weights as the bundle stores them: the live model itself where that is the same."""
    import torch

    from flamingo_reference.model import Flamingo, torch_from_numpy

    if isinstance(source, LiveSource):
        model = source.model
    else:
        with torch.device("meta"):
            model = Flamingo(source.config)
        model.load_state_dict({name: torch_from_numpy(source.read(name)) for name in source.names()}, assign=True)
    fp64 = copy.deepcopy(model).cpu().double().eval()
    parameters = list(model.parameters())
    if stored.exact and all(each.dtype == torch.float32 and each.is_cpu for each in parameters):
        return fp64, model
    rounded = copy.deepcopy(model).cpu().float().eval()
    stored.apply(rounded, "")
    return fp64, rounded


def _trace(
    config: ModelConfig, fp64: AskedModel, rounded: Sequence[AskedModel], prompt: TracePrompt, beams: int
) -> GoldenTrace:
    from flamingo_reference import search

    ids = config.tokens
    rules = search.Rules(eoc=ids.eoc, image=ids.image, max_new_tokens=prompt.new_tokens, ends=ids.ends, banned=ids.banned)
    result = search.beam_search(lambda asked: fp64.logits(asked)[:, -1], prompt.tokens, rules, beams=beams)
    hypotheses = [GoldenText(tokens=each.token_ids, logprobs=each.token_logprobs) for each in result.hypotheses]
    generated = fp64.generate(prompt.tokens, beams=beams, new_tokens=prompt.new_tokens)
    if generated is not None:  # the margins of the plain search, which asked the same model, say how close the choices were
        hypotheses = [_scored(fp64, prompt, tokens, ids.never) for tokens in generated]
    best = hypotheses[0]
    logits = [_following(model, prompt, best.tokens) for model in (fp64, *rounded)]
    exact, *own = (search.log_probabilities(each, ids.never) for each in logits)
    finite = np.isfinite(exact)
    errors = [float(np.abs(exact[finite] - each[finite]).max()) for each in own]
    return GoldenTrace(
        case=prompt.case,
        prompt=prompt.text,
        prompt_tokens=prompt.tokens,
        media=tuple(tuple(to_png(frame) for frame in frames) for frames in prompt.media),
        num_beams=beams,
        new_tokens=prompt.new_tokens,
        tokens=best.tokens,
        logprobs=best.logprobs,
        margins=tuple(margin if math.isfinite(margin) else None for margin in result.margins),
        final_margin=result.final_margin if math.isfinite(result.final_margin) else None,
        torch_error=errors[0],
        computed_error=errors[1] if len(errors) > 1 else None,
        others=tuple(hypotheses[1:]),
        peak=float(max(np.abs(logits[0]).max(), np.abs(exact[finite]).max())),
    )


def _scored(model: AskedModel, prompt: TracePrompt, tokens: Sequence[int], banned: Sequence[int]) -> GoldenText:
    from flamingo_reference.search import log_probabilities

    rows = log_probabilities(_following(model, prompt, tokens), banned)
    return GoldenText(tokens=tuple(tokens), logprobs=tuple(float(row[token]) for row, token in zip(rows, tokens, strict=True)))


def _following(model: AskedModel, prompt: TracePrompt, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Logits [number of new tokens, V] that each new token was chosen from."""
    fed = np.asarray([(*prompt.tokens, *tokens[:-1])], np.int64)
    return model.logits(fed)[0, len(prompt.tokens) - 1 :]


class _AskedReference:
    def __init__(self, model: Flamingo, prompt: TracePrompt) -> None:
        media = [medium_of(frames, model.config) for frames in prompt.media]
        self._model, self._bank = model, _bank(model, media)
        self._counts = [medium.rows for medium in media]

    def logits(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        import torch

        config, first = self._model.config, None
        if config.sees_groups:
            counts = np.array([self._counts] * len(token_ids), np.int64).reshape(len(token_ids), -1)
            first, phi = (torch.from_numpy(bound) for bound in media_ranges(token_ids, config.tokens.image, counts))
        else:
            phi = torch.from_numpy(phi_from_tokens(token_ids, config.tokens.image, config.tokens.reset))
        rows = torch.arange(max(1, sum(self._counts))).expand(len(token_ids), -1)
        found: Tensor = self._model(torch.from_numpy(token_ids), self._bank, rows, phi, first)
        return np.asarray(found.double().numpy())

    def generate(self, tokens: Sequence[int], *, beams: int, new_tokens: int) -> None:
        return None


def _bank(model: Flamingo, media: Sequence[Medium]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the prompt's media, a row each however many frames they have; of images of tiles, a row a tile."""
    import torch

    dtype = next(model.parameters()).dtype
    rows = []
    for medium in media:
        pixels = torch.from_numpy(medium.pixels).to(dtype)
        tiled = medium.aspect > 0
        rows.append(model.latents(pixels, torch.tensor([medium.aspect])) if tiled else model.latents(pixels[None]))
    if not rows:
        latents = model.config.resampler
        rows.append(torch.zeros(1, latents.num_latents, latents.width, dtype=dtype))
    return model.media_kv(torch.cat(rows))


def _with_text(trace: GoldenTrace, text: str) -> GoldenTrace:
    import msgspec

    return msgspec.structs.replace(trace, text=text)
