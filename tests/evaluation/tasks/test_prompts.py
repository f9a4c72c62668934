"""The prompt of every task, written out: an example and a query in the paper's forms, as its published files have them."""

from __future__ import annotations

from pathlib import Path

import published
import pytest

from flamingo_export.evaluation.task_prompts import request_for
from flamingo_export.evaluation.tasks import CLASSIFICATION, PAPER, task_of
from flamingo_reference.input_format import PAPER as FORMS

COLOUR = ("Question: What colour is thing 0? Answer:", "red")
CHOPPING = ("Question: who is chopping? Answer:", "someone")
DIALOG = (
    "Question: two people at a table. Question: is it sunny 0? Answer: answer 0. Question: is it sunny 1? Answer: answer 1. "
    "Question: is it sunny 2? Answer:",
    "answer 2",
)
ASKED = {  # what stands behind the image, and what the example answers
    "vqav2": COLOUR, "okvqa": COLOUR, "msvdqa": CHOPPING, "msrvttqa": CHOPPING, "visdial": DIALOG,
    "textvqa": ("Question: what does it say? Answer:", "stop"),
    "vizwiz": ("Question: What is this? Answer:", "soup"),
    "ivqa": ("Question: What, then, is used? Answer:", "spoon"),
    "nextqa": ("Question: how did the baby move Answer:", "crawl"),
    "star": ("Question: Which object was tidied up by the person? Answer:", "The bag."),
    "hateful_memes": ('is an image with: "they\'re like 0" written on it. Is it hateful? Answer:', "no"),
    "coco": ("Output:", "A dog on beach 0."), "flickr30k": ("Output:", "Two men , café 1000 number 0 ."),
    "youcook2": ("Output:", "grill the tomatoes 0"), "vatex": ("Output:", "A man lifts 0"),
    "imagenet": ("Output:", "tench"), "kinetics700": ("Output:", "abseiling"), "rareact": ("Output:", "blend phone"),
}  # fmt: skip


def test_every_task_is_written_out() -> None:
    assert sorted(ASKED) == sorted((*PAPER, *CLASSIFICATION))


@pytest.mark.parametrize("name", ASKED)
def test_prompt(tmp_path: Path, name: str) -> None:
    task, data = task_of(name), published.write(name, tmp_path)
    query, example = task.read(data, task.split).items[0], task.read(data, task.support).items[0]
    asked, answer = ASKED[name]
    request = request_for(task, FORMS, [example], query)
    assert request.prompt == f"<BOS><image>{asked} {answer}<EOC><image>{asked}"
    assert list(request.media) == [example.medium, query.medium]
    bare = request_for(task, FORMS, [example, example], query, text_only=True)
    assert str(bare.prompt).count("<image>") == 1
    assert list(bare.media) == [query.medium]
