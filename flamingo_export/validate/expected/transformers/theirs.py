"""What the comparison knows of a family's model in transformers: classes, names, parts, inputs, and where it errs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from packaging.version import Version

from flamingo_export.errors import ParityError, pip_install
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_export.validate.expected.transformers.streamed import StreamedModel

INSTALL = pip_install("transformers")
LOWEST = "5.5"
"""The lowest version that the comparison was tried with; pyproject.toml asks for the same."""


class Theirs(Protocol):
    """A family's model in transformers."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What config.json is changed by before the model is made."""

    def classes(self) -> tuple[Any, Any]:
        """Of its configuration and model. Raises ParityError."""

    def published(self, name: str, config: Any) -> str:
        """The name in the checkpoint's files of a parameter of the live model."""

    def correct(self, model: Any) -> None:
        """Changes the model, in place, where it does not compute what the weights were trained with."""

    def kept(self, model: Any) -> Sequence[Any]:
        """Small modules of the model whose weights are asked for while they do not run."""

    def part(self, streamed: StreamedModel, prefix: str) -> contextlib.AbstractContextManager[Any]:
        """A part by the reference's name for it, called as the reference's is. Raises ValueError for an unknown one."""

    def inputs(
        self,
        streamed: StreamedModel,
        config: ModelConfig,
        sequences: Sequence[Sequence[int]],
        pixels: Tensor,
        aspects: Sequence[int],
    ) -> dict[str, Tensor]:
        """What the whole model takes for tokens of equal length that all show the same images."""


def theirs_of(family: str, names: Collection[str]) -> Theirs:
    """Of one of the families `KNOWN`. names: of its files' tensors."""
    if family == "idefics":
        from flamingo_export.validate.expected.transformers.idefics import Idefics

        return Idefics()
    from flamingo_export.validate.expected.transformers.mllama import Mllama

    return Mllama(names)


def classes_called(config: str, model: str) -> tuple[Any, Any]:
    """Two classes of transformers. Raises ParityError if it is missing, too old, or without them."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ParityError(f"transformers is not installed, so there is nothing of it to compare with: {INSTALL}") from error
    if Version(found) < Version(LOWEST):
        raise ParityError(f"transformers {found} is too old to compare with: {LOWEST} or later is needed: {INSTALL}")
    try:
        transformers: Any = importlib.import_module("transformers")
        return getattr(transformers, config), getattr(transformers, model)
    except (ImportError, AttributeError) as error:
        raise ParityError(
            f"transformers {found} has no {model} (or cannot load it: {error}). Install one that has: {INSTALL}"
        ) from error
