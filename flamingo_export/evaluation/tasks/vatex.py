"""VATEX captions, English (Wang et al. 2019, arXiv 1904.03493)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import video_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json, refuse_duplicates
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.runtime.videos import Video


class _Entry(msgspec.Struct):
    videoID: str  # noqa: N815  # as published
    enCap: list[str] = []  # noqa: N815


_FILES = {
    "train": ("vatex_training_v1.0.json",),
    "val": ("vatex_validation_v1.0.json",),
    "test": ("vatex_public_test_english_v1.1.json",),
}


def read(data: Path, split: str) -> Split:
    """Items of `train`, `val` or `test` (the public one). A video is named by its id or by that without the times at its end."""
    file = first_of(data, _FILES.get(split, (f"{split}.json",)), "VATEX's captions")
    entries = read_json(file, list[_Entry], '[{"videoID", "enCap": [...]}]')
    faults = Faults()
    ids = [entry.videoID for entry in entries]
    if len(set(ids)) < len(ids):
        refuse_duplicates(file, ids, [line_of(file, index) for index in range(len(ids))], faults)
    items = []
    for index, entry in enumerate(entries):
        captions = tuple(" ".join(caption.split()) for caption in entry.enCap)
        if not captions:
            faults.add(file, line_of(file, index), f"{entry.videoID} has no English captions")
        video = video_in([data / "videos" / split, data / "videos"], entry.videoID)
        answer = next((caption for caption in captions if caption), "")
        items.append(Item(id=entry.videoID, medium=Video(source=video), references=captions, answer=answer))
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="vatex",
    title="VATEX",
    form="caption",
    mode="open",
    metric="cider",
    read=read,
    media="video",
    files="vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json, videos/VIDEOID.mp4",
    split="test",
    paper_split="test",
    source="https://eric-xw.github.io/vatex-website/download.html",
)
