"""A user's own task in TOML and JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.tasks import task_of
from flamingo_export.runtime.videos import Video


def write(folder: Path, toml: str, *lines: dict[str, Any]) -> tuple[Path, Path]:
    (folder / "mine.toml").write_text(toml, encoding="utf-8")
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return folder / "mine.toml", folder / "mine.jsonl"


def test_open(tmp_path: Path) -> None:
    toml, data = write(
        tmp_path,
        'metric = "vqa_accuracy"\nmax_new_tokens = 5\nsupport = "mine.jsonl"\n[prompt]\nexample = "{image}Q: {question} A: {answer}{end}"\n'
        'query = "{image}Q: {question} A:"\n',
        {"id": 1, "image": "a.png", "question": "Was ist das?", "answers": ["Mutter", "Nuß", "Nuß"]},
        {"id": "2", "video": "b.mp4", "clip": [1, 2], "question": "?", "answer": "yes"},
        {"id": 3, "text_only": True, "question": "?", "answer": "yes"},
    )
    task = task_of(toml)
    assert (task.name, task.mode, task.max_new_tokens, task.support) == ("mine", "open", 5, "support")
    items = task.read(data, "data").items
    assert [item.id for item in items] == ["1", "2", "3"]
    assert items[0].answer == "Nuß"
    assert items[1].medium == Video(source=tmp_path / "b.mp4", clip=(1.0, 2.0))
    assert items[2].medium is None
    assert task.read(Path("elsewhere"), "support").items == items


def test_closed(tmp_path: Path) -> None:
    toml, data = write(
        tmp_path,
        'metric = "ndcg"\nform = "caption"\ncandidates = ["good", "bad"]\n',
        {"id": 1, "image": "a.png", "answer": "bad"},
        {"id": 2, "image": "a.png", "candidates": ["x", "y", "z"], "relevance": [0.5, 0, 1]},
    )
    items = task_of(toml).read(data, "data").items
    assert items[0].relevance == (0, 1)
    assert items[0].label == 1
    assert items[1].answer == "z"
    toml.write_text(toml.read_text().replace("ndcg", "roc_auc"))
    with pytest.raises(EvaluationError, match="line 2: ROC AUC takes two candidates, the second one the positive; there are 3"):
        task_of(toml).read(data, "data")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('metric = "bleu"', "metric is 'bleu', expected one of exact"),
        ('metric = "exact"\ncolour = 1', "unknown field `colour`"),
        ("metric = ", "docs/evaluation.md shows such a file"),
        ('metric = "exact"\ncandidates = ["a", "b"]', "candidates are for closed tasks"),
        ('metric = "exact"\nmax_new_tokens = 0', "max_new_tokens is 0"),
        (
            'metric = "exact"\n[prompt]\nexample = "{image}{question}"\nquery = "{image}{question}"',
            "prompt.example lacks {answer}",
        ),
    ],
)
def test_tasks_that_are_refused(tmp_path: Path, toml: str, said: str) -> None:
    path, _ = write(tmp_path, toml)
    with pytest.raises(EvaluationError) as error:
        task_of(path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"id": 1, "question": "?", "answer": "a"}, "expected one of image, video and text_only"),
        ({"id": 1, "video": "", "question": "?", "answer": "a"}, "the path of the image or video is empty"),
        ({"id": 1, "image": "a.png", "answer": "a"}, "a question is missing"),
        ({"id": 1, "image": "a.png", "question": " ", "answer": "a"}, "the question is empty"),
        ({"id": 1, "image": "a.png", "question": "?", "answers": ["", " "]}, "no answer that is not empty"),
        ({"id": 1, "image": "a.png", "clip": [1, 2], "question": "?", "answer": "a"}, "of a video"),
        ({"id": 1, "image": "a.png", "question": "?", "answr": "a"}, "unknown field `answr`"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    good = {"id": 0, "image": "a.png", "question": "?", "answer": "a"}
    toml, data = write(tmp_path, 'metric = "exact"', good, line)
    with pytest.raises(EvaluationError) as error:
        task_of(toml).read(data, "data")
    assert said in str(error.value)
    assert "line 2" in str(error.value)


def test_a_key_that_a_line_has_twice(tmp_path: Path) -> None:
    toml, data = write(tmp_path, 'metric = "exact"')
    data.write_text('{"id": 0, "image": "a.png", "question": "?", "answer": "a", "answer": "b"}')
    with pytest.raises(EvaluationError, match="line 1: answer is given twice; give each key once"):
        task_of(toml).read(data, "data")


def test_duplicate_ids(tmp_path: Path) -> None:
    line = {"id": 0, "image": "a.png", "question": "?", "answer": "a"}
    toml, data = write(tmp_path, 'metric = "exact"', line, line)
    with pytest.raises(EvaluationError, match=r"line 2: id 0 occurs a second time \(first on line 1\)"):
        task_of(toml).read(data, "data")
