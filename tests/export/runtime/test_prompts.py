"""The paper's prompt formats and the shots file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flamingo_export.errors import PromptError
from flamingo_export.runtime.media import Medium
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt, read_shots, without_media
from flamingo_export.runtime.request import Prepared
from flamingo_export.runtime.videos import Video


def test_formats_of_the_paper() -> None:
    shots = [
        Shot(question="What is it?", answer="a cat", medium="a.png"),
        Shot(question="How many?", answer=" two ", medium="b.png"),
    ]
    request = qa_prompt(shots, "Which colour?", "q.png")
    assert request.prompt == (
        "<BOS><image>Question: What is it? Answer: a cat<EOC><image>Question: How many? Answer: two<EOC>"
        "<image>Question: Which colour? Answer:"
    )
    assert list(request.media) == ["a.png", "b.png", "q.png"]
    captions = [Shot(answer="a cat on a mat", medium="a.png")]
    assert caption_prompt(captions, "q.png").prompt == "<BOS><image>Output: a cat on a mat<EOC><image>Output:"
    assert caption_prompt([], "q.png").prompt == "<BOS><image>Output:"


def test_zero_shot_has_two_examples_without_their_images() -> None:
    shots = without_media([Shot(answer="a cat", medium="a.png"), Shot(answer="a dog", medium="b.png")])
    request = caption_prompt(shots, "q.png")
    assert request.prompt == "<BOS>Output: a cat<EOC>Output: a dog<EOC><image>Output:"
    assert list(request.media) == ["q.png"]


def test_kinds_are_not_mixed() -> None:
    with pytest.raises(PromptError, match="shot 1 is a caption, but a question is asked"):
        qa_prompt([Shot(answer="a cat")], "What?", "q.png")
    with pytest.raises(PromptError, match="shot 2 asks a question, but a caption is wanted"):
        caption_prompt([Shot(answer="a cat"), Shot(question="What?", answer="a dog")], "q.png")


@pytest.mark.parametrize("tag", ["<image>", "<EOC>", "<BOS>"])
def test_tags_in_plain_text_are_refused(tag: str) -> None:
    with pytest.raises(PromptError, match=f"contains the tag {tag}"):
        qa_prompt([], f"What is {tag}?", "q.png")
    with pytest.raises(PromptError, match=f"contains the tag {tag}"):
        caption_prompt([Shot(answer=f"a {tag}")], "q.png")
    with pytest.raises(PromptError, match="is empty"):
        qa_prompt([], "  ", "q.png")


def write(folder: Path, *lines: object) -> Path:
    path = folder / "shots.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "frames").mkdir()
    return tmp_path


def test_shots_of_every_form(folder: Path) -> None:
    path = write(
        folder, {"image": "a.png", "caption": "a cat"}, "", {"video": "frames", "caption": "ein Kätzchen"}, {"caption": "c"}
    )
    assert read_shots(path) == [
        Shot(answer="a cat", medium=folder / "a.png"),
        Shot(answer="ein Kätzchen", medium=Video(source=folder / "frames")),
        Shot(answer="c"),
    ]
    path = write(folder, {"image": "a.png", "question": "What?", "answer": "a cat"})
    assert read_shots(str(path)) == [Shot(question="What?", answer="a cat", medium=folder / "a.png")]
    path.write_text("\ufeff" + path.read_text())  # as some editors save it
    assert len(read_shots(path)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON \(Expecting property name enclosed in double quotes at column 2\)"),
        ("[1]", "line 2: a JSON list, expected an object"),
        ({"imgae": "a.png", "caption": "c"}, "line 2: unknown keys imgae; known: image, video"),
        ('{"image": "a.png", "image": "a.png", "caption": "c"}', "line 2: image is given twice"),
        ({"image": "a.png"}, "line 2: neither a caption nor a question"),
        ({"image": "a.png", "caption": 3}, "line 2: caption is 3, expected a text"),
        ({"image": "a.png", "caption": " "}, "line 2: caption is"),
        ({"image": "b.png", "caption": "c"}, r"line 2: image .*b\.png does not exist"),
        (
            {"image": "https://x.org/b.png", "caption": "c"},
            "line 2: image https://x.org/b.png is a URL, and URLs are not fetched",
        ),
        ({"image": "a.png", "video": "frames", "caption": "c"}, "line 2: both image and video"),
        ({"image": "a.png", "answer": "c"}, "line 2: an answer without a question"),
        ({"image": "a.png", "question": "c"}, "line 2: a question goes with an answer"),
        ({"image": "a.png", "caption": "a <image>"}, "line 2: 'a <image>' contains the tag <image>"),
        ({"question": "What?", "answer": "c"}, "some lines ask a question and some only have a caption"),
    ],
)
def test_faults_name_their_line(folder: Path, line: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_shots(write(folder, {"image": "a.png", "caption": "fine"}, line))


def test_all_faults_are_named_at_once(folder: Path) -> None:
    with pytest.raises(PromptError, match=r"line 1: .*line 3: "):
        read_shots(write(folder, "{", {"caption": "fine"}, {"image": "none.png", "caption": "c"}))


def test_files_that_are_no_shots(folder: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        read_shots(folder / "none.jsonl")
    with pytest.raises(PromptError, match="is a folder"):
        read_shots(folder)
    with pytest.raises(PromptError, match="has no examples"):
        read_shots(write(folder, "", " "))
    with pytest.raises(PromptError, match="is not UTF-8 text"):
        read_shots(folder / "a.png")


def test_line_separators_of_unicode_stay_in_their_text(folder: Path) -> None:
    path = folder / "lines.jsonl"
    path.write_text(
        '{"image": "a.png", "caption": "a\u2028b\u0085c"}\r\n{"image": "a.png", "caption": "d"}\n', encoding="utf-8"
    )
    assert [shot.answer for shot in read_shots(path)] == ["a\u2028b\u0085c", "d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "not JSON that can be read"),
        ('{"image": ' + "1" * 5000 + "}", "not JSON that can be read"),
        ('{"image": "' + "a" * 5000 + '", "caption": "b"}', "is not a path"),
        ('{"image": "a.png", "caption": "a\\ud800"}', "surrogate"),
    ],
)
def test_lines_that_break_readers_are_named(folder: Path, line: str, message: str) -> None:
    path = folder / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match=f"line 1: .*{message}"):
        read_shots(path)


@pytest.mark.parametrize(
    ("rows", "first", "phi", "seen"),
    [
        ((), None, 0, []),
        ((1, 1, 1), None, 3, [3]),
        ((1, 1, 1), None, 2, [2]),
        ((4, 2, 1), 1, 4, [1]),
        ((4, 2, 1), 5, 7, [2, 3]),
        ((4, 2, 1), 1, 7, [1, 2, 3]),
        ((4, 2, 1), 0, 0, []),
    ],
)
def test_the_media_that_an_answer_looks_at(rows: tuple[int, ...], first: int | None, phi: int, seen: list[int]) -> None:
    """Counted as media, of which one of tiles has several rows."""
    media = tuple(Medium(pixels=np.zeros(0, np.float32), digest=b"", rows=count) for count in rows)
    ends = np.array([0, phi]), None if first is None else np.array([0, first])
    prepared = Prepared(token_ids=np.array([1, 5]), phi=ends[0], media=media, keys=(), first=ends[1])
    assert list(prepared.looked_at) == seen
