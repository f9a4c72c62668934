"""Metrics of closed tasks, on the log-likelihoods of candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from flamingo_export.errors import EvaluationError, pip_install
from flamingo_export.evaluation.metrics.base import Indices, Mean, Outcome
from flamingo_export.evaluation.task import Item
from flamingo_reference.arrays import Floats

RECALLS = (1, 5, 10)


def rank_of(scores: Sequence[float], right: int) -> int:
    """The place of candidate `right`, 1 for the best; a tie counts against it only if the other stands before it."""
    values = np.asarray(scores, np.float64)
    return 1 + int((values > values[right]).sum() + (values[:right] == values[right]).sum())


class Choice:
    """100 where the likeliest candidate is right; with more than ten candidates R@5 and R@10 beside it."""

    title, unit = "top-1", "%"

    def require(self) -> None:
        """Nothing is needed."""

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item, 0 or 100."""
        ranks = np.array(
            [
                min((rank_of(outcome.logprobs, at) for at, value in enumerate(item.relevance) if value >= 1), default=1 << 30)
                for item, outcome in zip(items, outcomes, strict=True)
            ]
        )
        many = all(len(item.candidates) > max(RECALLS) for item in items)
        details = (
            {f"R@{count}": np.float64(100) * (ranks <= count).astype(np.float64) for count in RECALLS[1:]}
            if many and len(items)
            else {}
        )
        return Mean(items=100.0 * (ranks == 1).astype(np.float64), details=details)


class Ndcg:
    """NDCG of VisDial: relevance over log2(1 + place), down to as many places as there are relevant candidates."""

    title, unit = "NDCG", "%"

    def require(self) -> None:
        """Nothing is needed."""

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Mean:
        """Of each item, 0 to 100."""
        values = [
            ndcg(np.asarray(item.relevance), np.asarray(outcome.logprobs))
            for item, outcome in zip(items, outcomes, strict=True)
        ]
        return Mean(items=100.0 * np.asarray(values, np.float64))


def ndcg(relevance: Floats, scores: Floats) -> float:
    """0 to 1; relevance and scores [C] of the candidates. Ties keep the candidates' order."""
    count = int((relevance != 0).sum())
    discounts = np.log2(np.arange(count) + 2)
    gained = relevance[np.argsort(-scores, kind="stable")[:count]] / discounts
    best = -np.sort(-relevance)[:count] / discounts
    return float(gained.sum() / best.sum()) if count else 0.0


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Labels and scores whose area under the curve is the metric."""

    labels: Indices
    scores: Floats
    items: None = None
    details: Mapping[str, Floats] = field(default_factory=dict)

    def value(self, chosen: Indices) -> float | None:
        from sklearn.metrics import roc_auc_score

        labels = self.labels[chosen]
        return 100.0 * float(roc_auc_score(labels, self.scores[chosen])) if len(set(labels.tolist())) == 2 else None


class RocAuc:
    """Area under the ROC curve of log p(second candidate) - log p(first), for a binary task."""

    title, unit = "ROC AUC", "%"

    def require(self) -> None:
        """Raises EvaluationError where scikit-learn is missing."""
        _need_sklearn("ROC AUC")

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> _Curve:
        """All items together."""
        scores = [outcome.logprobs[1] - outcome.logprobs[0] for outcome in outcomes]
        return _Curve(labels=np.array([item.label or 0 for item in items], np.int64), scores=np.asarray(scores, np.float64))


@dataclass(frozen=True, kw_only=True)
class _Actions:
    """Of each action: its clips (positions among the items), whether positive, hard negative or negative, and their scores."""

    places: Sequence[Indices]
    kinds: Sequence[Indices]
    scores: Sequence[Floats]
    segments: Sequence[str]
    items: None = None
    details: Mapping[str, Floats] = field(default_factory=dict)

    def value(self, chosen: Indices) -> float | None:
        from sklearn.metrics import average_precision_score

        times = np.bincount(chosen, minlength=len(self.segments))
        found = []
        for places, kinds, scores in zip(self.places, self.kinds, self.scores, strict=True):
            repeated = np.repeat(np.arange(len(places)), times[places])
            drawn_kinds, drawn_scores = kinds[repeated], scores[repeated]
            if not (drawn_kinds == _POSITIVE).any():
                continue
            weights = np.empty(len(repeated))
            for kind in (_POSITIVE, _HARD, _NEGATIVE):
                mine = np.flatnonzero(drawn_kinds == kind)
                videos = [self.segments[place] for place in places[repeated[mine]]]
                counts: defaultdict[str, int] = defaultdict(int)
                for video in videos:
                    counts[video] += 1
                weights[mine] = [1.0 / counts[video] for video in videos]
            found.append(float(average_precision_score(drawn_kinds == _POSITIVE, drawn_scores, sample_weight=weights)))
        return 100.0 * float(np.mean(found)) if found else None


_NEGATIVE, _POSITIVE, _HARD = 0, 1, 2


class Mwap:
    """mWAP of RareAct (Miech et al. 2020, arXiv 2008.01018): mean over actions of average precision, where a video's clips share one weight.

    A clip annotated as positive of one action is a negative of the others, a hard one where verb or noun is shared.
    """

    title, unit = "mWAP", "%"

    def require(self) -> None:
        """Raises EvaluationError where scikit-learn is missing."""
        _need_sklearn("mWAP")

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> _Actions:
        """All clips together. items: `action` is verb and noun, `kind` RareAct's annotation 0 to 4, `segment` the video;
        candidates are "verb noun"."""
        actions = list(dict.fromkeys(item.action for item in items if item.action is not None))
        found: dict[tuple[str, str], list[tuple[int, int, float]]] = {action: [] for action in actions}
        for place, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
            scores = dict(zip(item.candidates, outcome.logprobs, strict=True))
            own = item.action
            if own is None:
                continue
            if item.kind != "1":
                found[own].append((place, _NEGATIVE if item.kind == "0" else _HARD, scores[" ".join(own)]))
                continue
            found[own].append((place, _POSITIVE, scores[" ".join(own)]))
            for other in actions:
                if other != own and " ".join(other) in scores:
                    shared = own[0] == other[0] or own[1] == other[1]
                    found[other].append((place, _HARD if shared else _NEGATIVE, scores[" ".join(other)]))
        rows = [found[action] for action in actions]
        return _Actions(
            places=[np.array([place for place, _, _ in row], np.int64) for row in rows],
            kinds=[np.array([kind for _, kind, _ in row], np.int64) for row in rows],
            scores=[np.array([score for *_, score in row], np.float64) for row in rows],
            segments=[item.segment for item in items],
        )


def _need_sklearn(what: str) -> None:
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"{what} needs scikit-learn ({error}). Install it: {pip_install('eval')}") from None
