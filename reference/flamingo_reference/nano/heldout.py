"""Which held-out items are measured, and which examples come before them: the same ones at every call. No torch import."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flamingo_reference.nano import pictures
from flamingo_reference.nano.pictures import Item
from flamingo_reference.nano.pool import Pool

SHOTS = (0, 1, 2, 4, 8, 16, 32)
COUNTS = {"scene": 500, "digit": 449, "video": 150}
FEW_SHOT = 25
"""Queries for each format and number of shots."""


def heldout(kind: str, count: int) -> list[Item]:
    """Held-out items: scenes (half of them with two or more objects), digits, videos; the same ones at every call."""
    if kind == "digit":
        return [pictures.digit(index, split="test") for index in range(count)]
    if kind == "video":
        return [pictures.video(index, split="test") for index in range(count)]
    several, single, items = 0, 0, []
    for seed in range(100 * count):
        item = pictures.scene(seed, split="test")
        if item.num_objects > 1 and several < count // 2:
            several += 1
        elif item.num_objects == 1 and single < count - count // 2:
            single += 1
        else:
            continue
        items.append(item)
        if len(items) == count:
            break
    return items


def some_questions(item: Item, seed: int) -> list[tuple[str, str]]:
    """Up to two of an item's questions."""
    order = np.random.default_rng([7, seed]).permutation(len(item.questions))[:2]
    return [item.questions[int(index)] for index in order]


def texts_pool() -> Pool:
    """Training items whose texts come before a query, their media left out."""
    return Pool(scenes=200, digits=100, videos=100, seed=3)


def support_pool() -> Pool:
    """Training items that are shown in few-shot prompts."""
    return Pool(scenes=300, digits=150, videos=0, seed=3)


def few_shot_queries(count: int) -> list[Item]:
    """Held-out items among which those are that can be put in each format."""
    return [*heldout("scene", max(100, 10 * count)), *heldout("digit", max(20, count))]


def that_fit(queries: Sequence[Item], kind: str, style: str, count: int) -> list[int]:
    """Positions of the first `count` queries of a kind that can be put in a style."""
    return [index for index, item in enumerate(queries) if item.kind == kind and style in item.formats][:count]
