"""MSRVTT-QA (Xu et al. 2017): one-word answers about videos."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.task import Split, Task
from flamingo_export.evaluation.tasks.video_qa_files import read_video_qa


def read(data: Path, split: str) -> Split:
    """Items of `train`, `val` or `test`."""
    return read_video_qa(data, split, stem="video{id}")


TASK = Task(
    name="msrvttqa",
    title="MSRVTTQA",
    form="question",
    mode="open",
    metric="top1",
    read=read,
    media="video",
    files="{train,val,test}_qa.json, videos/videoN.mp4",
    split="test",
    paper_split="test",
    max_new_tokens=10,
    source="https://github.com/xudejing/video-question-answering",
)
