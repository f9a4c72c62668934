"""What a task is, and what its items are: data, filled in by one small file per task (`tasks/`) or a user's own TOML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flamingo_export.runtime.media import MediumSource

Mode = Literal["open", "closed"]
"""open: the model writes an answer (beams, up to the end of chunk). closed: the log-likelihoods of given answers are compared."""
Form = Literal["caption", "question"]
"""Which of the model's own prompt forms is filled: `Output:` or `Question: ... Answer:` in the paper's."""
MetricName = Literal["exact", "top1", "vqa_accuracy", "ivqa_accuracy", "cider", "wups", "ndcg", "roc_auc", "mwap", "choice"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to be answered, and the same thing as an example for others.

    medium: an image or video, None for a text without one.
    references: every answer that counts, as published (repeated where annotators agree).
    answer: what the item says as an example; empty where it cannot be one.
    candidates: answers of a closed task. relevance: how right each of them is, 0 to 1 (one 1 where one is right).
    label: 1 where a binary task's item is positive, 0 where it is negative.
    class_name: of a classification. kind: of question, as published. groups: parts of the table that the item counts in.
    pool: its examples are taken from those with the same one.
    listed: ids of the examples that the data themselves name for it, by number of shots.
    segment: the video that a clip belongs to. action: verb and noun (both RareAct's).
    """

    id: str
    medium: MediumSource | None
    references: tuple[str, ...] = ()
    answer: str = ""
    question: str | None = None
    candidates: tuple[str, ...] = ()
    relevance: tuple[float, ...] = ()
    label: int | None = None
    class_name: str = ""
    kind: str = ""
    groups: tuple[str, ...] = ()
    pool: str = ""
    segment: str = ""
    action: tuple[str, str] | None = None
    listed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Texts that a task brings along in place of the model's own forms, with the fields {image}, {question}, {answer} and {end}."""

    example: str
    query: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """Items of one split. left_out: what of the files was not used, and why, counted."""

    items: tuple[Item, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


Reader = Callable[[Path, str], Split]
"""(folder of the data, split) -> its items. Raises EvaluationError naming file and line."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    split: what is answered by default; paper_split: what the paper answered (some answers were never published). support: the split that
    examples are taken from. files: what is expected in the data folder, for messages and docs. needs_data: False where the items are made,
    not read.
    """

    name: str
    title: str
    form: Form
    mode: Mode
    metric: MetricName
    read: Reader
    files: str
    media: Literal["image", "video", "either"] = "image"
    split: str = "val"
    paper_split: str = "val"
    support: str = "train"
    prompt: Prompt | None = None
    max_new_tokens: int = 20
    needs_data: bool = True
    source: str = ""


ZERO_SHOT_TEXTS = 2
"""Text-only examples of the paper's zero-shot prompt (Flamingo, arXiv 2204.14198, appendix C)."""
