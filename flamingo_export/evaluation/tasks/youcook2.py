"""YouCook2 captions (Zhou et al. 2018, arXiv 1703.09788): segments of cooking videos, one sentence each."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import video_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.runtime.videos import Video

_SUBSETS = {"train": "training", "val": "validation", "test": "testing"}


class _Segment(msgspec.Struct):
    id: int
    segment: tuple[float, float]
    sentence: str


class _Video(msgspec.Struct):
    subset: str
    annotations: list[_Segment] = []
    recipe_type: str = ""


class _File(msgspec.Struct):
    database: dict[str, _Video]


def read(data: Path, split: str) -> Split:
    """Segments of `train` or `val`, each a clip of its video."""
    file = first_of(
        data,
        ("youcookii_annotations_trainval.json", "annotations/youcookii_annotations_trainval.json"),
        "YouCook2's annotations",
    )
    videos = read_json(
        file, _File, '{"database": {VIDEO: {"subset", "annotations": [{"id", "segment", "sentence"}]}}}'
    ).database
    faults = Faults()
    items = []
    for name, video in videos.items():
        if video.subset != _SUBSETS.get(split, split):
            continue
        folders = [data / "videos" / folder for folder in (_SUBSETS.get(split, split), "")]
        folders += [data / "videos" / _SUBSETS.get(split, split) / video.recipe_type]
        for index, each in enumerate(video.annotations):
            start, end = each.segment
            if not 0 <= start < end:
                line = line_of(file, "database", name, "annotations", index)
                faults.add(file, line, f"segment {each.id} of {name} goes from {start} to {end} seconds")
                continue
            sentence = " ".join(each.sentence.split())
            medium = Video(source=video_in(folders, name), clip=(start, end))
            items.append(Item(id=f"{name}/{each.id}", medium=medium, references=(sentence,), answer=sentence))
    if not items:
        faults.add(file, None, f"no segment is of split {split!r} ({_SUBSETS.get(split, split)})")
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="youcook2",
    title="YouCook2",
    form="caption",
    mode="open",
    metric="cider",
    read=read,
    media="video",
    files="youcookii_annotations_trainval.json, videos/VIDEO.mp4",
    source="http://youcook2.eecs.umich.edu/download",
)
