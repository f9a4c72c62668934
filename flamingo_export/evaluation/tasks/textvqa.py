"""TextVQA (Singh et al. 2019, arXiv 1904.08920): questions about text in images, one JSON a split."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import image_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json, refuse_duplicates
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.evaluation.tasks.vqa_files import most_said


class _Entry(msgspec.Struct):
    question_id: int
    image_id: str
    question: str
    answers: list[str] = []


class _File(msgspec.Struct):
    data: list[_Entry]


def read(data: Path, split: str) -> Split:
    """Items of `train` or `val`; the images of both lie in one folder."""
    file = first_of(data, (f"TextVQA_0.5.1_{split}.json",), "TextVQA's annotations")
    entries = read_json(file, _File, '{"data": [{"question_id", "image_id", "question", "answers"}]}').data
    faults = Faults()
    ids = [str(entry.question_id) for entry in entries]
    if len(set(ids)) < len(ids):
        refuse_duplicates(file, ids, [line_of(file, "data", index) for index in range(len(ids))], faults)
    folders = [data / name for name in ("train_images", "train_val_images", "images")]
    items = []
    for index, entry in enumerate(entries):
        if not entry.answers:
            faults.add(
                file,
                line_of(file, "data", index),
                f"question {entry.question_id} has no answers; those of the test split are not published",
            )
        items.append(
            Item(
                id=str(entry.question_id),
                medium=image_in(folders, f"{entry.image_id}.jpg"),
                question=entry.question.strip(),
                references=tuple(entry.answers),
                answer=most_said(entry.answers),
            )
        )
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="textvqa",
    title="TextVQA",
    form="question",
    mode="open",
    metric="vqa_accuracy",
    read=read,
    files="TextVQA_0.5.1_{train,val}.json, train_images/",
    max_new_tokens=10,
    source="https://textvqa.org/dataset",
)
