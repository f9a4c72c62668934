"""The index on the disk: plain files, exact search, resumed after an interruption, refused where it belongs to something else."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.index import store
from flamingo_export.evaluation.index.exact_search import nearest, pairs_alike
from flamingo_export.evaluation.index.store import Index, IndexedItem, build_index

WIDTH = 6


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_ROWS", 16)


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


class Encoder:
    """Gives rows of a table, and dies after some of them."""

    def __init__(self, rows: np.ndarray, dies_after: int | None = None) -> None:
        self.rows, self.dies_after, self.encoded = rows, dies_after, 0

    def __call__(self, places: Sequence[int]) -> Iterator[Any]:
        for place in places:
            if self.encoded == self.dies_after:
                raise KeyboardInterrupt
            self.encoded += 1
            yield self.rows[place]


def build(folder: Path, rows: np.ndarray, encoder: Encoder | None = None, **given: Any) -> Index:
    items = [IndexedItem(id=str(place), image=f"../{place}.png", answer=f"a{place}") for place in range(len(rows))]
    return build_index(folder, items, encoder or Encoder(rows), **{"bundle": "b" * 64, "features": "test", **given})


@pytest.mark.parametrize("count", [1, 7, 100])
def test_search_is_brute_force(tmp_path: Path, count: int) -> None:
    rows, queries = vectors(100), vectors(9, seed=1)
    index = build(tmp_path / "i", rows)
    found, cosines = nearest(index, queries, count)
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    exact = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    assert found.tolist() == np.argsort(-exact, axis=1, kind="stable")[:, :count].tolist()
    np.testing.assert_allclose(cosines, -np.sort(-exact, axis=1)[:, :count], atol=1e-6)
    among = np.zeros(100, bool)
    among[[5, 50, 99]] = True
    allowed = [5, 50, 99]
    wanted = [[allowed[place] for place in np.argsort(-row[allowed], kind="stable")[:count]] for row in exact]
    assert nearest(index, queries, count, among)[0].tolist() == wanted


def test_memory_is_that_of_a_shard_and_not_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million rows of the paper's 1376 numbers are 5.5 GB: `benchmarks/evaluation_cpu.py rows` measured 0.34 GiB."""
    monkeypatch.setattr(store, "SHARD_ROWS", 64)
    rows = np.random.default_rng(0).normal(size=(64 * 40, 512)).astype(np.float32)
    index = build(tmp_path / "i", rows)
    shard = 64 * 512 * 4
    tracemalloc.start()
    try:
        nearest(index, rows[:2], 5)
        assert tracemalloc.get_traced_memory()[1] < 5 * shard
        tracemalloc.reset_peak()
        list(pairs_alike(index, index, 2.0))
        assert tracemalloc.get_traced_memory()[1] < 8 * shard
    finally:
        tracemalloc.stop()


def test_equal_rows_come_in_their_order(tmp_path: Path) -> None:
    rows = np.repeat(vectors(2), 20, axis=0)
    found, _ = nearest(build(tmp_path / "i", rows), rows[:1], 20)
    assert found[0].tolist() == list(range(20))


def test_plain_files(tmp_path: Path) -> None:
    rows = vectors(20)
    build(tmp_path / "i", rows)
    names = sorted(path.name for path in (tmp_path / "i").iterdir())
    assert names == ["features-00000.safetensors", "features-00001.safetensors", "index.json", "items.jsonl"]
    values = load_file(tmp_path / "i" / "features-00001.safetensors")["features"]
    np.testing.assert_allclose(values, rows[16:] / np.linalg.norm(rows[16:], axis=1, keepdims=True), rtol=1e-6)
    assert Index(tmp_path / "i").items()[3] == IndexedItem(id="3", image="../3.png", answer="a3")


@pytest.mark.parametrize("dies_after", [0, 5, 16, 40])
def test_resumed(tmp_path: Path, dies_after: int) -> None:
    rows = vectors(50)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "i", rows, Encoder(rows, dies_after))
    if (tmp_path / "i" / "index.json").exists():
        with pytest.raises(EvaluationError, match="is not finished"):
            Index(tmp_path / "i")
    encoder = Encoder(rows)
    index = build(tmp_path / "i", rows, encoder)
    assert encoder.encoded == 50 - 16 * (dies_after // 16)
    whole = build(tmp_path / "j", rows)
    for (_, one), (_, other) in zip(index.blocks(), whole.blocks(), strict=True):
        assert np.array_equal(one, other)
    assert build(tmp_path / "i", rows, Encoder(rows, 0)).record == index.record  # finished: nothing is encoded


def test_an_index_of_something_else(tmp_path: Path) -> None:
    rows = vectors(5)
    index = build(tmp_path / "i", rows)
    with pytest.raises(EvaluationError, match="bundle differ"):
        build(tmp_path / "i", rows, bundle="c" * 64)
    with pytest.raises(EvaluationError, match="items, count differ"):
        build(tmp_path / "i", vectors(6))
    assert build(tmp_path / "i", vectors(6), overwrite=True).record.count == 6
    with pytest.raises(EvaluationError, match=r"made by another bundle than my\.bundle"):
        index.check_bundle("c" * 64, "my.bundle")
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "a.txt").write_text("")
    with pytest.raises(EvaluationError, match="it is not an index"):
        build(tmp_path / "j", rows)
    with pytest.raises(EvaluationError, match="Make one: flamingo-export index"):
        Index(tmp_path / "nothing")


def test_damage_is_named(tmp_path: Path) -> None:
    rows = vectors(20)
    index = build(tmp_path / "i", rows)
    shard = tmp_path / "i" / "features-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(EvaluationError, match="cannot be read as features"):
        nearest(index, rows, 1)
    shard.unlink()
    with pytest.raises(EvaluationError, match="cannot be read as features"):
        nearest(index, rows, 1)
    shard.write_bytes(whole)
    record = msgspec.structs.replace(index.record, shards=("../outside.safetensors",))
    (tmp_path / "i" / "index.json").write_bytes(msgspec.json.encode(record))
    with pytest.raises(EvaluationError, match="not a file of the index"):
        nearest(Index(tmp_path / "i"), rows, 1)
    with pytest.raises(EvaluationError, match="6 wide"):
        nearest(index, vectors(1)[:, :3], 1)


def test_pairs_that_are_too_alike(tmp_path: Path) -> None:
    training, testing = vectors(40), vectors(30, seed=1)
    testing[7] = 3 * training[33]
    found = list(pairs_alike(build(tmp_path / "a", training), build(tmp_path / "b", testing), 0.9999))
    assert [(row, column) for row, column, _ in found] == [(33, 7)]
    assert found[0][2] == pytest.approx(1, abs=1e-6)
    with pytest.raises(EvaluationError, match="made by different bundles"):
        list(pairs_alike(Index(tmp_path / "a"), build(tmp_path / "c", testing, bundle="c" * 64), 0.9))
