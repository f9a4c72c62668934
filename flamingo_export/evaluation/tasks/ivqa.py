"""iVQA (Yang et al. 2021, arXiv 2012.00451): questions about instruction videos, answers of five annotators."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.media_files import video_in
from flamingo_export.evaluation.reading import Faults, first_of, read_csv, seconds
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.evaluation.tasks.vqa_files import most_said
from flamingo_export.runtime.videos import Video

_ANSWERS = tuple(f"answer{number}" for number in range(1, 6))


def read(data: Path, split: str) -> Split:
    """Items of `train`, `val` or `test`; a row with `start` and `end` is that clip of its video."""
    file = first_of(data, (f"{split}.csv",), "iVQA's questions")
    faults = Faults()
    items = []
    for line, row in read_csv(file, ("video_id", "question", *_ANSWERS), "iVQA's columns"):
        answers = tuple(row[name].strip() for name in _ANSWERS if row[name].strip())
        if not answers:
            faults.add(file, line, "a question without answers")
        clip = None
        if row.get("start") and row.get("end"):
            start, end = seconds(row["start"]), seconds(row["end"])
            if start is None or end is None or start >= end:
                faults.add(file, line, f"the clip goes from {row['start']!r} to {row['end']!r}, expected seconds")
                continue
            clip = (start, end)
        video = video_in([data / "videos", data], row["video_id"])
        items.append(
            Item(
                id=str(line),
                medium=Video(source=video, clip=clip),
                question=row["question"].strip(),
                references=answers,
                answer=most_said(answers),
            )
        )
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="ivqa",
    title="iVQA",
    form="question",
    mode="open",
    metric="ivqa_accuracy",
    read=read,
    media="video",
    files="{train,val,test}.csv, videos/VIDEO_ID.mp4",
    split="test",
    paper_split="test",
    max_new_tokens=10,
    source="https://antoyang.github.io/just-ask.html",
)
