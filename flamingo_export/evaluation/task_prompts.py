"""Requests made of examples and a query, in the model's own forms or the task's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec

from flamingo_export.errors import EvaluationError, PromptError
from flamingo_export.evaluation.task import Item, Task
from flamingo_export.runtime.prompts import Shot, caption_prompt, qa_prompt, without_media
from flamingo_export.runtime.request import Request
from flamingo_reference.input_format import InputFormat


def request_for(task: Task, inputs: InputFormat, examples: Sequence[Item], query: Item, *, text_only: bool = False) -> Request:
    """The prompt that asks `query` after `examples`. text_only: their media are left out, as in the paper's zero-shot prompt.

    Raises EvaluationError naming the item whose text cannot be put into a prompt.
    """
    own = _forms(task, inputs)
    shots = [Shot(answer=each.answer, question=each.question, medium=each.medium) for each in examples]
    shots = without_media(shots) if text_only else shots
    try:
        if task.form == "caption":
            request = caption_prompt(shots, query.medium, own)
        else:
            request = qa_prompt(shots, query.question or "", query.medium, own)
    except PromptError as error:
        names = ", ".join(each.id for each in examples)
        raise EvaluationError(
            f"item {query.id}{f' with examples {names}' if names else ''} cannot be asked: {error}"
        ) from error
    # A task's own forms are meant: they are not another family's by mistake.
    return request if task.prompt is None else dataclasses.replace(request, forms=None)


def _forms(task: Task, inputs: InputFormat) -> InputFormat:
    """The input format with the task's prompt in place of the model's own."""
    if task.prompt is None:
        return inputs
    example, query = (text.replace("{end}", inputs.tags.eoc) for text in (task.prompt.example, task.prompt.query))
    caption = task.form == "caption"
    prompts = msgspec.structs.replace(
        inputs.prompts,
        **({"caption_example": example, "caption": query} if caption else {"question_example": example, "question": query}),
    )
    return msgspec.structs.replace(inputs, prompts=prompts)
