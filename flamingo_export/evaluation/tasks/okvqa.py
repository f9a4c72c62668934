"""OKVQA (Marino et al. 2019, arXiv 1906.00067): questions that want outside knowledge, VQA's layout, COCO's images."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.task import Split, Task
from flamingo_export.evaluation.tasks.vqa_files import read_vqa


def read(data: Path, split: str) -> Split:
    """Items of `train` or `val`."""
    return read_vqa(
        data,
        split,
        questions=(f"OpenEnded_mscoco_{split}2014_questions.json",),
        annotations=(f"mscoco_{split}2014_annotations.json",),
        images="{split}2014",
        image_name="COCO_{split}2014_{id:012d}.jpg",
    )


TASK = Task(
    name="okvqa",
    title="OKVQA",
    form="question",
    mode="open",
    metric="vqa_accuracy",
    read=read,
    files="OpenEnded_mscoco_{train,val}2014_questions.json, mscoco_{train,val}2014_annotations.json, train2014/, val2014/",
    max_new_tokens=10,
    source="https://okvqa.allenai.org/download.html",
)
