"""What a metric takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flamingo_export.evaluation.task import Item
from flamingo_reference.arrays import Floats

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model made of an item: its text, and the log-likelihood of each candidate of a closed task, averaged over an ensemble."""

    text: str
    logprobs: tuple[float, ...] = ()


class Scored(Protocol):
    """Scores of a list of items, in percent where the metric's `unit` is "%"."""

    @property
    def items(self) -> Floats | None:
        """Of each item [N], where the metric is their mean; else None."""

    @property
    def details(self) -> Mapping[str, Floats]:
        """Further figures, each item's [N] by name; their mean is shown."""

    def value(self, chosen: Indices) -> float | None:
        """The metric over the items at these positions, which may occur several times (bootstrap); None where they do not define it."""


class Metric(Protocol):
    """A way to score."""

    @property
    def title(self) -> str: ...

    @property
    def unit(self) -> str:
        """ "%" or "" for points."""

    def require(self) -> None:
        """Raises EvaluationError saying what to install, where a tool that it needs is missing."""

    def score(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Scored:
        """Scores of all items together."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A metric that is the mean of its items' scores."""

    items: Floats
    details: Mapping[str, Floats] = field(default_factory=dict)

    def value(self, chosen: Indices) -> float | None:
        """Their mean; None for no items."""
        return float(self.items[chosen].mean()) if len(chosen) else None
