"""COCO captions (Chen et al. 2015, arXiv 1504.00325), by Karpathy's split or COCO's own."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.reading import first_of
from flamingo_export.evaluation.task import Split, Task
from flamingo_export.evaluation.tasks.caption_files import read_coco, read_karpathy


def read(data: Path, split: str) -> Split:
    """Items of Karpathy's `train`, `val` or `test`; with COCO's own files of its `train` or `val`."""
    folders = [data / f"{split}2014", data / "val2014", data / "train2014", data / "images", data]
    own = f"captions_{split}2014.json"
    file = first_of(
        data, ("dataset_coco.json", own, f"annotations/{own}"), "Karpathy's dataset_coco.json or COCO's own captions"
    )
    return read_karpathy(file, split, [data, data / "images"]) if file.name == "dataset_coco.json" else read_coco(file, folders)


TASK = Task(
    name="coco",
    title="COCO",
    form="caption",
    mode="open",
    metric="cider",
    read=read,
    files="dataset_coco.json (Karpathy) or captions_{train,val}2014.json, train2014/, val2014/",
    split="test",
    paper_split="test (Karpathy's)",
    source="https://cocodataset.org/#download",
)
