"""What a family makes of its files: the model's configuration, and each of our tensors from theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from flamingo_reference.checkpoints.accounting import Ignored
from flamingo_reference.checkpoints.files.tensors import AnyArray, Shape, TensorReader
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import PAPER, InputFormat


class Recipe(Protocol):
    """How one of our tensors is made: the file's tensors by name and shape, in the order in which `make` takes them."""

    @property
    def sources(self) -> Mapping[str, Shape]: ...

    @property
    def make(self) -> Callable[[Sequence[AnyArray]], AnyArray]: ...


def source_shapes(recipes: Mapping[str, Recipe]) -> dict[str, Shape]:
    """Name and shape of every tensor that recipes read."""
    return {name: shape for recipe in recipes.values() for name, shape in recipe.sources.items()}


class PartFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a part: path as given, config.json as it says (untrusted), tensors; absent: those of them known by name alone."""

    path: Path
    family: str
    settings: Mapping[str, Any]
    reader: TensorReader
    absent: Collection[str] = ()


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """All files of a model, and the ids of its tokenizer's added tokens by text, the family's own included; empty where there is none."""

    model: PartFiles
    language_model: PartFiles | None = None
    vision_encoder: PartFiles | None = None
    token_ids: Mapping[str, int] = msgspec.field(default_factory=dict)


class Adopted(msgspec.Struct, frozen=True, kw_only=True):
    """A model made of files.

    expected: name and shape of each of our tensors. recipes: for each of them, from which tensors of the joined parts it is made; None where
    names are ours already. ignored: tensors of the files that the model does not need. inputs: how it takes images and text. misfit: what is
    wrong with the tokenizer, to be said once config.json and tensors are known to agree; empty where nothing is.
    """

    config: ModelConfig
    expected: Mapping[str, Shape]
    recipes: Mapping[str, Recipe] | None = None
    ignored: tuple[Ignored, ...] = ()
    inputs: InputFormat = PAPER
    misfit: str = ""


class AdoptedReader:
    """Our tensors, each made of the files' tensors when it is read: in memory of its own size and theirs."""

    def __init__(self, reader: TensorReader, expected: Mapping[str, Shape], recipes: Mapping[str, Recipe]) -> None:
        self._reader, self._expected, self._recipes = reader, dict(expected), recipes

    def names(self) -> list[str]:
        """All tensor names, ours."""
        return list(self._expected)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._expected[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor: that of what it is made of, the widest where these differ."""
        dtype: np.dtype[Any] = np.result_type(*(self._reader.dtype(source) for source in self._recipes[name].sources))
        return dtype

    def read(self, name: str) -> AnyArray:
        """A tensor, made of its sources."""
        recipe = self._recipes[name]
        return recipe.make([self._reader.read(source) for source in recipe.sources])


class JoinedReader:
    """Several parts as one. Names must not repeat."""

    def __init__(self, readers: Sequence[TensorReader]) -> None:
        self._by_name = {name: reader for reader in readers for name in reader.names()}

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._by_name)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._by_name[name].shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor."""
        return self._by_name[name].dtype(name)

    def read(self, name: str) -> AnyArray:
        """A tensor of whichever part has it."""
        return self._by_name[name].read(name)
