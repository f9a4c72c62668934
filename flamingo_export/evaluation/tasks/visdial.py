"""VisDial 1.0 (Das et al. 2017, arXiv 1611.08669): a dialogue about an image, 100 candidate answers, dense annotations of one round."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import image_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json, refuse_duplicates
from flamingo_export.evaluation.task import Item, Split, Task


class _Round(msgspec.Struct):
    question: int
    answer: int | None = None
    answer_options: list[int] = []


class _Dialog(msgspec.Struct):
    image_id: int
    caption: str
    dialog: list[_Round]


class _Data(msgspec.Struct):
    questions: list[str]
    answers: list[str]
    dialogs: list[_Dialog]


class _File(msgspec.Struct):
    data: _Data


class _Dense(msgspec.Struct):
    image_id: int
    round_id: int
    gt_relevance: list[float] | None = None
    relevance: list[float] | None = None


def read(data: Path, split: str) -> Split:
    """The annotated round of each dialogue of `train` or `val`; dialogues without dense annotations are left out, and counted."""
    file = first_of(data, (f"visdial_1.0_{split}.json",), "VisDial's dialogues")
    dense_file = first_of(
        data,
        (f"visdial_1.0_{split}_dense_annotations.json", f"visdial_1.0_{split}_dense_sample.json"),
        "VisDial's dense annotations, without which NDCG cannot be computed",
    )
    found = read_json(file, _File, '{"data": {"questions", "answers", "dialogs": [{"image_id", "caption", "dialog"}]}}').data
    dense = read_json(dense_file, list[_Dense], '[{"image_id", "round_id", "gt_relevance"}]')
    faults = Faults()
    dialogs = {each.image_id: index for index, each in enumerate(found.dialogs)}
    if len(dialogs) < len(found.dialogs):
        lines = [line_of(file, "data", "dialogs", index) for index in range(len(found.dialogs))]
        refuse_duplicates(file, [str(each.image_id) for each in found.dialogs], lines, faults)
    items = []
    for index, each in enumerate(dense):
        if each.image_id not in dialogs:
            faults.add(dense_file, line_of(dense_file, index), f"image {each.image_id} has no dialogue in {file.name}")
            continue
        at = dialogs[each.image_id]
        dialog = found.dialogs[at]
        fault = _fault(found, dialog, each)
        if fault:
            faults.add(file, line_of(file, "data", "dialogs", at), f"image {each.image_id}: {fault}")
            continue
        items.append(_item(data, split, found, dialog, each))
    faults.check()
    left = len(found.dialogs) - len(items)
    return Split(items=tuple(items), left_out={"dialogues without dense annotations": left} if left else {})


def _fault(found: _Data, dialog: _Dialog, dense: _Dense) -> str | None:
    if not 1 <= dense.round_id <= len(dialog.dialog):
        return f"round {dense.round_id} is annotated, the dialogue has {len(dialog.dialog)}"
    rounds = dialog.dialog[: dense.round_id]
    if any(not 0 <= each.question < len(found.questions) for each in rounds):
        return f"a question's number is outside 0 to {len(found.questions) - 1}"
    last, relevance = rounds[-1], dense.gt_relevance or dense.relevance or []
    if len(relevance) != len(last.answer_options) or not relevance:
        return f"{len(relevance)} relevances for {len(last.answer_options)} candidates"
    spoken = [each.answer for each in rounds[:-1]]
    if any(answer is None or not 0 <= answer < len(found.answers) for answer in [*spoken, *last.answer_options]):
        return f"an answer's number is outside 0 to {len(found.answers) - 1}"
    return None


def _item(data: Path, split: str, found: _Data, dialog: _Dialog, dense: _Dense) -> Item:
    """The dialogue up to the annotated round, as one text that ends in its question."""
    rounds = dialog.dialog[: dense.round_id]
    history = "".join(
        f"{found.questions[each.question].strip()}? Answer: {found.answers[each.answer or 0].strip()}. Question: "
        for each in rounds[:-1]
    )
    last = rounds[-1]
    candidates = tuple(found.answers[option].strip() for option in last.answer_options)
    relevance = tuple(dense.gt_relevance or dense.relevance or ())
    own = (
        last.answer
        if last.answer is not None
        else last.answer_options[max(range(len(relevance)), key=lambda at: relevance[at])]
    )
    folders = [data / f"VisualDialog_{split}2018", data / "images", data / "train2014", data / "val2014"]
    number = f"{dialog.image_id:012d}.jpg"
    names = (f"VisualDialog_{split}2018_{number}", f"COCO_train2014_{number}", f"COCO_val2014_{number}")
    image = next((path for name in names if (path := image_in(folders, name)).is_file()), folders[0] / names[0])
    return Item(
        id=f"{dialog.image_id}/{dense.round_id}",
        medium=image,
        question=f"{dialog.caption.strip()}. Question: {history}{found.questions[last.question].strip()}?",
        references=tuple(candidate for candidate, value in zip(candidates, relevance, strict=True) if value > 0),
        answer=found.answers[own].strip(),
        candidates=candidates,
        relevance=relevance,
    )


TASK = Task(
    name="visdial",
    title="VisDial",
    form="question",
    mode="closed",
    metric="ndcg",
    read=read,
    files="visdial_1.0_{train,val}.json, visdial_1.0_val_dense_annotations.json, visdial_1.0_train_dense_sample.json, VisualDialog_val2018/",
    source="https://visualdialog.org/data",
)
