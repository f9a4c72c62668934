"""The whole way on real image files: build the nano bundle, describe and answer, re-check the engines, write a report with pictures.

    python scripts/demo.py --out demo-report

Every `examples/truth_NAME.jsonl` is a task: its lines are held-out images with what is true of them, in the form of a shots file;
`shots_NAME.jsonl`, where there is one, holds the training examples that are shown first. PyTorch is not needed.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import mimetypes
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import flamingo_export
from flamingo_export.pages.template import render
from flamingo_export.sources.choice import source_for_size
from flamingo_export.validate import ParityReport, check_bundle
from flamingo_export.validate.report.parity_page import write_html

if TYPE_CHECKING:
    from flamingo_export import Model, Shot

ROOT = Path(__file__).resolve().parent.parent
BEAMS = 3
TITLES = {"captions": "Captions", "questions": "Questions", "videos": "Videos"}


@dataclass(frozen=True)
class Answer:
    """One held-out example: what is true, what was said and how sure of it the model was (log-probability)."""

    truth: Shot
    said: str
    logprob: float

    @property
    def right(self) -> bool:
        return self.said == self.truth.answer


@dataclass(frozen=True)
class Task:
    """A file of examples, answered."""

    title: str
    shots: list[Shot]
    answers: list[Answer]
    seconds: float

    @property
    def num_right(self) -> int:
        return sum(answer.right for answer in self.answers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report and the bundle")
    parser.add_argument("--examples", type=Path, default=ROOT / "examples", help="folder with truth_*.jsonl and shots_*.jsonl")
    parser.add_argument("--picture", type=Path, help="also draw images and answers into this PNG, as the README shows them")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    bundle = out / "nano.bundle"
    flamingo_export.build(source_for_size("nano"), out=bundle, overwrite=True, parity="skip")
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    without = "" if importlib.util.find_spec("torch") else ", without PyTorch"
    console.print(f"[bold]{bundle}[/bold] built in {time.perf_counter() - started:.1f} s ({size / 1e6:.1f} MB{without})\n")

    with flamingo_export.load(bundle) as model:
        tasks = [run_task(model, truth) for truth in sorted(arguments.examples.glob("truth_*.jsonl"))]
    if not tasks:
        console.print(f"{arguments.examples} has no truth_*.jsonl", style="red")
        return 1
    for task in tasks:
        print_task(console, task)

    if arguments.picture:
        draw_picture(tasks, arguments.picture)
    console.print("Re-checking the engines ...")
    report = check_bundle(bundle)
    write_html(out / "parity.html", report)
    page = out / "index.html"
    page.write_text(render_html(tasks, report), encoding="utf-8")
    console.print(f"report with pictures: {page}")
    console.print(f"next: .venv/bin/flamingo-export generate {shlex.quote(str(bundle))} --image FILE\n")
    console.print(report.summary, style="bold green" if report.verdict == "passed" else "bold red")
    return 0 if report.verdict == "passed" else 1


def run_task(model: Model, truth_file: Path) -> Task:
    """Puts each example's image behind the shots and generates with beams, several requests at a time."""
    name = truth_file.stem.removeprefix("truth_")
    truths = flamingo_export.read_shots(truth_file)
    shots_file = truth_file.with_name(f"shots_{name}.jsonl")
    shots = flamingo_export.read_shots(shots_file) if shots_file.is_file() else []
    requests = [
        flamingo_export.caption_prompt(shots, truth.medium)
        if truth.question is None
        else flamingo_export.qa_prompt(shots, truth.question, truth.medium)
        for truth in truths
    ]
    started = time.perf_counter()
    found = model.generate(requests, beams=BEAMS)
    seconds = time.perf_counter() - started
    answers = [
        Answer(truth=truth, said=generation.text, logprob=sum(generation.token_logprobs))
        for truth, generation in zip(truths, found, strict=True)
    ]
    return Task(title=TITLES.get(name, name.replace("_", " ").capitalize()), shots=shots, answers=answers, seconds=seconds)


def print_task(console: Console, task: Task) -> None:
    """What was expected beside what was said."""
    asks = any(answer.truth.question for answer in task.answers)
    shown = f"after {len(task.shots)} shots" if task.shots else "without shots"
    table = Table(title=f"{task.title}, {shown}, {BEAMS} beams", title_justify="left", box=None, pad_edge=False)
    for column in ("", "file", *(("question",) if asks else ()), "said", "true"):
        table.add_column(column)
    for answer in task.answers:
        mark = "[green]right[/green]" if answer.right else "[red]wrong[/red]"
        question = (answer.truth.question or "",) if asks else ()
        table.add_row(mark, medium_path(answer.truth).name, *question, answer.said, answer.truth.answer)
    console.print(table)
    console.print(f"{task.num_right} of {len(task.answers)} right, {task.seconds:.1f} s\n")


def medium_path(shot: Shot) -> Path:
    """The file or folder that a line of an examples file names."""
    source = getattr(shot.medium, "source", shot.medium)
    if not isinstance(source, str | os.PathLike):
        raise SystemExit(f"an example without a file: {shot}")
    return Path(source)


def data_uris(path: Path) -> list[str]:
    """The file, or each file of a folder of frames, as data URIs: the page needs nothing beside it."""
    files: Iterable[Path] = sorted(path.iterdir()) if path.is_dir() else [path]
    return [
        f"data:{mimetypes.guess_type(file.name)[0]};base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files
    ]


def draw_picture(tasks: list[Task], path: Path) -> None:
    """Every image with what was said of it below, green where it is right and red, with the truth, where it is not."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, side, columns = 190, 210, 128, 6
    answers = [answer for task in tasks for answer in task.answers]
    sheet = Image.new("RGB", (width * columns, height * -(-len(answers) // columns)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, answer in enumerate(answers):
        left, top = width * (index % columns), height * (index // columns)
        source = medium_path(answer.truth)
        with Image.open(sorted(source.iterdir())[0] if source.is_dir() else source) as image:
            sheet.paste(
                image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (left + (width - side) // 2, top + 6)
            )
        lines = [(answer.truth.question or "", "#4a4f57"), (answer.said, "#1a7f37" if answer.right else "#b42318")]
        lines += [] if answer.right else [(f"({answer.truth.answer})", "#4a4f57")]
        below = top + side + 10
        for text, colour in lines:
            if text:
                wrapped = "\n".join(textwrap.wrap(text, 30))
                draw.multiline_text((left + width // 2, below), wrapped, fill=colour, font=font, anchor="ma", align="center")
                below += 15 * (wrapped.count("\n") + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def render_html(tasks: list[Task], report: ParityReport) -> str:
    """The report as one HTML page, linked to parity.html beside it."""
    pictures = {"pictures": lambda shot: data_uris(medium_path(shot))}
    return render(Path(__file__).parent, "demo.html.j2", pictures, tasks=tasks, report=report, beams=BEAMS)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
