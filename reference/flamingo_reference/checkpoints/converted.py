"""What a family makes of its files: the model's configuration, and each of our tensors from theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from flamingo_reference.arrays import Array, Shape
from flamingo_reference.checkpoints.accounting import Ignored
from flamingo_reference.checkpoints.files.tensors import CheckpointError, TensorReader
from flamingo_reference.config import ModelConfig
from flamingo_reference.input_format import PAPER, InputFormat


class Conversion(Protocol):
    """How one of our tensors is made: the file's tensors by name and shape, in the order in which `make` takes them."""

    @property
    def sources(self) -> Mapping[str, Shape]: ...

    @property
    def make(self) -> Callable[[Sequence[Array]], Array]: ...


def source_shapes(recipes: Mapping[str, Conversion]) -> dict[str, Shape]:
    """Name and shape of every tensor that recipes read."""
    return {name: shape for recipe in recipes.values() for name, shape in recipe.sources.items()}


class ComponentFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a component: path as given, config.json as it says (untrusted), tensors; absent: those of them known only by name."""

    path: Path
    family: str
    settings: Mapping[str, Any]
    reader: TensorReader
    absent: Collection[str] = ()


class Components(msgspec.Struct, frozen=True, kw_only=True):
    """All files of a model, and the ids of its tokenizer's added tokens by text, the family's own included; empty where there is none."""

    model: ComponentFiles
    language_model: ComponentFiles | None = None
    vision_encoder: ComponentFiles | None = None
    token_ids: Mapping[str, int] = msgspec.field(default_factory=dict)


class Converted(msgspec.Struct, frozen=True, kw_only=True):
    """A model made of files.

    expected: name and shape of each of our tensors. recipes: for each of them, from which tensors of the joined components it is made; None
    where names are ours already. ignored: tensors of the files that the model does not need. inputs: how it takes images and text. misfit: what
    is wrong with the tokenizer, to be said once config.json and tensors are known to agree; empty where nothing is.
    twins: second names of tensors in use, each with the name in use: their numbers must be equal. tied: where the output is the embedding,
    the names that a matrix of its own would have in the files, each with the embedding's. notes: what a user of the model should know.
    """

    config: ModelConfig
    expected: Mapping[str, Shape]
    recipes: Mapping[str, Conversion] | None = None
    ignored: tuple[Ignored, ...] = ()
    inputs: InputFormat = PAPER
    misfit: str = ""
    twins: Mapping[str, str] = msgspec.field(default_factory=dict)
    tied: Mapping[str, str] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class ConvertedReader:
    """Our tensors, each made of the files' tensors when it is read: in memory of its own size and theirs."""

    def __init__(self, reader: TensorReader, expected: Mapping[str, Shape], recipes: Mapping[str, Conversion]) -> None:
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

    def read(self, name: str) -> Array:
        """A tensor, made of its sources."""
        recipe = self._recipes[name]
        return recipe.make([self._reader.read(source) for source in recipe.sources])


class TwinReader:
    """Tensors of which some lie in the files under two names. Reading one under the name in use compares it with the others."""

    def __init__(self, reader: TensorReader, twins: Mapping[str, str]) -> None:
        """twins: second name -> name in use; those whose bytes are the same need not be named."""
        self._reader = reader
        self._twins: dict[str, list[str]] = {}
        for other, kept in twins.items():
            self._twins.setdefault(kept, []).append(other)

    def names(self) -> list[str]:
        """All tensor names."""
        return self._reader.names()

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._reader.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor."""
        return self._reader.dtype(name)

    def read(self, name: str) -> Array:
        """A tensor. Raises CheckpointError if it has other numbers under its second name: nobody knows which of them was meant."""
        array = self._reader.read(name)
        for other in self._twins.get(name, ()):
            second = self._reader.read(other)
            if array.shape != second.shape or not np.array_equal(array, second, equal_nan=True):
                raise CheckpointError(
                    f"{name} and {other} are two names of one tensor, and hold different numbers. Remove the one that was not trained."
                )
        return array


class UntiedReader:
    """Tensors, and the embedding's once more under the names that an output of its own would have."""

    def __init__(self, reader: TensorReader, heads: Mapping[str, str]) -> None:
        """heads: name of the output's tensor -> the embedding's. Those that the reader has are read as they are."""
        held = set(reader.names())
        self._reader = reader
        self._heads = {head: embedding for head, embedding in heads.items() if head not in held}

    def names(self) -> list[str]:
        """All tensor names."""
        return [*self._reader.names(), *self._heads]

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._reader.shape(self._heads.get(name, name))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor."""
        return self._reader.dtype(self._heads.get(name, name))

    def read(self, name: str) -> Array:
        """A tensor."""
        return self._reader.read(self._heads.get(name, name))


class JoinedReader:
    """Several components as one. Names must not repeat."""

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

    def read(self, name: str) -> Array:
        """A tensor of whichever component has it."""
        return self._by_name[name].read(name)
