"""What several verbs accept: sizes, media in the order they are typed, a backend."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from flamingo_export.cli.verb import Verb

if TYPE_CHECKING:
    from flamingo_calibration import BadSample, Sample
    from flamingo_export.precision import Policy
    from flamingo_export.runtime.contrastive import ContrastiveEncoder
    from flamingo_export.runtime.media import MediumSource
    from flamingo_export.runtime.model import Model
    from flamingo_export.runtime.request import Request
    from flamingo_export.runtime.tokenizer import Tokenizer
    from flamingo_export.sources import WeightSource
    from flamingo_export.sources.choice import CheckpointFolder, Source
    from flamingo_reference.config import ModelConfig

_NANO = "nano"
_TYPED = "flamingo_export.typed"
_STDIN = Path("-")


def check_written(file: Path | None, option: str) -> None:
    """Raises typer.BadParameter where a file cannot be written, before the work whose result it holds."""
    if file is None:
        return
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder, expected a file", param_hint=option)
    above = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise typer.BadParameter(f"{above} cannot be written into", param_hint=option)


@contextmanager
def fault_after(write: Callable[[], None]) -> Iterator[bool]:
    """Writes files of a result, which is printed in the `with` block. Files that could not be written are an error after it, so that the
    result is not lost. Gives whether they were written."""
    fault = None
    try:
        write()
    except OSError as error:
        fault = error
    yield fault is None
    if fault is not None:
        raise fault


def among(*values: str) -> Callable[[str], list[str]]:
    """Completes an option whose values are known, though others may be given."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


_BACKENDS = among("auto", "onnxruntime", "tensorrt-rtx", "tensorrt")
SIZE_NAMES = among("nano", "3b", "9b", "80b", "llama-3.2-11b-vision", "llama-3.2-90b-vision")
Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        "-i",
        metavar="FILE",
        help="An image, - for standard input; repeat for more. Media go to the <image> tags as typed.",
        show_default=False,
    ),
]
Videos = Annotated[
    list[Path] | None,
    typer.Option(
        "--video", metavar="FILE|FOLDER", help="An animated file or a folder of frames; repeat for more.", show_default=False
    ),
]
SizeName = Annotated[
    str | None,
    typer.Option(
        "--size",
        help="nano (trained weights), or random weights: 3b, 9b, 80b, llama-3.2-11b-vision, llama-3.2-90b-vision.",
        autocompletion=SIZE_NAMES,
        show_default=False,
    ),
]
WholePrompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="The whole prompt, with an <image> for each medium.", show_default=False),
]
Shots = Annotated[
    Path | None,
    typer.Option("--shots", metavar="FILE", help="Examples to show first, JSON lines (docs/prompts.md).", show_default=False),
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend", help="What runs the graphs: auto, onnxruntime, tensorrt-rtx or tensorrt.", autocompletion=_BACKENDS
    ),
]
Fallback = Annotated[
    str | None,
    typer.Option(
        "--fallback",
        metavar="BACKEND",
        help="Use this one (onnxruntime) where the engines do not fit.",
        autocompletion=_BACKENDS,
        show_default=False,
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads of the backend; 0 lets it choose.")]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Leave the shots' images out: with two shots, the paper's zero-shot prompt.")
]
Frames = Annotated[
    int | None, typer.Option("--num-frames", min=1, max=30, help="Frames of a video. Default 8.", show_default=False)
]
Fps = Annotated[
    float | None,
    typer.Option("--fps", help="Frames per second to look at of a video, by time. Default evenly over it.", show_default=False),
]
Clip = Annotated[
    str | None,
    typer.Option("--clip", metavar="START-END", help="Seconds of a video to look at: 2.5-10.", show_default=False),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda, a GPU by number: cuda:1, or several for a decoder in parts: cuda:0,cuda:1.",
        autocompletion=among("cpu", "cuda", "cuda:1", "cuda:0,cuda:1"),
    ),
]
SampleData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE|nano",
        help="Samples, JSON lines (docs/calibration.md), or nano's pages. Default a small set that ships with the package.",
        show_default=False,
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out samples that cannot be read, and say how many.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OtherLanguageModel = Annotated[
    Path | None,
    typer.Option("--lm", metavar="FOLDER", help="The language model, where the checkpoint leaves it out.", show_default=False),
]
OtherVision = Annotated[
    Path | None,
    typer.Option(
        "--vision", metavar="FOLDER|FILE", help="The vision encoder, where the checkpoint leaves it out.", show_default=False
    ),
]
Loras = Annotated[
    list[Path] | None,
    typer.Option("--lora", metavar="FOLDER", help="A LoRA adapter (PEFT) to merge; repeat for more.", show_default=False),
]
OtherTokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", metavar="FILE|FOLDER", help="The tokenizer, where it is not beside the checkpoint.", show_default=False
    ),
]


def checkpoint_files(
    checkpoint: Path,
    language_model: Path | None,
    vision: Path | None,
    loras: list[Path] | None,
    tokenizer: Path | None = None,
) -> CheckpointFolder:
    """What the options of a checkpoint and its parts name."""
    from flamingo_export.sources.choice import CheckpointFolder

    return CheckpointFolder(
        path=checkpoint,
        language_model=language_model,
        vision_encoder=vision,
        adapters=tuple(loras or ()),
        tokenizer=tokenizer,
    )


def chosen_source(
    size: str | None,
    checkpoint: Path | None,
    *,
    seed: int | None,
    language_model: Path | None,
    vision: Path | None,
    loras: list[Path] | None,
    tokenizer: Path | None,
) -> Source:
    """The weights that --size or --checkpoint and what goes with it name. Raises typer.BadParameter where they exclude each other."""
    from flamingo_export.sources.choice import source_for_size

    if (size is None) == (checkpoint is None):
        raise typer.BadParameter("give either --size or --checkpoint", param_hint="--size")
    if checkpoint is not None:
        if seed is not None:
            raise typer.BadParameter("a checkpoint has its weights; a seed makes random ones for --size", param_hint="--seed")
        return checkpoint_files(checkpoint, language_model, vision, loras, tokenizer)
    beside = {"--lm": language_model, "--vision": vision, "--lora": loras, "--tokenizer": tokenizer}
    for option, given in beside.items():
        if given:
            raise typer.BadParameter("goes with a checkpoint: add --checkpoint", param_hint=option)
    return source_for_size(known_size(size or "").name, seed=seed)


Fp8 = Annotated[bool, typer.Option("--fp8", help="Weights and activations in 8-bit floats (E4M3), for GPUs.")]
Int8 = Annotated[bool, typer.Option("--int8", help="Weights in 8-bit integers in blocks, for CPUs.")]
Int4 = Annotated[bool, typer.Option("--int4", help="Weights in 4-bit integers in blocks, for CPUs.")]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy", metavar="FILE", help="Which matrices are quantised, and how (docs/precision.md).", show_default=False
    ),
]


def chosen_policy(presets: dict[str, bool], file: Path | None) -> Policy | None:
    """The policy that was asked for. Raises typer.BadParameter for more than one."""
    named = [name for name, asked in presets.items() if asked]
    if len(named) + (file is not None) > 1:
        given = [f"--{name}" for name in named] + ["--policy"] * (file is not None)
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other", param_hint=given[-1])
    from flamingo_export.quantize.policies import preset, read_policy

    if file is not None:
        return read_policy(file)
    return preset(named[0]) if named else None


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]


class Parity(StrEnum):
    """Whether to compare with the reference."""

    auto = "auto"
    skip = "skip"


ParityChoice = Annotated[Parity, typer.Option("--parity", help="auto: compare with the reference where PyTorch is installed.")]


class MediaCommand(Verb):
    """A verb with `--image` and `--video`, which remembers the order in which the two were mixed: it decides whose `<image>` is whose."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_TYPED] = list(args)
        return super().parse_args(ctx, args)


def media_as_typed(
    ctx: typer.Context,
    images: list[Path] | None,
    videos: list[Path] | None,
    frames: int | None,
    fps: float | None = None,
    clip: str | None = None,
) -> list[MediumSource]:
    """Images and videos in the order of the command line; `-` is standard input.

    Raises typer.BadParameter for a clip that is none, frames of no video, or standard input that cannot be read.
    """
    for option, given in {"--num-frames": frames, "--fps": fps, "--clip": clip}.items():
        if given is not None and not videos:
            raise typer.BadParameter("there is no --video to take frames of", param_hint=option)
    from flamingo_export.runtime.videos import Video

    seconds = read_clip(clip)
    left = {"--image": list(images or []), "--video": list(videos or [])}
    media: list[MediumSource] = []
    for argument in ctx.meta[_TYPED]:
        option = "--image" if argument.startswith("-i") else argument.split("=")[0]
        if left.get(option):
            path = left[option].pop(0)
            source = path if path != _STDIN else _standard_input(option, [*(images or []), *(videos or [])].count(_STDIN))
            media.append(source if option == "--image" else Video(source=source, num_frames=frames, fps=fps, clip=seconds))
    return media


def _standard_input(option: str, times: int) -> IO[bytes]:
    """What `-` means. Raises typer.BadParameter if it is asked for more than once, or nothing is piped into it."""
    if times > 1:
        raise typer.BadParameter("standard input (-) can be read once; give the others as files", param_hint=option)
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter(
            "- is standard input, but nothing is piped into it. A file is given by its path.", param_hint=option
        )
    return sys.stdin.buffer


def read_clip(text: str | None) -> tuple[float, float] | None:
    """START-END as seconds. Raises typer.BadParameter."""
    if text is None:
        return None
    start, _, end = text.partition("-")
    try:
        seconds = float(start), float(end)
    except ValueError:
        seconds = (0.0, 0.0)
    if not 0 <= seconds[0] < seconds[1] < float("inf"):
        raise typer.BadParameter(f"{text!r}, expected seconds as START-END, such as 2.5-10", param_hint="--clip")
    return seconds


def chosen_samples(data: str | None, source: WeightSource, tokenizer: Tokenizer | None) -> Sequence[Sample | BadSample]:
    """What --data names: a file, nano's pages, or (None) the set that ships with the package."""
    import flamingo_calibration

    if data is None:
        return flamingo_calibration.shipped_samples(source.config, tokenizer, source.inputs)
    if data == _NANO:
        return flamingo_calibration.nano_samples(source.inputs)
    return flamingo_calibration.read_samples(Path(data), source.inputs)


@contextmanager
def opened(
    bundle: Path, backend: str, device: str, threads: int, fallback: str | None = None, rows: int | None = None
) -> Iterator[Model]:
    """The bundle's model, with a spinner while it loads. rows: requests that run at once, None: as `load` chooses."""
    from flamingo_export import api
    from flamingo_export.cli.output import logged_to_stderr, waiting

    with logged_to_stderr():
        with waiting(f"loading {bundle}"):
            model = api.load(bundle, backend=backend, device=device, threads=threads, fallback=fallback, rows=rows)
        with model:
            yield model


@contextmanager
def opened_encoder(
    bundle: Path, backend: str, device: str, threads: int, fallback: str | None = None
) -> Iterator[ContrastiveEncoder]:
    """The bundle's contrastive encoder."""
    from flamingo_export import api
    from flamingo_export.cli.output import logged_to_stderr

    with (
        logged_to_stderr(),
        api.load_encoder(bundle, backend=backend, device=device, threads=threads, fallback=fallback) as encoder,
    ):
        yield encoder


def formatted(
    bundle: Path,
    *,
    media: list[MediumSource],
    prompt: str | None,
    question: str | None,
    shots: Path | None,
    text_only: bool,
    system: str | None = None,
    day: str | None = None,
) -> Request:
    """The request that a prompt, or a question or caption with shots in the bundle's forms, amounts to. day: today as YYYY-MM-DD.

    Raises typer.BadParameter where they exclude each other.
    """
    from flamingo_export.bundle.manifest import read_manifest
    from flamingo_export.runtime.prompts import caption_prompt, qa_prompt, read_shots, without_media
    from flamingo_export.runtime.request import Request

    if prompt is not None:
        for option, given in {
            "--question": question is not None,
            "--shots": shots is not None,
            "--text-only": text_only,
            "--system": system is not None,
            "--date": day is not None,
        }.items():
            if given:
                raise typer.BadParameter(f"--prompt is the whole prompt, so it does not go with {option}", param_hint=option)
        return Request(prompt=prompt, media=media)
    if text_only and shots is None:
        raise typer.BadParameter("--text-only needs --shots", param_hint="--text-only")
    inputs = read_manifest(bundle).inputs
    chats = inputs.prompts.template is not None
    for option, given in {"--system": system is not None, "--date": day is not None}.items():
        if given and not chats:
            raise typer.BadParameter("this bundle has no chat template, so its prompts have no place for it", param_hint=option)
    if len(media) != 1 and not (chats and (media or question is not None)):
        asked = "a question is asked about" if question is not None else "a caption is made for"
        raise typer.BadParameter(
            f"{asked} one image or video, {len(media)} were given. For another arrangement write the prompt: --prompt '<image>... <image>...'",
            param_hint="--image",
        )
    examples = read_shots(shots) if shots is not None else []
    examples = without_media(examples) if text_only else examples
    today = _day(day)
    if question is None:
        return caption_prompt(examples, media, inputs, system=system, day=today)
    return qa_prompt(examples, question, media, inputs, system=system, day=today)


def _day(text: str | None) -> datetime.date:
    """A day, or the fixed one of chat templates. Raises typer.BadParameter."""
    from flamingo_export.runtime.chat_template import DAY

    if text is None:
        return DAY
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected a day as YYYY-MM-DD", param_hint="--date") from None


def known_size(name: str) -> ModelConfig:
    """The preset of that name. Raises typer.BadParameter (exit 2) listing the sizes there are."""
    from flamingo_reference.config import SIZES

    if name.lower() not in SIZES:
        raise typer.BadParameter(f"{name!r} is not a size; there are {', '.join(SIZES)}", param_hint="--size")
    return SIZES[name.lower()]
