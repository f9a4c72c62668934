"""Texts that are equal to a reference."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from flamingo_export.evaluation.metrics.base import Mean, Outcome
from flamingo_export.evaluation.task import Item

_IVQA_AGREEMENT = 2
"""An answer that two of the five annotators gave is right."""


def composed(text: str) -> str:
    """Without outer blanks, letters with accents in one form: Unicode has two, which look alike (NFC)."""
    return unicodedata.normalize("NFC", text).strip()


def plain(text: str) -> str:
    """`composed`, in lower case, blanks made single ones."""
    return " ".join(composed(text).lower().split())


class Exact:
    """100 where the text is a reference to the letter, outer blanks and the form of accents aside."""

    title, unit = "exact", "%"

    def require(self) -> None:
        """Nothing is needed."""

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item, 0 or 100."""
        right = [
            composed(outcome.text) in {composed(text) for text in item.references}
            for item, outcome in zip(items, outcomes, strict=True)
        ]
        return Mean(items=100.0 * np.asarray(right, np.float64))


class Top1:
    """100 where the text is a reference, case and blanks aside: the top-1 accuracy of MSVDQA and MSRVTTQA."""

    title, unit = "top-1", "%"

    def require(self) -> None:
        """Nothing is needed."""

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item, 0 or 100."""
        right = [
            plain(outcome.text) in {plain(text) for text in item.references}
            for item, outcome in zip(items, outcomes, strict=True)
        ]
        return Mean(items=100.0 * np.asarray(right, np.float64))


class IvqaAccuracy:
    """min(1, annotators who gave the answer / 2), of five (Yang et al. 2021, arXiv 2012.00451)."""

    title, unit = "iVQA accuracy", "%"

    def require(self) -> None:
        """Nothing is needed."""

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item, 0, 50 or 100."""
        agreeing = [
            sum(plain(outcome.text) == plain(text) for text in item.references)
            for item, outcome in zip(items, outcomes, strict=True)
        ]
        return Mean(items=100.0 * np.minimum(1.0, np.asarray(agreeing, np.float64) / _IVQA_AGREEMENT))
