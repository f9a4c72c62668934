"""Every task's reader on files in its published layout: what is read, and what is refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.media_files import missing_file
from flamingo_export.evaluation.task import Item
from flamingo_export.evaluation.tasks import CLASSIFICATION, PAPER, task_of
from flamingo_export.runtime.videos import Video

COUNTS = {  # items of the split that is answered, and of the examples
    "vqav2": (4, 4), "okvqa": (4, 4), "textvqa": (3, 3), "vizwiz": (3, 3), "coco": (2, 2), "flickr30k": (2, 3), "youcook2": (2, 4),
    "vatex": (2, 2), "msvdqa": (2, 2), "msrvttqa": (2, 2), "ivqa": (3, 3), "nextqa": (3, 3), "star": (3, 3), "visdial": (2, 2),
    "hateful_memes": (4, 4), "rareact": (6, 6), "imagenet": (6, 6), "kinetics700": (3, 3),
}  # fmt: skip


def first(name: str, folder: Path) -> Item:
    task = task_of(name)
    return task.read(published.write(name, folder), task.split).items[0]


def test_there_are_the_papers_tasks() -> None:
    assert len(PAPER) == 16
    assert sorted(COUNTS) == sorted((*PAPER, *CLASSIFICATION))


@pytest.mark.parametrize("name", COUNTS)
def test_published_layout(tmp_path: Path, name: str) -> None:
    task, data = task_of(name), published.write(name, tmp_path)
    queries, examples = task.read(data, task.split).items, task.read(data, task.support).items
    assert (len(queries), len(examples)) == COUNTS[name]
    for item in (*queries, *examples):
        assert missing_file(item) is None
        assert (item.question is not None) == (task.form == "question")
        assert (task.media == "video") == isinstance(item.medium, Video)
        assert len(item.relevance) == len(item.candidates)
        assert bool(item.candidates) == (task.mode == "closed")
    assert len({item.id for item in queries}) == len(queries)
    assert any(item.answer for item in examples)


def test_vqa(tmp_path: Path) -> None:
    item = first("vqav2", tmp_path)
    assert item.id == "1000"
    assert item.question == "What colour is thing 0?"
    assert item.references == published.ANSWERS
    assert item.answer == "red"
    assert item.medium == tmp_path / "vqav2" / "val2014" / "COCO_val2014_000000000100.jpg"


def test_captions(tmp_path: Path) -> None:
    assert first("coco", tmp_path).references == ("A dog on beach 3.", "Sand and a dog")
    assert first("flickr30k", tmp_path).references[4] == "Two men , café 1003 number 4 ."
    own = tmp_path / "own"
    own.mkdir()
    published.coco_own(own)
    task = task_of("coco")
    assert [item.references for item in task.read(own, "val").items] == [("a cat 0", "a cat 1"), ("a cat 2", "a cat 3")]


def test_clips(tmp_path: Path) -> None:
    assert first("youcook2", tmp_path).medium == Video(source=tmp_path / "youcook2/videos/xHr8X2Wpm2Q.gif", clip=(0.0, 3.0))
    assert first("star", tmp_path).medium == Video(source=tmp_path / "star/Charades_v1_480/V6R90.gif", clip=(1.3, 7.9))


def test_closed(tmp_path: Path) -> None:
    star = first("star", tmp_path)
    assert star.relevance == (0, 1, 0, 0)
    dialog = first("visdial", tmp_path)
    assert dialog.question == (
        "two people at a table. Question: is it sunny 0? Answer: answer 0. Question: is it sunny 1? Answer: answer 1. Question: is it sunny 2?"
    )
    assert len(dialog.candidates) == 100
    left = task_of("visdial").read(tmp_path / "visdial", "val").left_out
    assert left == {"dialogues without dense annotations": 1}
    action = first("rareact", tmp_path)
    assert action.candidates == ("blend phone", "cut laptop")
    assert action.action == ("blend", "phone")
    named = first("imagenet", tmp_path)
    assert named.candidates == ("tench", "crane, n02012849", "crane, n03126707")


def test_further_references(tmp_path: Path) -> None:
    assert first("nextqa", tmp_path).references == ("crawl", "crawls forward")


def test_names_of_msvd(tmp_path: Path) -> None:
    data = published.write("msvdqa", tmp_path)
    (data / "videos/vid8.gif").rename(data / "videos/mv89psg6zh4_33_46.gif")
    (data / "youtube_mapping.txt").write_text("mv89psg6zh4_33_46 vid8\n")
    item = task_of("msvdqa").read(data, "test").items[0]
    assert item.medium == Video(source=data / "videos/mv89psg6zh4_33_46.gif")


def edited(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1))


def refused(name: str, data: Path, *said: str) -> None:
    task = task_of(name)
    with pytest.raises(EvaluationError) as error:
        task.read(data, task.split)
    for text in said:
        assert text in str(error.value), str(error.value)


def test_missing_and_surplus_annotations(tmp_path: Path) -> None:
    data = published.write("vqav2", tmp_path)
    questions, annotations = data / "v2_OpenEnded_mscoco_val2014_questions.json", data / "v2_mscoco_val2014_annotations.json"
    edited(annotations, lambda value: value["annotations"][1].update(question_id=77))
    line = next(number for number, text in enumerate(annotations.read_text().splitlines(), start=1) if "77," in text) - 1
    asked = next(number for number, text in enumerate(questions.read_text().splitlines(), start=1) if "1010," in text) - 1
    refused(
        "vqav2",
        data,
        f"line {asked}: question 1010 has no annotation",
        f"line {line}: 1 annotations, first that of question 77",
    )


def test_duplicate_ids(tmp_path: Path) -> None:
    data = published.write("vqav2", tmp_path)
    edited(data / "v2_OpenEnded_mscoco_val2014_questions.json", lambda value: value["questions"].append(value["questions"][0]))
    refused("vqav2", data, "id 1000 occurs a second time (first on line")


def test_wrong_types_and_interrupted_downloads(tmp_path: Path) -> None:
    data = published.write("star", tmp_path)
    file = data / "STAR_val.json"
    edited(file, lambda value: value[2].update(start="soon"))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), start=1) if "soon" in text)
    refused("star", data, f"line {line} ([2].start): Expected `float`, got `str`")
    edited(file, lambda value: value[2].update(start=1))
    file.write_text(file.read_text()[:-40])
    refused("star", data, "not JSON", "was its download interrupted?")
    file.unlink()
    refused("star", data, "has none of STAR_val.json")


def test_faults_of_csv(tmp_path: Path) -> None:
    data = published.write("rareact", tmp_path)
    text = (data / "rareact.csv").read_text()
    (data / "rareact.csv").write_text(text + "9,v1,3,2,8,cut,laptop,1\n9,v1,3,4,8,cut,laptop,7\n0,v1,1,2,8,cut,laptop,1\n")
    refused(
        "rareact",
        data,
        "line 8: the clip goes from '3' to '2'",
        "line 9: annotation '7', expected 0 to 4",
        "line 10: id 0 occurs a second time",
    )
    (data / "rareact.csv").write_text(text + "9,v1\n")
    refused("rareact", data, "line 8: 2 fields, the header has 8")
    (data / "rareact.csv").write_text("id,verb\n1,cut\n")
    refused("rareact", data, "line 1: no column video_id, start, end, noun, annotation")
    first, *rest = text.splitlines()
    (data / "rareact.csv").write_text("\n".join([f"{first},verb", *(f"{line},x" for line in rest)]))
    refused("rareact", data, "line 1: several columns are called verb")


def test_faults_of_lines(tmp_path: Path) -> None:
    data = published.write("hateful_memes", tmp_path)
    with (data / "dev_seen.jsonl").open("a") as file:
        file.write('\n{"id": 9, "img": 3}\nhello\n')
    refused("hateful_memes", data, "line 5: Expected `str`, got `int`", "line 6: not JSON")
    tokens = published.write("flickr30k", tmp_path)
    with (tokens / "test.txt").open("a") as file:
        file.write("1003\n4000.jpg\n")
    refused("flickr30k", tokens, "line 3: 1003.jpg occurs a second time", "line 4: 4000.jpg has no captions")


def test_answers_that_are_no_choice(tmp_path: Path) -> None:
    data = published.write("star", tmp_path)
    edited(data / "STAR_val.json", lambda value: value[0].update(answer="The moon."))
    refused("star", data, "line 2: Interaction_T1_0: answer 'The moon.' is none of the choices")
    dialogs = published.write("visdial", tmp_path)
    edited(dialogs / "visdial_1.0_val_dense_annotations.json", lambda value: value[0].update(gt_relevance=[1.0]))
    refused("visdial", dialogs, "image 0: 1 relevances for 100 candidates")


def test_unknown_task() -> None:
    with pytest.raises(EvaluationError, match="Choose one of coco, okvqa"):
        task_of("vqa3")
