"""A user's own task: a TOML file that says what is asked and how it is scored, and JSON Lines of items.

    title = "Parts on the belt"
    form = "question"                    # or "caption"
    metric = "vqa_accuracy"              # exact, top1, vqa_accuracy, ivqa_accuracy, cider, wups; closed: choice, roc_auc, ndcg
    candidates = ["yes", "no"]           # closed tasks; a line may have its own
    support = "examples.jsonl"           # where examples come from, relative to this file; or eval --support FILE
    max_new_tokens = 10
    [prompt]                             # only where the model's own forms do not do
    example = "{image}Q: {question} A: {answer}{end}"
    query = "{image}Q: {question} A:"

A line: {"id": "1", "image": "a.png", "question": "What is it?", "answers": ["a nut", "nut"]}; "video" in place of "image", with "clip": [2, 5]
for a part of it; "text_only": true for none. Closed tasks: "candidates", and "answer" among them or "relevance", a number for each.
Paths are relative to the file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_args

import msgspec

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.metrics.registry import CLOSED
from flamingo_export.evaluation.reading import Faults, read_json_lines, refuse_duplicates, text_of
from flamingo_export.evaluation.task import Form, Item, MetricName, Prompt, Split, Task
from flamingo_export.evaluation.tasks.vqa_files import most_said
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.videos import Video

_FIELDS = ("{image}", "{question}", "{answer}", "{end}")


class _PromptFile(msgspec.Struct, forbid_unknown_fields=True):
    example: str
    query: str


class _TaskFile(msgspec.Struct, forbid_unknown_fields=True):
    metric: str
    title: str = ""
    form: str = "question"
    candidates: tuple[str, ...] = ()
    support: str | None = None
    max_new_tokens: int = 20
    prompt: _PromptFile | None = None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    id: str | int
    image: str | None = None
    video: str | None = None
    clip: tuple[float, float] | None = None
    text_only: bool = False
    question: str | None = None
    answers: tuple[str, ...] = ()
    answer: str | None = None
    candidates: tuple[str, ...] = ()
    relevance: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()


def read_task(path: Path) -> Task:
    """The task that a TOML file describes. Raises EvaluationError naming what is wrong."""
    try:
        found = msgspec.convert(tomllib.loads(text_of(path, "a task in TOML")), _TaskFile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise EvaluationError(f"{path}: {error}; docs/evaluation.md shows such a file") from None
    for name, value, allowed in (("metric", found.metric, get_args(MetricName)), ("form", found.form, get_args(Form))):
        if value not in allowed or value == "mwap":
            raise EvaluationError(
                f"{path}: {name} is {value!r}, expected one of {', '.join(each for each in allowed if each != 'mwap')}"
            )
    if found.max_new_tokens < 1:
        raise EvaluationError(f"{path}: max_new_tokens is {found.max_new_tokens}, expected at least 1")
    closed = found.metric in CLOSED
    if found.candidates and not closed:
        raise EvaluationError(
            f"{path}: candidates are for closed tasks ({', '.join(sorted(CLOSED - {'mwap'}))}), metric {found.metric} is open"
        )
    prompt = _checked(path, found.prompt, found.form) if found.prompt else None
    support = path.parent / found.support if found.support else None

    def read(data: Path, split: str) -> Split:
        place = support if split == "support" and support is not None else data
        return read_items(place, found.form, closed, found.candidates, binary=found.metric == "roc_auc")

    return Task(
        name=path.stem,
        title=found.title or path.stem,
        form=found.form,  # type: ignore[arg-type]  # checked above
        mode="closed" if closed else "open",
        metric=found.metric,  # type: ignore[arg-type]
        read=read,
        media="either",
        files="JSON Lines",
        split="data",
        paper_split="",
        support="support" if support is not None else "",
        prompt=prompt,
        max_new_tokens=found.max_new_tokens,
    )


def read_items(path: Path, form: str, closed: bool, candidates: tuple[str, ...], *, binary: bool = False) -> Split:
    """Items of a JSON Lines file. candidates: of lines that have none. binary: there are two of them, the second one is the positive.

    Raises EvaluationError naming the line of each fault.
    """
    faults = Faults()
    items, ids, lines = [], [], []
    for number, line in read_json_lines(path, _Line, "the fields that docs/evaluation.md lists"):
        try:
            items.append(_item(path, line, form, closed, candidates))
            if binary and items[-1].label is None:
                raise EvaluationError(
                    f"ROC AUC takes two candidates, the second one the positive; there are {len(items[-1].candidates)}"
                )
        except EvaluationError as error:
            faults.add(path, number, str(error))
            continue
        ids.append(str(line.id))
        lines.append(number)
    refuse_duplicates(path, ids, lines, faults)
    if not items and not faults:
        faults.add(path, None, "no items")
    faults.check()
    return Split(items=tuple(items))


def _item(path: Path, line: _Line, form: str, closed: bool, candidates: tuple[str, ...]) -> Item:
    if (line.image is not None) + (line.video is not None) + line.text_only != 1:
        raise EvaluationError("expected one of image, video and text_only")
    if any(place is not None and not place.strip() for place in (line.image, line.video)):
        raise EvaluationError("the path of the image or video is empty")
    if (line.question is not None) != (form == "question"):
        raise EvaluationError("a question is missing" if form == "question" else "a question, but the task's form is a caption")
    if line.question is not None and not line.question.strip():
        raise EvaluationError("the question is empty")
    if line.clip is not None and (line.video is None or not 0 <= line.clip[0] < line.clip[1]):
        raise EvaluationError(f"clip {list(line.clip)}, expected [start, end] in seconds, of a video")
    medium: MediumSource | None = None
    if line.image is not None:
        medium = path.parent / line.image
    elif line.video is not None:
        medium = Video(source=path.parent / line.video, clip=line.clip)
    shared: dict[str, Any] = {"id": str(line.id), "medium": medium, "question": line.question, "groups": line.groups}
    references = line.answers or ((line.answer,) if line.answer is not None else ())
    if not closed:
        if line.candidates or line.relevance:
            raise EvaluationError("candidates and relevance are for closed tasks")
        if not any(text.strip() for text in references):
            raise EvaluationError("no answer that is not empty; expected answers: [...]")
        return Item(**shared, references=references, answer=line.answer or most_said(references))
    choices = line.candidates or candidates
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise EvaluationError(f"candidates {list(choices)}, expected two or more different ones, here or in the task's file")
    relevance = line.relevance or tuple(float(choice in references) for choice in choices)
    if (
        len(relevance) != len(choices)
        or not any(value > 0 for value in relevance)
        or any(not 0 <= value <= 1 for value in relevance)
    ):
        raise EvaluationError("expected an answer that is among the candidates, or a relevance from 0 to 1 for each of them")
    best = choices[max(range(len(choices)), key=lambda at: relevance[at])]
    return Item(
        **shared,
        references=references or (best,),
        answer=best,
        candidates=choices,
        relevance=relevance,
        label=int(relevance[1] >= 1) if len(choices) == 2 else None,
    )


def _checked(path: Path, prompt: _PromptFile, form: str) -> Prompt:
    """The forms, once they hold the fields that they need."""
    need = ["{image}"] + (["{question}"] if form == "question" else [])
    for name, text, wanted in (("example", prompt.example, [*need, "{answer}"]), ("query", prompt.query, need)):
        if missing := [each for each in wanted if each not in text]:
            raise EvaluationError(f"{path}: prompt.{name} lacks {', '.join(missing)}; the fields are {', '.join(_FIELDS)}")
    if "{answer}" in prompt.query:
        raise EvaluationError(f"{path}: prompt.query holds {{answer}}, which is what is asked")
    return Prompt(example=prompt.example, query=prompt.query)
