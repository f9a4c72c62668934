"""WUPS at threshold 0: likeness of two answers' words in WordNet (Malinowski and Fritz 2014, arXiv 1410.0210; NExT-QA's open-ended score).

Each word is compared with the other answer's words by Wu and Palmer's similarity of their first senses; the best ones are multiplied; the
lower of both directions counts. Words that WordNet does not know are passed over. Questions of NExT-QA that ask for a number or yes and no
(types DC and DB) want the answer itself. Words are lemmatised by WordNet's own morphology; NExT-QA's script uses a part-of-speech tagger
and a list of stop words besides, so single items may differ from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from flamingo_export.errors import EvaluationError, pip_install
from flamingo_export.evaluation.metrics.base import Mean, Outcome
from flamingo_export.evaluation.task import Item

TO_THE_LETTER = ("DC", "DB")
_WORD = re.compile(r"[a-z0-9']+")
Similarity = Callable[[str, str], float]


class Wups:
    """WUPS as a metric."""

    title, unit = "WUPS", "%"

    def require(self) -> None:
        """Raises EvaluationError where nltk or WordNet is missing."""
        _wordnet()

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item, 0 to 100: its best reference."""
        wordnet = _wordnet()

        @cache
        def similarity(one: str, other: str) -> float:
            return word_similarity(wordnet, one, other)

        values = []
        for item, outcome in zip(items, outcomes, strict=True):
            candidate = _words(wordnet, outcome.text)
            found = [_words(wordnet, reference) for reference in item.references]
            if item.kind in TO_THE_LETTER:
                values.append(float(candidate in found))
            else:
                values.append(max((wups(candidate, reference, similarity) for reference in found), default=0.0))
        return Mean(items=100.0 * np.asarray(values, np.float64))


def wups(one: Sequence[str], other: Sequence[str], similarity: Similarity) -> float:
    """The lower of both directions, 0 to 1."""
    return min(_directed(one, other, similarity), _directed(other, one, similarity))


def word_similarity(wordnet: Any, one: str, other: str) -> float:
    """Wu and Palmer's similarity of the first senses; 1 for equal words, 0 where WordNet lacks one."""
    if one == other:
        return 1.0
    first, second = wordnet.synsets(one), wordnet.synsets(other)
    if not first or not second:
        return 0.0
    return float(first[0].wup_similarity(second[0]) or 0.0)


def _directed(one: Sequence[str], other: Sequence[str], similarity: Similarity) -> float:
    best = [max((similarity(word, found) for found in other), default=0.0) for word in one]
    known = [value for value in best if value > 0]
    return float(np.prod(known)) if known else 0.0


def _words(wordnet: Any, text: str) -> list[str]:
    return [wordnet.morphy(word) or word for word in _WORD.findall(text.lower())]


def _wordnet() -> Any:
    """nltk's reader of WordNet, once its files are found. Raises EvaluationError."""
    try:
        from nltk.corpus import wordnet
    except ImportError as error:
        raise EvaluationError(f"WUPS needs nltk ({error}). Install it: {pip_install('eval')}") from None
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise EvaluationError(
            "WUPS needs WordNet 3.0, which nltk does not find. Get it: python -m nltk.downloader wordnet, or Debian's wordnet-base with a "
            "folder named by NLTK_DATA that holds it as corpora/wordnet (docs/evaluation.md)."
        ) from None
    return wordnet
