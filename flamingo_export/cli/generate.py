"""`flamingo-export generate`: text about images and videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from flamingo_export.cli.search_options import (
    Choice,
    EarlyStopping,
    LogitBias,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    Regex,
    RepetitionPenalty,
    Schema,
    Stop,
    TopLogprobs,
    biases,
    schema_in,
)

if TYPE_CHECKING:
    from flamingo_export.runtime.media import MediumSource
    from flamingo_export.runtime.model import Model
    from flamingo_export.runtime.options import Settings
    from flamingo_export.runtime.request import Request
    from flamingo_export.runtime.texts import Generation


def generate(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A bundle.", show_default=False)],
    images: Images = None,
    videos: Videos = None,
    prompt: WholePrompt = None,
    question: Annotated[
        str | None,
        typer.Option("--question", "-q", help="Ask this about the image. Without it: a caption.", show_default=False),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", help="Instructions before the question, for bundles with a chat template.", show_default=False
        ),
    ] = None,
    day: Annotated[
        str | None,
        typer.Option(
            "--date",
            metavar="YYYY-MM-DD",
            help="Today, for chat templates that say it. Default: a fixed day.",
            show_default=False,
        ),
    ] = None,
    shots: Shots = None,
    text_only: TextOnly = False,
    shots_from: Annotated[
        Path | None,
        typer.Option(
            "--shots-from", metavar="INDEX", help="Examples most like this image, from an index (`index`).", show_default=False
        ),
    ] = None,
    num_shots: Annotated[int, typer.Option("--num-shots", min=1, help="How many --shots-from.")] = 4,
    cut: VideoCut = VideoCut(),
    beams: Annotated[
        int | None, typer.Option("--beams", min=1, help="Beams; 1 is greedy. Default 3, or --num-return.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Tokens at most. Default 64, or what fits.", show_default=False),
    ] = None,
    length_penalty: Annotated[
        float, typer.Option("--length-penalty", help="Order beams by sum(log p) / length ** this.")
    ] = 0.0,
    num_return: Annotated[int, typer.Option("--num-return", min=1, help="Texts to print: best beams, or samples.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="Sample, at this temperature; 0 is greedy.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Sample from the k likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.", show_default=False),
    ] = None,
    min_p: MinP = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of sampling.", show_default=False)] = None,
    early_stopping: EarlyStopping = False,
    stop: Stop = None,
    min_new_tokens: MinNewTokens = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    no_repeat_ngram: NoRepeatNgram = 0,
    logit_bias: LogitBias = None,
    top_logprobs: TopLogprobs = 0,
    json_schema: Schema = None,
    regex: Regex = None,
    choice: Choice = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--requests", metavar="FILE", help="Answer many requests, JSON lines (docs/serving.md).", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Where the answers to --requests go; resumes what is there.", show_default=False
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as soon as it is certain.")] = False,
    run: Running = Running(),
    as_json: AsJson = False,
) -> None:
    """Describe an image or video, or answer a question about it, after a few examples if there are any.

    \b
    flamingo-export generate nano.bundle --image a.png --beams 3 --stream
    flamingo-export generate nano.bundle --shots shots.jsonl --image q.png --question "What colour is the square?"
    flamingo-export generate nano.bundle --requests in.jsonl --out out.jsonl
    """
    from flamingo_export.cli.common_options import formatted
    from flamingo_export.cli.verb import as_option
    from flamingo_export.errors import InputError
    from flamingo_export.runtime.options import GenerateOptions

    if stream and as_json:
        raise typer.BadParameter(
            "--stream prints text as it comes, --json the whole at the end: choose one", param_hint="--stream"
        )
    if (requests is None) != (out is None):
        raise typer.BadParameter("--requests and --out go together", param_hint="--requests")
    if top_logprobs and requests is None and not as_json:
        raise typer.BadParameter("they are printed with --json", param_hint="--top-logprobs")
    media = cut.media(ctx, images, videos)
    for option, given in {
        "--shots": shots is not None,
        "--prompt": prompt is not None,
        "--text-only": text_only,
        "--system": system is not None,
        "--date": day is not None,
    }.items():
        if shots_from is not None and given:
            raise typer.BadParameter(
                f"examples come from the index, so it does not go with {option}", param_hint="--shots-from"
            )
    if requests is not None and (media or prompt or question or system or day or shots or shots_from or stream or as_json):
        raise typer.BadParameter(
            "each request says what it asks for itself; leave the other options out", param_hint="--requests"
        )
    request = (
        None
        if requests is not None
        else formatted(
            bundle, media=media, prompt=prompt, question=question, shots=shots, text_only=text_only, system=system, day=day
        )
    )
    settings: Settings = {
        "beams": beams,
        "max_new_tokens": max_new_tokens,
        "length_penalty": length_penalty,
        "num_return": num_return,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "early_stopping": early_stopping,
        "stop": stop or [],
        "min_new_tokens": min_new_tokens,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram": no_repeat_ngram,
        "logit_bias": biases(logit_bias),
        "top_logprobs": top_logprobs,
        "json_schema": schema_in(json_schema),
        "regex": regex,
        "choice": choice or [],
    }
    try:
        GenerateOptions(**settings).check_values(as_option)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    with run.opened(bundle) as model:
        if requests is not None and out is not None:
            _run_file(model, requests, out, settings)
            return
        assert request is not None
        if shots_from is not None:
            request = _with_similar(model, shots_from, num_shots, media[0], question)
        result = _streamed(model, request, settings) if stream else model.generate(request, **settings)
        _print(result, request, eoc=model.inputs.tags.eoc, streamed=stream, as_json=as_json)


def _run_file(model: Model, requests: Path, out: Path, settings: Settings) -> None:
    """Answers a file of requests. Exits with 1 if one of them failed."""
    import time

    from flamingo_export.cli.output import remarks
    from flamingo_export.cli.progress_bars import reported
    from flamingo_export.serve.from_file import run_file

    started = time.perf_counter()
    with reported() as progress:
        tally = run_file(model, requests, out, settings, progress=progress)
    seconds = time.perf_counter() - started
    before = f", {tally.before} were there already" if tally.before else ""
    failed = f", {tally.failed} failed" if tally.failed else ""
    remarks().print(
        f"{tally.done} requests in {seconds:.1f} s ({tally.done / seconds:.1f} a second){before}{failed}", markup=False
    )
    if tally.failed:
        raise typer.Exit(1)


def _with_similar(model: Model, index: Path, count: int, medium: MediumSource, question: str | None) -> Request:
    """The request with the examples of an index that are most like the medium."""
    from flamingo_export.evaluation.bundles import BundleModel
    from flamingo_export.evaluation.index.index_entries import retrieved_shots
    from flamingo_export.runtime.prompts import caption_prompt, qa_prompt

    shots = retrieved_shots(BundleModel(model), index, medium, count)
    if question is None:
        return caption_prompt(shots, medium, model.inputs)
    return qa_prompt(shots, question, medium, model.inputs)


def _streamed(model: Model, request: Request, settings: Settings) -> Generation:
    """Prints the best text as it becomes certain and returns the whole."""
    with model.stream(request, **settings) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print()
    if stream.result is None:
        raise RuntimeError("the stream ended without a result")
    return stream.result


def _print(result: Generation, request: Request, *, eoc: str, streamed: bool, as_json: bool) -> None:
    from flamingo_export.cli.output import print_json, remarks

    texts = [result, *result.alternatives]
    timings = result.timings
    if as_json:
        print_json(
            {
                "prompt": request.prompt,
                "texts": [
                    {
                        "text": text.text,
                        "token_ids": text.token_ids,
                        "token_logprobs": text.token_logprobs,
                        "score": text.score,
                        "finished": text.finished,
                        **({"top_logprobs": text.top_logprobs} if text.top_logprobs else {}),
                    }
                    for text in texts
                ],
                "timings": timings,
            }
        )
        return
    if len(texts) == 1:
        if not streamed:
            print(result.text)
    else:
        for text in texts:
            print(f"{text.score:9.3f}  {text.text}")
    if not result.finished:
        remarks().print(
            f"(stopped after {len(result.token_ids)} tokens, before {eoc}: --max-new-tokens allows more)",
            style="dim",
            markup=False,
        )
    if remarks().is_terminal:
        steps = timings.steps
        pace = f", {1000 * sum(steps) / len(steps):.1f} ms per step" if steps else ""
        remarks().print(
            f"({timings.prompt_tokens} prompt tokens, first token after {timings.first_token:.2f} s{pace})", style="dim"
        )
