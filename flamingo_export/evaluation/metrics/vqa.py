"""VQA accuracy: the official rule (Antol et al. 2015, arXiv 1505.00468; the evaluation code of visualqa.org as OpenFlamingo 2.0.1 ships it).

An answer is as right as min(1, annotators who gave it / 3), averaged over leaving out each annotator in turn, after both sides are
normalised: punctuation, numbers as digits, articles, contractions. The rule's peculiarities are kept, since scores are compared with published
ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from flamingo_export.evaluation.metrics.base import Mean, Outcome
from flamingo_export.evaluation.task import Item

_AGREEMENT = 3
_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_STRIPPED = 32
"""The official code passes re.UNICODE, 32, where `re.sub` takes the number of replacements."""
_CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""


def _contractions() -> dict[str, str]:
    """Each contraction by what it is with one of its apostrophes left out."""
    found = {"somebody'd": "somebodyd"}  # the official table has this one the other way round
    for word in _CONTRACTED.split():
        for at, letter in enumerate(word):
            if letter == "'":
                found[word[:at] + word[at + 1 :]] = word
    return found


_CONTRACTIONS = _contractions()


def normalised(text: str) -> str:
    """An answer as the rule compares it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        outside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if outside or number else " ")
    result = _PERIOD.sub("", result, count=_PERIODS_STRIPPED)
    words = [_NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(text: str, references: Sequence[str]) -> float:
    """0 to 1. references: what each annotator said. 0 where there are none."""
    if not references:
        return 0.0
    candidate = normalised(text)
    agree = [normalised(reference) == candidate for reference in references]
    total = sum(agree)
    return sum(min(1.0, (total - one) / _AGREEMENT) for one in agree) / len(agree)


class VqaAccuracy:
    """The rule as a metric."""

    title, unit = "VQA accuracy", "%"

    def require(self) -> None:
        """Nothing is needed."""

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item, 0 to 100."""
        values = [accuracy(outcome.text, item.references) for item, outcome in zip(items, outcomes, strict=True)]
        return Mean(items=100.0 * np.asarray(values, np.float64))
