"""Flickr30K captions (Young et al. 2014), by Karpathy's split or the token file with lists of images."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.reading import first_of
from flamingo_export.evaluation.task import Split, Task
from flamingo_export.evaluation.tasks.caption_files import read_karpathy, read_tokens


def read(data: Path, split: str) -> Split:
    """Items of `train`, `val` or `test`."""
    folders = [data / "flickr30k-images", data / "images", data]
    file = first_of(
        data, ("dataset_flickr30k.json", "results_20130124.token"), "Karpathy's dataset_flickr30k.json or the token file"
    )
    if file.suffix == ".json":
        return read_karpathy(file, split, folders)
    return read_tokens(file, first_of(data, (f"{split}.txt",), f"the names of the {split} split's images"), folders)


TASK = Task(
    name="flickr30k",
    title="Flickr30K",
    form="caption",
    mode="open",
    metric="cider",
    read=read,
    files="dataset_flickr30k.json (Karpathy), or results_20130124.token with {train,val,test}.txt; flickr30k-images/",
    split="test",
    paper_split="test (Karpathy's)",
    source="https://shannon.cs.illinois.edu/DenotationGraph/",
)
