"""What `eval` and `index` print and refuse. The models are stand-ins, the indices made of a few vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
from made_models import Echo

from flamingo_export.cli import main
from flamingo_export.evaluation.index.store import IndexedItem, build_index
from flamingo_export.evaluation.protocol import Answer
from flamingo_export.evaluation.results import read_results
from flamingo_export.runtime.request import Request

Evaluated = Callable[..., str]


class Mixed(Echo):
    """Right about two of the four things."""

    def generate(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> list[Answer]:
        found = super().generate(requests, beams=beams, max_new_tokens=max_new_tokens)
        wrong = [str(request.prompt).rsplit("thing ", 1)[1][0] in "03" for request in requests]
        return [replace(each, text="dish") if bad else each for each, bad in zip(found, wrong, strict=True)]


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    return published.write("vqav2", tmp_path / "data")


@pytest.fixture
def evaluated(vqa: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluated:
    """`eval` of vqav2 by a stand-in; what it printed. `echo` is always right with examples, `worse` never."""

    def opened(stack: Any, path: Path, run: Any, *, batch_size: int) -> Echo:
        return {"echo": Echo(), "worse": Echo("worse", suffix="dish"), "mixed": Mixed("mixed")}[str(path)]

    monkeypatch.setattr("flamingo_export.cli.eval._model", opened)

    def call(model: str, *arguments: object) -> str:
        line = ["eval", model, "--task", "vqav2", "--data", vqa, *arguments]
        assert main([str(each) for each in line]) == 0
        return capsys.readouterr().out

    return call


def rows_of(printed: str) -> list[list[str]]:
    """Cells of a printed table: two blanks are between them."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in printed.splitlines()]


def test_a_run_is_printed_beside_another_and_the_paper(evaluated: Evaluated, tmp_path: Path) -> None:
    rows = rows_of(evaluated("echo", "--against", "worse", "--shots", "0,2", "--seed", 3, "--out", tmp_path / "out"))
    title = next(row for row in rows if row and row[0].startswith("VQAv2"))
    assert title[0] == "VQAv2 (val): echo, none, seed 3"
    head = next(row for row in rows if row[:2] == ["shots", "kind"])
    assert head[3:] == ["VQA accuracy", "95 % interval", "worse", "difference", "95 % interval", "changed"]
    assert ["2", "all", "4", "100.00", "100.00 to 100.00", "0.00", "+100.00", "+100.00 to +100.00", "4"] in rows
    assert ["4 shots, 3B / 9B / 80B", "53.2 / 56.3 / 63.1"] in rows
    assert ["80B, 32 shots", "67.6"] in rows
    assert ["80B fine-tuned", "82.0 (test-dev)"] in rows
    # The same, of a run that is on the disk.
    again = evaluated("echo", "--against", tmp_path / "out", "--shots", "0,2", "--seed", 3, "--json")
    assert json.loads(again)["against"]["name"] == "echo"


def test_what_was_left_out_is_counted(evaluated: Evaluated, vqa: Path) -> None:
    (vqa / "val2014" / "COCO_val2014_000000000101.jpg").unlink()
    rows = rows_of(evaluated("echo", "--shots", 2, "--skip-missing"))
    assert ["left out: 1 queries whose media are gone"] in rows
    assert next(row for row in rows if row[:2] == ["2", "all"])[2] == "3"


def test_runs_are_printed_side_by_side(evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    evaluated("echo", "--shots", "0,2", "--out", a)
    evaluated("mixed", "--shots", 2, "--out", b)
    assert main(["eval", "--compare", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    none, two = (row for row in found["rows"] if row["group"] == "all")
    assert (none["shared_items"], none["differences"]) == ([0, 0], [None, None])
    apart, low, high = two["differences"][1]
    assert (two["shared_items"], apart) == ([0, 4], -50)
    assert -100 <= low < -50 < high <= 0
    other = two["cells"][1]
    assert main(["eval", "--compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    value = read_results(a).cell(0)
    assert ["0", "all", f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]", "–", "–"] in rows
    theirs = f"50.00 [{other['low']:.2f}, {other['high']:.2f}]"
    assert ["2", "all", "100.00 [100.00, 100.00]", theirs, f"-50.00 [{low:+.2f}, {high:+.2f}] of 4"] in rows
    plain = "".join(printed.split())
    assert "from the first, same items".replace(" ", "") in plain
    assert "(echo)" in plain
    assert "(mixed)" in plain


def test_tasks_are_listed_with_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert ["task", "metric", "answers", "split", "files"] in rows
    assert next(row for row in rows if row and row[0] == "star")[1:4] == ["top-1", "closed", "val"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["eval", "b", "--task", "coco", "--model", "x"], "goes with a server: add --server"),
        (["eval", "b", "--task", "coco", "--api-key-file", "k"], "goes with a server: add --server"),
        (["eval", "b", "--task", "coco", "--server", "http://127.0.0.1:1/v1"], "--server has the model, so b is one too many"),
        (["index", "b", "--data", "d"], "an index is made of a bundle's features: give the bundle, --data and --out"),
        (["index", "--dedup", "a"], "two indices are compared, 1 were given: --dedup a/ --dedup b/"),
    ],
)
def test_usage(line: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_pictures_that_are_too_alike_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = {"train": np.eye(3, dtype=np.float32), "test": np.array([[0, 5, 0], [1, 1, 0]], np.float32)}
    for name, values in vectors.items():
        items = [IndexedItem(id=f"{name}-{place}") for place in range(len(values))]
        build_index(tmp_path / name, items, partial(np.take, values, axis=0), bundle="b" * 64, features="test")
    line = ["index", "--dedup", str(tmp_path / "train"), "--dedup", str(tmp_path / "test")]
    assert main(line) == 0
    rows = rows_of(capsys.readouterr().out)
    assert ["train-1", "test-0", "1.0000"] in rows
    assert ["1 pairs from 0.98 on"] in rows
    assert main([*line, "--above", "0.7"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert ["train-0", "test-1", "0.7071"] in rows
    assert ["3 pairs from 0.7 on"] in rows
