"""Which examples come before a query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_models import Seeing

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.index.similarity import IndexedSimilarity, index_of
from flamingo_export.evaluation.selection import Selector
from flamingo_export.evaluation.task import Item
from flamingo_export.progress import SILENT


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)


def items(count: int, first: int = 0, **fields: Any) -> list[Item]:
    return [
        Item(id=str(first + at), medium=picture(first + at), references=("x",), answer=f"answer {at}", **fields)
        for at in range(count)
    ]


def test_random_examples_follow_from_seed_and_id_alone() -> None:
    examples, queries = items(50), items(20, first=100)
    one = Selector(examples, "random", 0)
    again = Selector(examples, "random", 0)
    chosen = [one.choose(query, 8) for query in queries]
    assert [again.choose(query, 8) for query in reversed(queries)] == chosen[::-1]
    assert len({tuple(each) for each in chosen}) > 10
    assert all(len(set(each)) == 8 for each in chosen)
    assert [one.choose(query, 4) for query in queries] == [each[:4] for each in chosen]
    assert [Selector(examples, "random", 1).choose(query, 8) for query in queries] != chosen


def test_shared_examples_and_the_texts_of_zero_shots_are_the_same_for_all() -> None:
    examples, queries = items(50), items(20, first=100)
    shared = Selector(examples, "shared", 0)
    assert len({tuple(shared.choose(query, 8)) for query in queries}) == 1
    assert {tuple(Selector(examples, "random", 0).choose(query, 0)) for query in queries} == {
        tuple(shared.choose(queries[0], 2))
    }


def test_an_example_that_shows_the_querys_own_picture_is_never_taken() -> None:
    examples = items(4)
    twin = Item(id="q", medium=picture(2), references=("x",))
    for seed in range(20):
        assert 2 not in Selector(examples, "random", seed).choose(twin, 3)
        assert 2 not in Selector(examples, "shared", seed).choose(twin, 3)
    with pytest.raises(EvaluationError, match="4 examples are wanted for item q, and without its own medium there are 3"):
        Selector(examples, "random", 0).choose(twin, 4)


def test_only_examples_of_the_pool_that_have_an_answer(tmp_path: object) -> None:
    examples = [*items(5, pool="a"), *items(5, first=5, pool="b"), Item(id="mute", medium=None, pool="a")]
    selector = Selector(examples, "random", 0)
    (query,) = items(1, first=100, pool="a")
    assert sorted(selector.choose(query, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(EvaluationError, match="6 examples are wanted and there are 5 of kind 'a'"):
        selector.check([query], 6)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_rices_is_brute_force(tmp_path, count: int) -> None:
    """The most similar last, the query's own picture left out whatever it is called."""
    model = Seeing()
    examples, queries = items(300), [*items(10, first=500), Item(id="own", medium=picture(7), references=("x",))]
    similarity = IndexedSimilarity(model, index_of(model, examples, tmp_path / "index", progress=SILENT))
    selector = Selector(examples, "rices", 0, similarity)
    selector.prepare(queries[:6])
    vectors = model.features([item.medium for item in examples if item.medium is not None]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for query in queries:
        assert query.medium is not None
        asked = model.features([query.medium])[0].astype(np.float64)
        cosines = vectors @ (asked / np.linalg.norm(asked))
        if query.id == "own":
            cosines[7] = -2
        wanted = np.argsort(-cosines, kind="stable")[:count][::-1].tolist()
        assert selector.choose(query, count) == wanted


def test_rices_keeps_to_the_pool(tmp_path) -> None:
    examples = [*items(200, pool="a"), *items(200, first=200, pool="b")]
    similarity = IndexedSimilarity(Seeing(), index_of(Seeing(), examples, tmp_path / "index", progress=SILENT))
    selector = Selector(examples, "rices", 0, similarity)
    (query,) = items(1, first=900, pool="b")
    assert min(selector.choose(query, 200)) == 200
    with pytest.raises(EvaluationError, match="no image or video"):
        selector.choose(Item(id="t", medium=None, pool="b", references=("x",)), 2)


def test_listed_examples() -> None:
    examples = items(5)
    query = Item(id="q", medium=picture(50), references=("x",), listed={2: ("3", "1")})
    selector = Selector(examples, "listed", 0)
    assert selector.choose(query, 2) == [3, 1]
    with pytest.raises(EvaluationError, match=r"names no examples for 4 shots \(it does for 2\)"):
        selector.choose(query, 4)
    with pytest.raises(EvaluationError, match="names examples that there are not: 9"):
        selector.check([Item(id="q", medium=None, references=("x",), listed={1: ("9",)})], 1)


def test_orders_of_an_ensemble() -> None:
    selector = Selector(items(9), "random", 0)
    (query,) = items(1, first=100)
    orders = selector.orders(query, 8, 6)
    assert orders[0] == list(range(8))
    assert len({tuple(order) for order in orders}) == 6
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders == selector.orders(query, 8, 6)
    assert selector.orders(query, 2, 6) == [[0, 1], [1, 0]]


def test_rices_without_features() -> None:
    with pytest.raises(EvaluationError, match="this model gives none"):
        Selector(items(3), "rices", 0)
