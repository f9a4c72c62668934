"""RareAct (Miech et al. 2020, arXiv 2008.01018): unusual actions, a verb and a noun, each clip scored for them."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.media_files import video_in
from flamingo_export.evaluation.reading import Faults, first_of, read_csv, refuse_duplicates, seconds
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.runtime.videos import Video

_ANNOTATIONS = ("0", "1", "2", "3", "4")


def read(data: Path, split: str) -> Split:
    """All clips. A positive clip is scored for every action, the others for the one that they were annotated for."""
    file = first_of(data, ("rareact.csv",), "RareAct's annotations")
    faults = Faults()
    rows = list(read_csv(file, ("id", "video_id", "start", "end", "verb", "noun", "annotation"), "RareAct's columns"))
    actions = tuple(dict.fromkeys(f"{row['verb'].strip()} {row['noun'].strip()}" for _, row in rows))
    refuse_duplicates(file, [row["id"] for _, row in rows], [line for line, _ in rows], faults)
    items = []
    for line, row in rows:
        start, end = seconds(row["start"]), seconds(row["end"])
        annotation = row["annotation"].strip()
        if annotation not in _ANNOTATIONS:
            faults.add(file, line, f"annotation {annotation!r}, expected 0 to 4")
            continue
        if start is None or end is None or start >= end:
            faults.add(file, line, f"the clip goes from {row['start']!r} to {row['end']!r}, expected seconds")
            continue
        own = f"{row['verb'].strip()} {row['noun'].strip()}"
        candidates = actions if annotation == "1" else (own,)
        items.append(
            Item(
                id=row["id"],
                medium=Video(source=video_in([data / "videos", data / "rareact", data], row["video_id"]), clip=(start, end)),
                references=(own,) if annotation == "1" else (),
                answer=own if annotation == "1" else "",
                candidates=candidates,
                relevance=tuple(float(annotation == "1" and candidate == own) for candidate in candidates),
                kind=annotation,
                segment=row["video_id"],
                action=(row["verb"].strip(), row["noun"].strip()),
            )
        )
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="rareact",
    title="RareAct",
    form="caption",
    mode="closed",
    metric="mwap",
    read=read,
    media="video",
    files="rareact.csv, videos/VIDEO_ID.mp4",
    split="all",
    paper_split="all, without examples",
    support="all",
    source="https://github.com/antoine77340/RareAct",
)
