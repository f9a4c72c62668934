"""`flamingo-export score`: candidate answers by their log-likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo_export.cli.common_options import (
    AsJson,
    Images,
    Shots,
    TextOnly,
    Videos,
    WholePrompt,
)
from flamingo_export.cli.groups import Running, VideoCut


def score(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A bundle.", show_default=False)],
    candidates: Annotated[
        list[str],
        typer.Option(
            "--candidates", "-c", help="Answers, separated by commas; may be repeated.", metavar="A,B,C", show_default=False
        ),
    ],
    images: Images = None,
    videos: Videos = None,
    prompt: WholePrompt = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Ask this about the image.", show_default=False)
    ] = None,
    shots: Shots = None,
    text_only: TextOnly = False,
    cut: VideoCut = VideoCut(),
    end: Annotated[bool, typer.Option("--end/--open", help="Score that the answer ends there, or may go on.")] = True,
    run: Running = Running(),
    as_json: AsJson = False,
) -> None:
    """Rank candidate answers by log-likelihood, best first: classification, without generating.

    \b
    flamingo-export score nano.bundle --image q.png --question "What colour is the square?" --candidates red,green,blue
    """
    from flamingo_export.cli.common_options import formatted
    from flamingo_export.cli.output import print_json, results, table

    answers = []
    for text in candidates:
        given = [answer.strip() for answer in text.split(",")]
        if not all(given):
            raise typer.BadParameter(f"{text!r} has an empty answer; give some, separated by commas", param_hint="--candidates")
        answers += given
    media = cut.media(ctx, images, videos)
    request = formatted(bundle, media=media, prompt=prompt, question=question, shots=shots, text_only=text_only)
    with run.opened(bundle) as model:
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
