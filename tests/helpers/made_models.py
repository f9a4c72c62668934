"""A model that follows the evaluation's protocol and is made of a few lines, so that tests know what it must say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from flamingo_export.errors import CapacityError
from flamingo_export.evaluation.protocol import Answer, Features
from flamingo_export.runtime.images import load_image
from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.request import Request
from flamingo_reference.input_format import PAPER, InputFormat


class Echo:
    """Answers a question with the answer of the last example, a candidate's score is how often the prompt holds it, less its length.

    Whatever it is asked is noted in `asked`.
    """

    def __init__(self, name: str = "echo", *, suffix: str = "", most_media: int = 99) -> None:
        self.name, self.suffix, self.most_media = name, suffix, most_media
        self.asked: list[str] = []

    @property
    def identity(self) -> Mapping[str, str]:
        return {"name": self.name, "digest": f"digest of {self.name}", "precision": "none", "backend": "test"}

    @property
    def inputs(self) -> InputFormat:
        return PAPER

    def check(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> None:
        if max(len(request.media) for request in requests) > self.most_media:
            raise CapacityError(f"at most {self.most_media} media")

    def generate(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> list[Answer]:
        self.asked += [str(request.prompt) for request in requests]
        texts = [self._last(str(request.prompt)) + self.suffix for request in requests]
        return [Answer(text=text, token_ids=(1, 2), token_logprobs=(-0.5, -0.25), finished=True) for text in texts]

    def score(self, requests: Sequence[Request], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        self.asked += [str(request.prompt) for request in requests]
        return [
            [str(request.prompt).count(f" {each}<EOC>") - 0.01 * len(each) for each in choices]
            for request, choices in zip(requests, candidates, strict=True)
        ]

    @staticmethod
    def _last(prompt: str) -> str:
        *examples, _ = prompt.split("<EOC>")
        return examples[-1].rsplit(": ", 1)[-1] if examples else "nothing"


class Seeing(Echo):
    """The same with features: the mean colour of each medium."""

    def features(self, media: Sequence[MediumSource]) -> Features:
        means = [np.asarray(load_image(cast("Any", medium)), np.float32).mean(axis=(0, 1)) - 90 for medium in media]
        return np.stack(means).astype(np.float32)

    @property
    def features_of(self) -> str:
        return "mean colours"
