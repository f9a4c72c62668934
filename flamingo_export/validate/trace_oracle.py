"""Token traces of the reference: its plain search on the whole model in fp64, and how far PyTorch's fp32 is from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flamingo_export.errors import CapacityError
from flamingo_export.manifest import ShapeLimits
from flamingo_export.precision import StorageType
from flamingo_export.progress import Progress
from flamingo_export.runtime.cache import check_capacity, check_positions
from flamingo_export.runtime.media import medium_of
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sources import LiveSource, WeightSource
from flamingo_export.validate.golden import GoldenText, GoldenTrace
from flamingo_export.validate.parts import rounded_weights
from flamingo_export.validate.trace_prompts import TracePrompt, to_png, trace_prompts
from flamingo_reference.phi import phi_from_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_reference.model import Flamingo
    from flamingo_reference.search import SearchResult

BEAMS = (1, 3)


def record_traces(
    source: WeightSource, storage: StorageType, limits: ShapeLimits, tokenizer: Path | None, progress: Progress
) -> tuple[GoldenTrace, ...]:
    """Greedy and beam-3 traces of every prompt that fits the bundle's limits. Needs torch, and memory for the whole model."""
    import torch

    config = source.config
    wide, narrow = reference_models(source, storage)
    decode = Tokenizer.open(tokenizer.parent.parent, config, source.inputs.tags).decode if tokenizer is not None else None
    prompts = trace_prompts(config, tokenizer)
    progress.stage("reference token traces", len(prompts) * len(BEAMS))
    traces = []
    with torch.no_grad():
        for prompt in prompts:
            for beams in BEAMS:
                try:
                    check_capacity(prompt=len(prompt.tokens), width=beams, new_tokens=prompt.new_tokens, limits=limits)
                    known = config.language_model.position_limit
                    check_positions(prompt=len(prompt.tokens), new_tokens=prompt.new_tokens, position_limit=known)
                except CapacityError:
                    progress.advance(1)
                    continue
                trace = _trace(wide, narrow, prompt, beams)
                if decode is not None:
                    trace = _with_text(trace, decode(trace.tokens).strip())
                traces.append(trace)
                progress.advance(1)
    return tuple(traces)


def reference_models(source: WeightSource, storage: StorageType) -> tuple[Flamingo, Flamingo]:
    """The whole reference in fp64, and in fp32 with weights as the bundle stores them: the live model itself where that is the same."""
    import torch

    from flamingo_reference.model import Flamingo, torch_from_numpy

    if isinstance(source, LiveSource):
        model = source.model
    else:
        with torch.device("meta"):
            model = Flamingo(source.config)
        model.load_state_dict({name: torch_from_numpy(source.read(name)) for name in source.names()}, assign=True)
    wide = copy.deepcopy(model).cpu().double().eval()
    parameters = list(model.parameters())
    if storage == "fp32" and all(each.dtype == torch.float32 and each.is_cpu for each in parameters):
        return wide, model
    narrow = copy.deepcopy(model).cpu().float().eval()
    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    rounded = rounded_weights(source.config)
    for name, parameter in narrow.named_parameters():
        if name in rounded:
            parameter.data = parameter.data.to(stored).float()
    return wide, narrow


def _trace(wide: Flamingo, narrow: Flamingo, prompt: TracePrompt, beams: int) -> GoldenTrace:
    from flamingo_reference import search

    config = wide.config
    rules = search.Rules(eoc=config.tokens.eoc, image=config.tokens.image, max_new_tokens=prompt.new_tokens)
    banks = [_bank(model, prompt) for model in (wide, narrow)]
    rows = list(range(len(prompt.media)))
    ask = search.flamingo_next_logits(wide, banks[0], rows)
    result: SearchResult = search.beam_search(ask, prompt.tokens, rules, beams=beams)
    best = result.hypotheses[0]
    logits = [_logits(model, bank, prompt, best.token_ids) for model, bank in zip((wide, narrow), banks, strict=True)]
    exact, own = (search.log_probabilities(each, config.tokens.image) for each in logits)
    finite = np.isfinite(exact)
    return GoldenTrace(
        case=prompt.case,
        prompt=prompt.text,
        prompt_tokens=prompt.tokens,
        media=tuple(tuple(to_png(frame) for frame in frames) for frames in prompt.media),
        num_beams=beams,
        new_tokens=prompt.new_tokens,
        tokens=best.token_ids,
        logprobs=best.token_logprobs,
        margins=tuple(margin if math.isfinite(margin) else None for margin in result.margins),
        final_margin=result.final_margin if math.isfinite(result.final_margin) else None,
        torch_error=float(np.abs(exact[finite] - own[finite]).max()),
        others=tuple(GoldenText(tokens=other.token_ids, logprobs=other.token_logprobs) for other in result.hypotheses[1:]),
        peak=float(max(np.abs(logits[0]).max(), np.abs(exact[finite]).max())),
    )


def _bank(model: Flamingo, prompt: TracePrompt) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the prompt's media, a row each however many frames they have."""
    import torch

    dtype = next(model.parameters()).dtype
    rows = []
    for frames in prompt.media:
        pixels = torch.from_numpy(medium_of(frames, model.config).pixels).to(dtype)
        rows.append(model.latents(pixels[None]))
    if not rows:
        latents = model.config.resampler
        rows.append(torch.zeros(1, latents.num_latents, latents.width, dtype=dtype))
    return model.media_kv(torch.cat(rows))


def _logits(model: Flamingo, bank: list[tuple[Tensor, Tensor]], prompt: TracePrompt, tokens: Sequence[int]) -> np.ndarray:
    """Logits float64 [number of new tokens, V] that each new token was chosen from."""
    import torch

    fed = np.asarray([(*prompt.tokens, *tokens[:-1])], np.int64)
    phi = torch.from_numpy(phi_from_tokens(fed, model.config.tokens.image, model.config.tokens.reset))
    rows = torch.arange(len(prompt.media), dtype=torch.int64)[None]
    logits = model(torch.from_numpy(fed), bank, rows, phi)[0, len(prompt.tokens) - 1 :]
    return np.asarray(logits.double().numpy())


def _with_text(trace: GoldenTrace, text: str) -> GoldenTrace:
    import msgspec

    return msgspec.structs.replace(trace, text=text)
