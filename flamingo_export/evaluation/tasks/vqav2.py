"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837): open questions about COCO's images, ten answers each."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.task import Split, Task
from flamingo_export.evaluation.tasks.vqa_files import read_vqa


def read(data: Path, split: str) -> Split:
    """Items of `train` or `val`."""
    return read_vqa(
        data,
        split,
        questions=(f"v2_OpenEnded_mscoco_{split}2014_questions.json",),
        annotations=(f"v2_mscoco_{split}2014_annotations.json",),
        images="{split}2014",
        image_name="COCO_{split}2014_{id:012d}.jpg",
    )


TASK = Task(
    name="vqav2",
    title="VQAv2",
    form="question",
    mode="open",
    metric="vqa_accuracy",
    read=read,
    files="v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json, train2014/, val2014/",
    paper_split="test-dev (its answers are not published)",
    max_new_tokens=10,
    source="https://visualqa.org/download.html",
)
