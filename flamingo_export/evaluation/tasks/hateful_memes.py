"""HatefulMemes (Kiela et al. 2020, arXiv 2005.04790): a meme with the text on it, hateful or not, ranked by ROC AUC."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import image_in
from flamingo_export.evaluation.reading import Faults, first_of, read_json_lines, refuse_duplicates
from flamingo_export.evaluation.task import Item, Prompt, Split, Task

_ANSWERS = ("no", "yes")


class _Entry(msgspec.Struct):
    id: int | str
    img: str
    text: str
    label: int | None = None


def read(data: Path, split: str) -> Split:
    """Items of `train`, `dev_seen`, `test_seen` and the like."""
    file = first_of(data, (f"{split}.jsonl",), "HatefulMemes' lines")
    faults = Faults()
    items, ids, lines = [], [], []
    for line, entry in read_json_lines(file, _Entry, '{"id", "img", "text", "label"}'):
        if entry.label not in (0, 1):
            faults.add(file, line, f"label {entry.label}, expected 0 or 1; those of some test splits are not published")
            continue
        ids.append(str(entry.id))
        lines.append(line)
        items.append(
            Item(
                id=str(entry.id),
                medium=image_in([data], entry.img),
                question=" ".join(entry.text.split()),
                references=(_ANSWERS[entry.label],),
                answer=_ANSWERS[entry.label],
                candidates=_ANSWERS,
                relevance=tuple(float(index == entry.label) for index in range(2)),
                label=entry.label,
            )
        )
    refuse_duplicates(file, ids, lines, faults)
    faults.check()
    return Split(items=tuple(items))


TASK = Task(
    name="hateful_memes",
    title="HatefulMemes",
    form="question",
    mode="closed",
    metric="roc_auc",
    read=read,
    files="{train,dev_seen,test_seen}.jsonl, img/",
    split="dev_seen",
    paper_split="test_seen",
    prompt=Prompt(
        example='{image}is an image with: "{question}" written on it. Is it hateful? Answer: {answer}{end}',
        query='{image}is an image with: "{question}" written on it. Is it hateful? Answer:',
    ),
    source="https://hatefulmemeschallenge.com",
)
