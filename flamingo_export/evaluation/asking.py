"""One unit of items asked: prompts made, answers generated or candidates scored, orders of the examples averaged over."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flamingo_export.evaluation.predictions import Prediction, Unit
from flamingo_export.evaluation.protocol import Answer, EvaluatedModel
from flamingo_export.evaluation.selection import Selector
from flamingo_export.evaluation.settings import Settings
from flamingo_export.evaluation.task import Item, Task
from flamingo_export.evaluation.task_prompts import request_for
from flamingo_export.runtime.request import Request

_FEW = 32
"""Candidates that are written beside each prediction; more of them are the task's and known."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A query with its prompts, one for each order of the examples, and the ids of those in the first one's order."""

    item: Item
    examples: tuple[str, ...]
    requests: tuple[Request, ...]


class Interview:
    """A task put to a model."""

    def __init__(self, task: Task, settings: Settings, selector: Selector | None, items: Mapping[str, Item]) -> None:
        self.task, self.settings, self._selector, self._items = task, settings, selector, items

    def asked(self, model: EvaluatedModel, item: Item, shots: int) -> Asked:
        """The prompts of an item, in the forms of this model. Raises EvaluationError where they cannot be made."""
        if self._selector is None or (shots == 0 and self.settings.zero_shot == "nothing"):
            return Asked(item=item, examples=(), requests=(request_for(self.task, model.inputs, (), item),))
        chosen = self._selector.choose(item, shots)
        examples = [self._selector.examples[place] for place in chosen]
        orders = self._selector.orders(item, len(examples), self.settings.ensemble)
        requests = tuple(
            request_for(self.task, model.inputs, [examples[at] for at in order], item, text_only=shots == 0) for order in orders
        )
        return Asked(item=item, examples=tuple(example.id for example in examples), requests=requests)

    def predictions(self, model: EvaluatedModel, unit: Unit) -> list[Prediction]:
        """What the model says to a unit's items."""
        started = time.perf_counter()
        asked = [self.asked(model, self._items[name], unit.shots) for name in unit.ids]
        closed = self.task.mode == "closed"
        found = self._closed(model, asked) if closed else self._open(model, asked)
        seconds = (time.perf_counter() - started) / len(asked)
        return [
            Prediction(
                shots=unit.shots,
                unit=unit.number,
                id=each.item.id,
                examples=each.examples,
                prompt=str(each.requests[0].prompt),
                text=answer.text,
                token_ids=answer.token_ids,
                token_logprobs=answer.token_logprobs,
                finished=answer.finished,
                candidates=candidates if len(candidates) <= _FEW else (),
                logprobs=logprobs,
                seconds=round(seconds, 6),
            )
            for each, (answer, candidates, logprobs) in zip(asked, found, strict=True)
        ]

    def _closed(self, model: EvaluatedModel, asked: Sequence[Asked]) -> list[tuple[Answer, tuple[str, ...], tuple[float, ...]]]:
        found = []
        for each, logprobs in zip(asked, self._averaged(model, asked, [each.item.candidates for each in asked]), strict=True):
            best = each.item.candidates[int(np.argmax(logprobs))]
            found.append((_plain(best), each.item.candidates, logprobs))
        return found

    def _open(self, model: EvaluatedModel, asked: Sequence[Asked]) -> list[tuple[Answer, tuple[str, ...], tuple[float, ...]]]:
        """The best text; with several orders, what each of them finds becomes a candidate, and the likeliest over all orders is taken."""
        requests = [request for each in asked for request in each.requests]
        answers = iter(model.generate(requests, beams=self.settings.beams, max_new_tokens=self.settings.new_tokens(self.task)))
        answered = [[next(answers) for _ in each.requests] for each in asked]
        texts = [tuple(dict.fromkeys(answer.text for answer in each if answer.text.strip())) for each in answered]
        several = [place for place, candidates in enumerate(texts) if len(candidates) > 1]
        averaged = self._averaged(model, [asked[place] for place in several], [texts[place] for place in several])
        scores = dict(zip(several, averaged, strict=True))
        found = []
        for place, each in enumerate(answered):
            logprobs = scores.get(place, ())
            best = texts[place][int(np.argmax(logprobs))] if logprobs else each[0].text
            answer = next(answer for answer in each if answer.text == best)
            found.append((answer, texts[place] if logprobs else (), logprobs))
        return found

    def _averaged(
        self, model: EvaluatedModel, asked: Sequence[Asked], candidates: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """Log-likelihoods of each item's candidates, averaged over its orders."""
        requests = [request for each in asked for request in each.requests]
        choices = [given for each, given in zip(asked, candidates, strict=True) for _ in each.requests]
        scores = iter(model.score(requests, choices))
        found = []
        for each in asked:
            rows = np.asarray([next(scores) for _ in each.requests], np.float64)
            found.append(tuple(float(value) for value in rows.mean(axis=0)))
        return found


def _plain(text: str) -> Answer:
    return Answer(text=text, token_ids=(), token_logprobs=(), finished=True)
