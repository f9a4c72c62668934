"""What is evaluated: a bundle, a server, transformers' model, or anything else that can do these few things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from flamingo_export.runtime.media import MediumSource
from flamingo_export.runtime.request import Request
from flamingo_reference.input_format import InputFormat

Features = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A text that was generated, its tokens and their log-probabilities (both with the end token where it was reached)."""

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finished: bool


class EvaluatedModel(Protocol):
    """A model under evaluation."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What every number is marked with: `name`, `digest`, `precision`, `backend` and whatever else makes the model this one."""

    @property
    def inputs(self) -> InputFormat:
        """Tags and prompt forms that prompts are put in."""

    def check(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> None:
        """Raises InputError if one of the requests cannot be run at all (too long, too many media). Nothing is run."""

    def generate(self, requests: Sequence[Request], *, beams: int, max_new_tokens: int) -> Sequence[Answer]:
        """The best text for each request, by beam search up to the end token."""

    def score(self, requests: Sequence[Request], candidates: Sequence[Sequence[str]]) -> Sequence[Sequence[float]]:
        """Log-likelihood of each of a request's candidates, the end token included."""


@runtime_checkable
class HasFeatures(Protocol):
    """A model whose vision encoder can be asked, for RICES."""

    def features(self, media: Sequence[MediumSource]) -> Features:
        """A vector [N, E] for each medium, not normalised."""

    @property
    def features_of(self) -> str:
        """What the vectors are, for the report: mean-pooled features, an image tower's embeddings."""
