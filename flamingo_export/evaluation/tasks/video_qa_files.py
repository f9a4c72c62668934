"""Files of MSVD-QA and MSRVTT-QA (Xu et al. 2017): a JSON list a split, one answer a question."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import video_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json, refuse_duplicates, text_of
from flamingo_export.evaluation.task import Item, Split
from flamingo_export.runtime.videos import Video


class _Entry(msgspec.Struct):
    id: int
    video_id: int
    question: str
    answer: str


def read_video_qa(data: Path, split: str, *, stem: str, names: dict[int, str] | None = None) -> Split:
    """Items of `train`, `val` or `test`. stem: a video's name with {id}; names: other names of videos, by id."""
    file = first_of(data, (f"{split}_qa.json", f"qa_{split}.json"), "the published questions")
    entries = read_json(file, list[_Entry], '[{"id", "video_id", "question", "answer"}]')
    faults = Faults()
    ids = [str(entry.id) for entry in entries]
    if len(set(ids)) < len(ids):
        refuse_duplicates(file, ids, [line_of(file, index) for index in range(len(ids))], faults)
    folders = [data / "videos", data / "video", data]
    items = []
    for entry in entries:
        video = video_in(folders, stem.format(id=entry.video_id))
        if names and not video.exists() and entry.video_id in names:
            video = video_in(folders, names[entry.video_id])
        answer = entry.answer.strip()
        items.append(
            Item(
                id=str(entry.id),
                medium=Video(source=video),
                question=entry.question.strip(),
                references=(answer,),
                answer=answer,
                groups=(f"question: {entry.question.split()[0].lower()}",) if entry.question.split() else (),
            )
        )
    faults.check()
    return Split(items=tuple(items))


def read_names(file: Path) -> dict[int, str]:
    """MSVD's `youtube_mapping.txt`: a video's name and `vidN` on each line. Empty where there is no such file."""
    if not file.is_file():
        return {}
    faults = Faults()
    names: dict[int, str] = {}
    for number, line in enumerate(text_of(file, "a video's name and vidN on each line").split("\n"), start=1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) != 2 or not words[1].startswith("vid") or not words[1][3:].isdecimal():
            faults.add(file, number, "expected a video's name and vidN")
            continue
        names[int(words[1][3:])] = words[0]
    faults.check()
    return names
