"""VizWiz VQA (Gurari et al. 2018, arXiv 1802.08218): questions asked by blind people, one JSON list a split."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import image_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json, refuse_duplicates
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.evaluation.tasks.vqa_files import most_said


class _Answer(msgspec.Struct):
    answer: str


class _Entry(msgspec.Struct):
    image: str
    question: str
    answers: list[_Answer] = []
    answer_type: str = ""


def read(data: Path, split: str) -> Split:
    """Items of `train` or `val`; each image has one question."""
    file = first_of(data, (f"{split}.json", f"Annotations/{split}.json"), "VizWiz's annotations")
    entries = read_json(file, list[_Entry], '[{"image", "question", "answers": [{"answer"}]}]')
    faults = Faults()
    ids = [entry.image for entry in entries]
    if len(set(ids)) < len(ids):
        refuse_duplicates(file, ids, [line_of(file, index) for index in range(len(ids))], faults)
    items = []
    for index, entry in enumerate(entries):
        if not entry.answers:
            faults.add(file, line_of(file, index), f"{entry.image} has no answers; those of the test split are not published")
        answers = tuple(answer.answer for answer in entry.answers)
        items.append(
            Item(
                id=entry.image,
                medium=image_in([data / split, data / "images"], entry.image),
                question=entry.question.strip(),
                references=answers,
                answer=most_said(answers),
                groups=(f"answers: {entry.answer_type}",) if entry.answer_type else (),
            )
        )
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="vizwiz",
    title="VizWiz",
    form="question",
    mode="open",
    metric="vqa_accuracy",
    read=read,
    files="{train,val}.json, train/, val/",
    paper_split="test-dev (its answers are not published)",
    max_new_tokens=10,
    source="https://vizwiz.org/tasks-and-datasets/vqa/",
)
