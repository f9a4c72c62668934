"""STAR (Wu et al. 2021): situated reasoning about clips of Charades, four choices a question."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import video_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json, refuse_duplicates
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.runtime.videos import Video


class _Choice(msgspec.Struct):
    choice: str


class _Entry(msgspec.Struct):
    question_id: str
    question: str
    video_id: str
    start: float
    end: float
    choices: list[_Choice]
    answer: str | None = None


def read(data: Path, split: str) -> Split:
    """Items of `train` or `val`, each a clip of its video; the test split's answers are not published."""
    file = first_of(data, (f"STAR_{split}.json",), "STAR's questions")
    entries = read_json(
        file, list[_Entry], '[{"question_id", "question", "video_id", "start", "end", "answer", "choices": [{"choice"}]}]'
    )
    faults = Faults()
    ids = [entry.question_id for entry in entries]
    if len(set(ids)) < len(ids):
        refuse_duplicates(file, ids, [line_of(file, index) for index in range(len(ids))], faults)
    items = []
    for index, entry in enumerate(entries):
        choices = tuple(choice.choice.strip() for choice in entry.choices)
        answer = (entry.answer or "").strip()
        if answer not in choices:
            fault = (
                f"answer {answer!r} is none of the choices"
                if answer
                else "no answer; those of the test split are not published"
            )
            faults.add(file, line_of(file, index), f"{entry.question_id}: {fault}")
            continue
        if not 0 <= entry.start < entry.end:
            faults.add(file, line_of(file, index), f"{entry.question_id} goes from {entry.start} to {entry.end} seconds")
            continue
        video = video_in([data / "Charades_v1_480", data / "videos", data], entry.video_id)
        items.append(
            Item(
                id=entry.question_id,
                medium=Video(source=video, clip=(entry.start, entry.end)),
                question=entry.question.strip(),
                references=(answer,),
                answer=answer,
                candidates=choices,
                relevance=tuple(float(choice == answer) for choice in choices),
                groups=(entry.question_id.split("_")[0],),
            )
        )
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="star",
    title="STAR",
    form="question",
    mode="closed",
    metric="choice",
    read=read,
    media="video",
    files="STAR_{train,val}.json, Charades_v1_480/VIDEO.mp4",
    paper_split="test (its answers are not published)",
    source="https://github.com/csbobby/STAR_Benchmark",
)
