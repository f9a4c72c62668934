"""VQAv2's and OKVQA's files: questions and annotations, one JSON each a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import image_in
from flamingo_export.evaluation.reading import Faults, first_of, line_of, read_json, refuse_duplicates
from flamingo_export.evaluation.task import Item, Split


class _Question(msgspec.Struct):
    question_id: int
    image_id: int
    question: str


class _Questions(msgspec.Struct):
    questions: list[_Question]


class _Answer(msgspec.Struct):
    answer: str


class _Annotation(msgspec.Struct):
    question_id: int
    answers: list[_Answer]
    question_type: str = ""
    answer_type: str = ""


class _Annotations(msgspec.Struct):
    annotations: list[_Annotation]


def most_said(answers: Sequence[str]) -> str:
    """The answer given most often, the first of equals, empty ones aside: what an example says."""
    counts = Counter(answer.strip() for answer in answers if answer.strip())
    return counts.most_common(1)[0][0] if counts else ""


def read_vqa(
    data: Path, split: str, *, questions: Sequence[str], annotations: Sequence[str], images: str, image_name: str
) -> Split:
    """Items of a split. questions, annotations: what the files may be called; image_name: with {split} and {id}.

    Raises EvaluationError for questions without annotations, annotations of questions that there are not, ids that occur twice.
    """
    asked_file = first_of(data, questions, "the published questions")
    answers_file = first_of(data, annotations, "the published annotations, without which answers cannot be scored")
    asked = read_json(asked_file, _Questions, '{"questions": [{"question_id", "image_id", "question"}]}').questions
    answered = read_json(answers_file, _Annotations, '{"annotations": [{"question_id", "answers": [{"answer"}]}]}').annotations
    faults = Faults()
    for file, name, ids in (
        (asked_file, "questions", [each.question_id for each in asked]),
        (answers_file, "annotations", [each.question_id for each in answered]),
    ):
        if len(set(ids)) < len(ids):
            lines = [line_of(file, name, index) for index in range(len(ids))]
            refuse_duplicates(file, [str(each) for each in ids], lines, faults)
    found = {each.question_id: each for each in answered}
    items = []
    folders = [data / images.format(split=split), data / "images" / images.format(split=split), data / "images", data]
    for index, each in enumerate(asked):
        annotation = found.pop(each.question_id, None)
        if annotation is None:
            faults.add(
                asked_file,
                line_of(asked_file, "questions", index),
                f"question {each.question_id} has no annotation in {answers_file.name}",
            )
            continue
        if not annotation.answers:
            faults.add(answers_file, None, f"question {each.question_id} has no answers")
        answers = tuple(answer.answer for answer in annotation.answers)
        items.append(
            Item(
                id=str(each.question_id),
                medium=image_in(folders, image_name.format(split=split, id=each.image_id)),
                question=each.question.strip(),
                references=answers,
                answer=most_said(answers),
                groups=(f"answers: {annotation.answer_type}",) if annotation.answer_type else (),
            )
        )
    for surplus in list(found)[:1]:
        at = next(index for index, each in enumerate(answered) if each.question_id == surplus)
        faults.add(
            answers_file,
            line_of(answers_file, "annotations", at),
            f"{len(found)} annotations, first that of question {surplus}, are of no question in {asked_file.name}; are both of one split?",
        )
    faults.check()
    return Split(items=tuple(items))
