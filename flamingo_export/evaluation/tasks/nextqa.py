"""NExT-QA, open-ended (Xiao et al. 2021, arXiv 2105.08276): causal, temporal and descriptive questions about videos."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.evaluation.media_files import video_in
from flamingo_export.evaluation.reading import Faults, first_of, read_csv, read_json, refuse_duplicates
from flamingo_export.evaluation.task import Item, Split, Task
from flamingo_export.runtime.videos import Video

_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def read(data: Path, split: str) -> Split:
    """Items of `train`, `val` or `test`, with the further references of `add_reference_answer_SPLIT.json` where it is there.

    `map_vid_vidorID.json`, where it is there, says which folder of VidOR each video lies in.
    """
    file = first_of(data, (f"{split}.csv",), "NExT-QA's open-ended questions")
    more = data / f"add_reference_answer_{split}.json"
    further: dict[str, dict[str, str]] = {}
    if more.is_file():
        further = read_json(more, dict[str, dict[str, str]], "{VIDEO: {QID: answer}}")
    places = data / "map_vid_vidorID.json"
    paths = read_json(places, dict[str, str], "{VIDEO: FOLDER/VIDEO}") if places.is_file() else {}
    faults = Faults()
    items, ids, lines = [], [], []
    for line, row in read_csv(file, ("video", "question", "answer", "qid", "type"), "NExT-QA's columns"):
        kind = row["type"].strip()
        if kind[:1] not in _KINDS:
            faults.add(file, line, f"type {kind!r}, expected one that begins with C, T or D")
            continue
        answer = row["answer"].strip()
        extra = further.get(row["video"], {}).get(row["qid"], "").strip()
        name = f"{row['video']}/{row['qid']}"
        ids.append(name)
        lines.append(line)
        videos = [data / "videos", data / "NExTVideo", data]
        items.append(
            Item(
                id=name,
                medium=Video(source=video_in(videos, paths.get(row["video"], row["video"]))),
                question=row["question"].strip(),
                references=tuple(text for text in (answer, extra) if text),
                answer=answer,
                kind=kind,
                groups=(_KINDS[kind[0]],),
            )
        )
    refuse_duplicates(file, ids, lines, faults)
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="nextqa",
    title="NextQA",
    form="question",
    mode="open",
    metric="wups",
    read=read,
    media="video",
    files="{train,val,test}.csv, add_reference_answer_{val,test}.json, map_vid_vidorID.json, videos/",
    split="test",
    paper_split="test",
    max_new_tokens=12,
    source="https://github.com/doc-doc/NExT-OE",
)
