"""Metrics of closed tasks beside scikit-learn's and plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flamingo_export.evaluation.metrics.base import Outcome
from flamingo_export.evaluation.metrics.ranking import Choice, Mwap, Ndcg, RocAuc, ndcg, rank_of
from flamingo_export.evaluation.task import Item


def closed(relevance: tuple[float, ...], label: int | None = None) -> Item:
    return Item(id="1", medium=None, candidates=tuple("abcdefghijklmnop"[: len(relevance)]), relevance=relevance, label=label)


def test_choice_and_recall() -> None:
    relevance = tuple(float(at == 3) for at in range(12))
    best_last = tuple(float(at) for at in range(12))
    scored = Choice().score(
        [closed(relevance)] * 2,
        [Outcome(text="", logprobs=best_last), Outcome(text="", logprobs=tuple(-value for value in best_last))],
    )
    assert scored.items.tolist() == [0, 0]
    assert scored.details["R@5"].tolist() == [0, 100]
    assert scored.details["R@10"].tolist() == [100, 100]
    assert [rank_of(best_last, 3), rank_of((1.0, 2.0, 2.0), 2), rank_of((1.0, 2.0, 2.0), 1)] == [9, 2, 1]


def test_a_candidate_that_is_not_a_number_is_never_right() -> None:
    scored = Choice().score([closed((1, 0))], [Outcome(text="", logprobs=(-math.inf, -5.0))])
    assert scored.items.tolist() == [0]


def test_ndcg_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    for _ in range(50):
        relevance = rng.choice([0, 0, 0, 0.2, 0.5, 1], 100)
        scores = rng.normal(size=100)
        count = int((relevance != 0).sum())
        assert ndcg(relevance, scores) == pytest.approx(metrics.ndcg_score(relevance[None], scores[None], k=count))
    assert ndcg(np.zeros(5), np.arange(5.0)) == 0
    found = Ndcg().score([closed((0, 1, 0.5))], [Outcome(text="", logprobs=(0.0, 2.0, 1.0))])
    assert found.items.tolist() == [100]


def test_roc_auc_is_the_share_of_pairs_in_order() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(2)
    labels, scores = rng.integers(0, 2, 40), np.round(rng.normal(size=(40, 2)), 1)
    items = [closed((float(not label), float(label)), label=int(label)) for label in labels]
    scored = RocAuc().score(items, [Outcome(text="", logprobs=tuple(pair)) for pair in scores])
    margins = scores[:, 1] - scores[:, 0]
    pairs = [1.0 if one > two else 0.5 if one == two else 0.0 for one in margins[labels == 1] for two in margins[labels == 0]]
    assert scored.value(np.arange(40)) == pytest.approx(100 * float(np.mean(pairs)))
    assert scored.value(np.flatnonzero(labels == 1)) is None


def weighted_average_precision(rows: list[tuple[float, bool, float]]) -> float:
    """By its definition: precision at each threshold, weighted by the recall gained there. rows: score, positive, weight."""
    total = sum(weight for _, positive, weight in rows if positive)
    found, recall = 0.0, 0.0
    for threshold in sorted({score for score, *_ in rows}, reverse=True):
        taken = [row for row in rows if row[0] >= threshold]
        right = sum(weight for _, positive, weight in taken if positive)
        found += (right / total - recall) * right / sum(weight for *_, weight in taken)
        recall = right / total
    return found


def test_mwap_by_its_definition() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(3)
    actions = [("cut", "laptop"), ("cut", "phone"), ("blend", "phone")]
    names = tuple(" ".join(action) for action in actions)
    items, outcomes, table = [], [], []
    for number in range(60):
        action, annotation = actions[rng.integers(3)], str(rng.choice(["0", "1", "1", "2", "4"]))
        video = f"v{rng.integers(8)}"
        candidates = names if annotation == "1" else (" ".join(action),)
        scores = dict(zip(names, rng.normal(size=3).tolist(), strict=True))
        items.append(Item(id=str(number), medium=None, candidates=candidates, kind=annotation, segment=video, action=action))
        outcomes.append(Outcome(text="", logprobs=tuple(scores[name] for name in candidates)))
        table.append((action, annotation, video, scores))
    expected = []
    for action in actions:
        groups: dict[str, list[tuple[str, float]]] = {"positive": [], "hard": [], "negative": []}
        for own, annotation, video, scores in table:
            score = scores[" ".join(action)]
            if own == action:
                groups["positive" if annotation == "1" else "negative" if annotation == "0" else "hard"].append((video, score))
            elif annotation == "1":
                groups["hard" if own[0] == action[0] or own[1] == action[1] else "negative"].append((video, score))
        rows = [
            (score, name == "positive", 1 / sum(other == video for other, _ in members))
            for name, members in groups.items()
            for video, score in members
        ]
        expected.append(weighted_average_precision(rows))
    found = Mwap().score(items, outcomes)
    assert found.value(np.arange(60)) == pytest.approx(100 * float(np.mean(expected)))
    assert found.value(np.array([at for at, row in enumerate(table) if row[1] == "0"])) is None
