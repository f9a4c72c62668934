"""One small typed file a task, and what finds them by name."""

from __future__ import annotations

import importlib
from pathlib import Path

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.task import Task

PAPER = (
    "coco", "okvqa", "vqav2", "flickr30k", "vizwiz", "textvqa", "visdial", "hateful_memes",
    "vatex", "msvdqa", "youcook2", "msrvttqa", "ivqa", "rareact", "nextqa", "star",
)  # fmt: skip
"""The paper's 16 benchmarks."""
CLASSIFICATION = ("imagenet", "kinetics700")
NANO = ("nano-captions", "nano-questions", "nano-formats", "nano-labels")
"""Tasks of the shipped nano checkpoint, made from seeds: no data are needed."""
NAMES = (*PAPER, *CLASSIFICATION, *NANO)


def task_of(name: str | Path) -> Task:
    """The task of that name, or the one that a TOML file describes. Raises EvaluationError listing the names there are."""
    text = str(name)
    if text.endswith(".toml"):
        from flamingo_export.evaluation.tasks.own import read_task

        return read_task(Path(text))
    if text in NANO:
        from flamingo_export.evaluation.tasks import nano

        return nano.TASKS[text]
    if text not in NAMES:
        raise EvaluationError(
            f"there is no task {text!r}. Choose one of {', '.join(NAMES)}, or give a file of your own: mine.toml"
        )
    task: Task = importlib.import_module(f"{__name__}.{text}").TASK
    return task
