"""Token traces: the runtime's own generation loop on the engine, beside the reference's plain search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flamingo_export.backends.base import Backend, SessionOptions
from flamingo_export.bundle.manifest import Manifest
from flamingo_export.errors import named_line
from flamingo_export.progress import Progress
from flamingo_export.runtime.engine import Engine
from flamingo_export.runtime.media import medium_of
from flamingo_export.runtime.options import GenerateOptions
from flamingo_export.runtime.request import prepared_from_ids
from flamingo_export.runtime.search import Hypothesis
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.runtime.tokenizer import TOKENIZER_FILE, Tokenizer
from flamingo_export.validate.checks.tensor_checks import unmeasured
from flamingo_export.validate.expected.golden import Goldens, GoldenText, GoldenTrace
from flamingo_export.validate.expected.trace_prompts import from_png
from flamingo_export.validate.report.parity_report import Row, TokenStep, Trace
from flamingo_export.validate.tolerances import tie_margin, trace_limit

TENSOR = "log-probabilities of the tokens"


def check_traces(
    bundle: Path, manifest: Manifest, goldens: Goldens, backend: Backend, options: SessionOptions, progress: Progress
) -> tuple[tuple[Trace, ...], list[Row]]:
    """Every recorded trace generated anew, with one gate each. No trace at all is a gate that was not measured."""
    if not goldens.traces:
        return (), [unmeasured("trace", "token traces", "runtime", TENSOR, "no traces were recorded, and no reason why")]
    progress.stage("token traces", len(goldens.traces))
    decode = (
        Tokenizer.open(bundle, manifest.config, manifest.inputs.tags).decode if (bundle / TOKENIZER_FILE).is_file() else None
    )

    def label(token: int) -> str:
        """One token as the report shows it."""
        if token == manifest.config.tokens.eoc:
            return manifest.inputs.tags.eoc
        return (decode([token]) if decode is not None else "") or f"#{token}"

    traces, rows = [], []
    try:
        engines = Engines.open(bundle, manifest, backend, options)
    except Exception as error:
        return (), [
            unmeasured("trace", "token traces", "runtime", TENSOR, f"the engines cannot be opened: {named_line(error)}")
        ]
    try:
        for golden in goldens.traces:
            text = None
            try:
                # A fresh engine each: no trace may lean on what an earlier one left in bank and cache.
                found = _generate(Engine(engines, manifest.config, manifest.limits, rows=1), manifest, golden)
                outcome, row = _judge(golden, found)
                note = row.note
                tokens = found[0].token_ids
                text = decode(tokens).strip() if decode is not None else None
            except Exception as error:
                note = named_line(error)
                outcome, row, tokens = "not_run", unmeasured("trace", trace_name(golden), "runtime", TENSOR, note), ()
            rows.append(row)
            traces.append(_trace(golden, outcome, tokens, text, note, label))
            progress.advance(1)
    finally:
        engines.close()
    return tuple(traces), rows


def trace_name(golden: GoldenTrace) -> str:
    """Case and search."""
    return f"{golden.case}, {'greedy' if golden.num_beams == 1 else f'beam {golden.num_beams}'}"


def _generate(engine: Engine, manifest: Manifest, golden: GoldenTrace) -> list[Hypothesis]:
    media = tuple(medium_of((from_png(frame) for frame in frames), manifest.config) for frames in golden.media)
    prepared = prepared_from_ids(np.asarray(golden.prompt_tokens, np.int64), media, manifest.config)
    options = GenerateOptions(beams=golden.num_beams, max_new_tokens=golden.new_tokens)
    (outcome,) = engine.complete(engine.submit(prepared, options, wake=False))
    return outcome.hypotheses


def _judge(golden: GoldenTrace, found: Sequence[Hypothesis]) -> tuple[str, Row]:
    """Equal tokens must have equal log-probabilities; other tokens are right only where the reference itself was about to choose them.

    All hypotheses are compared, not only the best: beams that lost their ancestors show in the others first.
    """
    limit = trace_limit(torch_error=golden.torch_error, peak=golden.peak)
    wanted = [GoldenText(tokens=golden.tokens, logprobs=golden.logprobs), *golden.others]
    differing: list[tuple[int, int]] = []
    """(rank, first token that differs)"""
    differences = []
    for rank, (mine, theirs) in enumerate(itertools.zip_longest(wanted, found)):
        if mine is None or theirs is None:
            differing.append((rank, 0))
            continue
        pairs = zip(mine.tokens, theirs.token_ids, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        differences += [abs(a - b) for a, b in zip(mine.logprobs[:common], theirs.token_logprobs, strict=False)]
        if mine.tokens != theirs.token_ids:
            differing.append((rank, common))
    error = float(np.max(differences, initial=0.0))  # NaN stays NaN
    close = math.isfinite(error) and math.isfinite(limit) and error <= limit
    if not differing:
        return "equal", _row(golden, error, limit, passed=close)
    rank, token = differing[0]
    tied = _tie(golden, token, limit)
    if tied is not None and close:
        return "tie", _row(
            golden, error, limit, passed=True, note=f"tie: the reference's own choice at {tied} is within its error"
        )
    why = (
        "the reference's margins exceed the tolerance, so this is not a tie"
        if tied is None
        else "log-probabilities before it differ by more than the tolerance"
    )
    note = f"hypothesis {rank + 1} differs from token {token}; {why}"
    return "different", _row(golden, error, limit, passed=False, note=note)


def _tie(golden: GoldenTrace, first_difference: int, limit: float) -> str | None:
    """The step at which a choice was so close that numbers within `limit` could have turned it, in time to explain the difference."""
    if golden.num_beams == 1:
        margin = golden.margins[first_difference] if first_difference < len(golden.margins) else None
        tied = margin is not None and margin <= tie_margin(limit=limit, steps=1)
        return f"token {first_difference}" if tied else None
    # A beam dropped early can show late: any close decision up to the end may be the cause.
    for step, margin in enumerate(golden.margins):
        if margin is not None and margin <= tie_margin(limit=limit, steps=step + 1):
            return f"step {step}"
    final = golden.final_margin
    if final is not None and final <= tie_margin(limit=limit, steps=len(golden.margins)):
        return "the final ranking"
    return None


def _row(golden: GoldenTrace, error: float, limit: float, *, passed: bool, note: str = "") -> Row:
    return Row(
        level="trace",
        case=trace_name(golden),
        subgraph="runtime",
        tensor=TENSOR,
        error=error if math.isfinite(error) else None,
        limit=limit if math.isfinite(limit) else None,
        torch_error=golden.torch_error,
        passed=passed,
        note=note,
    )


def _trace(
    golden: GoldenTrace, outcome: str, tokens: tuple[int, ...], text: str | None, note: str, label: Callable[[int], str]
) -> Trace:
    steps = [
        TokenStep(
            reference=mine,
            engine=theirs,
            gap=gap,
            reference_label="" if mine is None else label(mine),
            engine_label="" if theirs is None else label(theirs),
        )
        for mine, theirs, gap in itertools.zip_longest(
            golden.tokens, tokens, golden.margins[: max(len(golden.tokens), len(tokens))]
        )
    ]
    return Trace(
        case=golden.case,
        search="greedy" if golden.num_beams == 1 else "beam",
        num_beams=golden.num_beams,
        prompt=golden.prompt,
        outcome=outcome,  # type: ignore[arg-type]
        steps=tuple(steps),
        reference_text=golden.text,
        engine_text=text,
        media=tuple(frames[0] for frames in golden.media),
        note=note,
    )
