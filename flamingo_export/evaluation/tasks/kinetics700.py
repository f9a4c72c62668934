"""Kinetics700 classification (Carreira et al. 2019, arXiv 1907.06987): CSV of clips, 700 actions."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.media_files import VIDEO_SUFFIXES, video_in
from flamingo_export.evaluation.reading import Faults, first_of, read_csv, refuse_duplicates, whole_number
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.runtime.videos import Video


def read(data: Path, split: str) -> Split:
    """Items of `train` or `val`. Videos are cut already, as the usual downloads are: YOUTUBEID_SSSSSS_EEEEEE.mp4, in a folder a class or not."""
    own = (f"{split}.csv", f"kinetics700_{split}.csv", f"annotations/{split}.csv")
    file = first_of(data, own, "Kinetics700's clips")
    faults = Faults()
    rows = list(read_csv(file, ("label", "youtube_id", "time_start", "time_end"), "Kinetics700's columns"))
    candidates = tuple(dict.fromkeys(row["label"].strip() for _, row in rows))
    relevances = {label: tuple(float(candidate == label) for candidate in candidates) for label in candidates}
    ids, lines, items = [], [], []
    for line, row in rows:
        start, end = whole_number(row["time_start"]), whole_number(row["time_end"])
        if start is None or end is None or not 0 <= start < end:
            faults.add(file, line, f"the clip goes from {row['time_start']!r} to {row['time_end']!r}, expected seconds")
            continue
        label, stem = row["label"].strip(), f"{row['youtube_id']}_{start:06d}_{end:06d}"
        if not label:
            faults.add(file, line, "a clip without a label; those of the test split are not published")
            continue
        ids.append(stem)
        lines.append(line)
        folders = [data / split / label, data / split / label.replace(" ", "_"), data / split, data / "videos"]
        items.append(
            Item(
                id=stem,
                medium=Video(source=video_in(folders, stem)),
                references=(label,),
                answer=label,
                candidates=candidates,
                relevance=relevances[label],
                class_name=label,
            )
        )
    refuse_duplicates(file, ids, lines, faults)
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="kinetics700",
    title="Kinetics700",
    form="caption",
    mode="closed",
    metric="choice",
    read=read,
    media="video",
    files=f"{{train,val}}.csv, {{train,val}}/CLASS/YOUTUBEID_SSSSSS_EEEEEE.mp4 (or {', '.join(VIDEO_SUFFIXES[1:-1])})",
    source="https://github.com/cvdfoundation/kinetics-dataset",
)
