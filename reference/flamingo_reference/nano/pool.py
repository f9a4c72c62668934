"""A fixed pool of training items, from which documents are drawn by kind and format."""

from __future__ import annotations

import numpy as np

from flamingo_reference.nano import pages, pictures
from flamingo_reference.nano.pictures import Item, Split

KINDS = ("scene", "digit", "video")


class Pool:
    """Items and, for each kind and format, which of them can be put that way."""

    def __init__(self, *, scenes: int, digits: int, videos: int, split: Split = "train", seed: int = 0) -> None:
        offset = seed * 10_000_000
        self.items: list[Item] = [pictures.scene(offset + index, split=split) for index in range(scenes)]
        self.items += [pictures.digit(offset + index, split=split) for index in range(digits)]
        self.items += [pictures.video(offset + index, split=split) for index in range(videos)]
        self._by_format: dict[tuple[str, str | None], list[int]] = {}
        for index, item in enumerate(self.items):
            for style in (None, *item.formats):
                self._by_format.setdefault((item.kind, style), []).append(index)

    def drawer(self, kind: str) -> pages.Draw:
        """Draws items of one kind."""

        def draw(rng: np.random.Generator, style: str | None) -> int:
            choices = self._by_format[kind, style]
            return choices[int(rng.integers(len(choices)))]

        return draw

    def styles(self, kind: str) -> list[str]:
        """Formats that some item of the kind has, but for the plain caption."""
        return sorted(style for held, style in self._by_format if held == kind and style not in (None, "caption"))


def random_style(rng: np.random.Generator, pool: Pool, kind: str) -> str:
    """question 0.4, caption 0.35, another format 0.25."""
    draw = rng.random()
    if draw < 0.4:
        return "question"
    if draw < 0.75:
        return "caption"
    return str(rng.choice(pool.styles(kind)))
