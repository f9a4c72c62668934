"""Tasks of the shipped nano checkpoint: those that its model card measures, and one whose labels only the examples tell.

Held-out scenes, digits and clips, made from seeds; the examples are those of `python -m flamingo_reference.nano.evaluate` where the run asks
for the listed ones (`--select listed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_export.errors import EvaluationError, pip_install
from flamingo_export.evaluation.task import ZERO_SHOT_TEXTS, Form, Item, MetricName, Mode, Split, Task
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.videos import Video
from flamingo_reference.nano import pictures

if TYPE_CHECKING:
    from flamingo_reference.nano.pages import Piece
    from flamingo_reference.nano.pictures import Item as Source

Both = tuple[Split, Split]
"""What is asked, and the examples."""
_LABELS = {"red": "seven", "green": "three", "blue": "nine", "yellow": "two", "purple": "eight", "white": "five"}
LABEL_QUERIES = 300
LABEL_EXAMPLES = 300


def medium_of(item: Source) -> MediumSource:
    """Its image, or its frames as a video."""
    frames = list(item.frames)
    return Video(source=frames, num_frames=len(frames)) if len(frames) > 1 else frames[0]


@cache
def captions() -> Both:
    """Captions of all three kinds; with the texts that the card's last column puts before them."""
    from flamingo_reference.nano import heldout

    texts = heldout.texts_pool()
    examples = [
        Item(id=f"{index}:caption", medium=medium_of(item), answer=item.caption, references=(item.caption,), pool=item.kind)
        for index, item in enumerate(texts.items)
    ]
    queries = []
    for kind, count in heldout.COUNTS.items():
        given = _given_texts(kind, "caption", count)
        for index, item in enumerate(heldout.heldout(kind, count)):
            listed = {0: tuple(f"{piece.medium}:caption" for piece in given[index])}
            groups = [] if kind == "video" else ["images"]
            groups.append(kind)
            if kind == "scene":
                groups.append("scene, one object" if item.num_objects == 1 else "scene, two or more")
            queries.append(
                Item(
                    id=f"{kind}/{index}",
                    medium=medium_of(item),
                    references=(item.caption,),
                    answer=item.caption,
                    groups=tuple(groups),
                    pool=kind,
                    listed=listed,
                )
            )
    return Split(items=tuple(queries)), Split(items=tuple(examples))


@cache
def questions() -> Both:
    """Up to two questions of each item, and the card's texts."""
    from flamingo_reference.nano import heldout

    texts = heldout.texts_pool()
    examples = [
        Item(
            id=f"{index}:{number}",
            medium=medium_of(item),
            question=question,
            answer=answer,
            references=(answer,),
            pool=item.kind,
        )
        for index, item in enumerate(texts.items)
        for number, (question, answer) in enumerate(item.questions)
    ]
    queries = []
    for kind, count in heldout.COUNTS.items():
        asked = [
            (index, item, *pair)
            for index, item in enumerate(heldout.heldout(kind, count))
            for pair in heldout.some_questions(item, index)
        ]
        given = _given_texts(kind, "question", len(asked))
        for number, (index, item, question, answer) in enumerate(asked):
            groups = [] if kind == "video" else ["images"]
            groups.append(kind)
            if kind == "scene":
                groups.append(f"scene, {' '.join(question.split()[:2]).lower()}")
            queries.append(
                Item(
                    id=f"{kind}/{index}/{number}",
                    medium=medium_of(item),
                    question=question,
                    references=(answer,),
                    answer=answer,
                    groups=tuple(groups),
                    pool=kind,
                    listed={0: tuple(_question_id(texts.items, piece) for piece in given[number])},
                )
            )
    return Split(items=tuple(queries)), Split(items=tuple(examples))


@cache
def formats() -> Both:
    """What an item is to be put as, which only the examples tell: the card's last table. The examples of 0 shots are those of 2, unseen."""
    from flamingo_reference.nano import heldout, pages

    support = heldout.support_pool()
    queries = heldout.few_shot_queries(heldout.FEW_SHOT)
    examples, asked = [], []
    for kind in ("scene", "digit"):
        for style in support.styles(kind):
            examples += [
                Item(
                    id=f"{index}:{style}",
                    medium=medium_of(item),
                    answer=item.formats[style],
                    references=(item.formats[style],),
                    pool=style,
                )
                for index, item in enumerate(support.items)
                if item.kind == kind and style in item.formats
            ]
            fits = heldout.that_fit(queries, kind, style, heldout.FEW_SHOT)
            listed: list[dict[int, tuple[str, ...]]] = [{} for _ in fits]
            for number in heldout.SHOTS:
                drawn = number or ZERO_SHOT_TEXTS
                rng, draw = np.random.default_rng([11, drawn]), support.drawer(kind)
                for each in listed:
                    page = pages.prompt_page(support.items, rng, draw, style=style, shots=drawn)
                    each[number] = tuple(f"{piece.medium}:{style}" for piece in page)
            for index, each in zip(fits, listed, strict=True):
                item = queries[index]
                asked.append(
                    Item(
                        id=f"{style}/{index}",
                        medium=medium_of(item),
                        references=(item.formats[style],),
                        answer=item.formats[style],
                        groups=(style,),
                        pool=style,
                        listed=each,
                    )
                )
    return Split(items=tuple(asked)), Split(items=tuple(examples))


@cache
def labels() -> Both:
    """Scenes of one object, named after their colour by words that mean something else: only examples bind them.

    Held-out scenes are asked about, training scenes are the examples; candidates are the six words.
    """

    def scenes(split: pictures.Split, count: int, first: int) -> Split:
        items: list[Item] = []
        seed = first
        while len(items) < count:
            scene = pictures.scene(seed, split=split)
            seed += 1
            if scene.num_objects != 1:
                continue
            word = _LABELS[scene.formats["colour"]]
            items.append(
                Item(
                    id=f"{split}/{seed - 1}",
                    medium=scene.frames[0],
                    references=(word,),
                    answer=word,
                    candidates=tuple(_LABELS.values()),
                    relevance=tuple(float(word == each) for each in _LABELS.values()),
                    class_name=word,
                    groups=(scene.formats["colour"],),
                )
            )
        return Split(items=tuple(items))

    return scenes("test", LABEL_QUERIES, 21_000_000), scenes("train", LABEL_EXAMPLES, 22_000_000)


def _given_texts(kind: str, style: str, count: int) -> list[list[Piece]]:
    """The two examples that the card puts before each query of a kind, in order."""
    from flamingo_reference.nano import heldout, pages

    texts = heldout.texts_pool()
    rng, draw = np.random.default_rng(13), texts.drawer(kind)
    return [pages.prompt_page(texts.items, rng, draw, style=style, shots=ZERO_SHOT_TEXTS) for _ in range(count)]


def _question_id(items: Sequence[Any], piece: Piece) -> str:
    asked = [f"Question: {question} Answer:" for question, _ in items[piece.medium or 0].questions]
    return f"{piece.medium}:{asked.index(piece.given)}"


def _task(name: str, title: str, form: Form, metric: MetricName, made: Callable[[], Both], mode: Mode = "open") -> Task:
    def read(data: Path, split: str) -> Split:
        try:
            queries, examples = made()
        except ImportError as error:
            raise EvaluationError(
                f"nano's digits are scikit-learn's scans ({error}). Install it: {pip_install('eval')}"
            ) from None
        return examples if split == "train" else queries

    return Task(
        name=name,
        title=title,
        form=form,
        mode=mode,
        metric=metric,
        read=read,
        media="either",
        files="none: the items are made from seeds",
        split="test",
        paper_split="",
        max_new_tokens=16,
        needs_data=False,
        source="flamingo_reference/nano/MODEL_CARD.md",
    )


TASKS = {
    task.name: task
    for task in (
        _task("nano-captions", "Captions of nano's held-out items", "caption", "exact", captions),
        _task("nano-questions", "Questions about nano's held-out items", "question", "exact", questions),
        _task("nano-formats", "Formats that only the examples tell", "caption", "exact", formats),
        _task("nano-labels", "Labels that only the examples bind", "caption", "choice", labels, mode="closed"),
    )
}
