"""`flamingo-export score`: candidate answers by their log-likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.options import (
    AsJson,
    BackendName,
    Clip,
    Device,
    Fallback,
    Fps,
    Frames,
    Images,
    Shots,
    TextOnly,
    Threads,
    Videos,
)


def score(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A bundle.", show_default=False)],
    candidates: Annotated[
        str, typer.Option("--candidates", "-c", help="Answers, separated by commas.", metavar="A,B,C", show_default=False)
    ],
    images: Images = None,
    videos: Videos = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The whole prompt, with an <image> for each medium.", show_default=False),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Ask this about the image.", show_default=False)
    ] = None,
    shots: Shots = None,
    text_only: TextOnly = False,
    frames: Frames = None,
    fps: Fps = None,
    clip: Clip = None,
    end: Annotated[bool, typer.Option("--end/--open", help="Score that the answer ends there, or may go on.")] = True,
    backend: BackendName = "auto",
    fallback: Fallback = None,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Rank candidate answers by log-likelihood, best first: classification, without generating.

    \b
    flamingo-export score nano.bundle --image q.png --question "What colour is the square?" --candidates red,green,blue
    """
    from flamingo_export.cli.options import formatted, media_as_typed, opened
    from flamingo_export.cli.output import print_json, results, table

    answers = [answer.strip() for answer in candidates.split(",")]
    if not all(answers):
        raise typer.BadParameter(
            f"{candidates!r} has an empty answer; give some, separated by commas", param_hint="--candidates"
        )
    media = media_as_typed(ctx, images, videos, frames, fps, clip)
    request = formatted(bundle, media=media, prompt=prompt, question=question, shots=shots, text_only=text_only)
    with opened(bundle, backend, device, threads, fallback) as model:
        scores = model.score(request, answers, end=end)
    ranked = sorted(zip(answers, scores, strict=True), key=lambda pair: -pair[1].logprob)
    if as_json:
        print_json(
            {
                "prompt": request.prompt,
                "scores": [
                    {"candidate": answer, "logprob": found.logprob, "token_logprobs": found.token_logprobs}
                    for answer, found in ranked
                ],
            }
        )
        return
    rows = [(answer, f"{found.logprob:.3f}", str(len(found.token_logprobs))) for answer, found in ranked]
    results().print(table(("answer", "log-likelihood", "tokens"), rows, right=(1, 2)))
