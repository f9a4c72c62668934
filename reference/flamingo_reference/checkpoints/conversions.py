"""How the tensors of a published checkpoint become ours: for each of our names, those it is made of and what is done to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from flamingo_reference.arrays import Array, Shape
from flamingo_reference.checkpoints.converted import Conversion
from flamingo_reference.config import ConfigError

Make = Callable[[Sequence[Array]], Array]


class Recipe(msgspec.Struct, frozen=True):
    """sources: name and shape of the file's tensors, given to `make` in this order; what it returns has our shape and their type."""

    sources: Mapping[str, Shape]
    make: Make


def as_is(name: str, shape: Shape) -> Recipe:
    """The tensor itself."""
    return Recipe({name: shape}, _first)


def reshaped(name: str, shape: Shape, ours: Shape) -> Recipe:
    """The same numbers in another shape."""
    return Recipe({name: shape}, functools.partial(_reshaped, shape=ours))


def transposed(name: str, shape: Shape) -> Recipe:
    """A matrix with rows and columns exchanged."""
    return Recipe({name: shape}, _transposed)


def rows(name: str, shape: Shape, start: int, stop: int) -> Recipe:
    """Rows start .. stop - 1 of a tensor that holds several of ours."""
    return Recipe({name: shape}, functools.partial(_rows, start=start, stop=stop))


def joined(sources: Mapping[str, Shape]) -> Recipe:
    """Tensors one after the other along their first axis."""
    return Recipe(sources, _joined)


def padded(name: str, shape: Shape, total: int) -> Recipe:
    """A matrix with rows of zeros behind its own, `total` rows in all."""
    return Recipe({name: shape}, functools.partial(_padded, total=total))


def with_bias(ours: str, theirs: str, shape: Shape) -> dict[str, Recipe]:
    """Weight and bias of a linear layer or norm, under our name and theirs; shape: that of the weight."""
    return {
        f"{ours}.weight": as_is(f"{theirs}.weight", shape),
        f"{ours}.bias": as_is(f"{theirs}.bias", shape[:1]),
    }


_SHOWN = 80  # characters of a value that a message repeats
_MOST = 1 << 63


def setting(raw: Mapping[str, Any], name: str, kind: type, default: Any = None, *, where: str = "config.json") -> Any:
    """An entry of a published config of the type expected. Raises ConfigError if it is of another, a number that no model has (infinite, NaN,
    beyond 64 bits), or missing and without a default."""
    value = raw.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not (math.isfinite(value) if isinstance(value, float) else abs(value) < _MOST):
        raise ConfigError(
            f"{where}: {name} is {value!r:.{_SHOWN}}, expected a number that a model can have. Fetch the file again."
        )
    if kind is float and number:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and not number):
        raise ConfigError(f"{where}: {name} is {value!r:.{_SHOWN}}, expected {kind.__name__}. Fetch the file again.")
    return value


def positive(raw: Mapping[str, Any], name: str, default: float, *, where: str = "config.json") -> float:
    """A number above zero. Raises ConfigError as `setting` does, and for any other number."""
    value: float = setting(raw, name, float, default, where=where)
    if value <= 0:
        raise ConfigError(f"{where}: {name} is {value!r}, expected a positive number. Fetch the file again.")
    return value


def choice(raw: Mapping[str, Any], name: str, known: Mapping[Any, Any], default: Any, *, where: str = "config.json") -> Any:
    """What an entry of a published config stands for here. Raises ConfigError for a value that has no counterpart."""
    value = raw.get(name, default)
    if isinstance(value, list | dict) or value not in known:
        expected = ", ".join(repr(each) for each in known)
        raise ConfigError(f"{where}: {name} is {value!r:.{_SHOWN}}, which is not supported; expected {expected}.")
    return known[value]


def named(raw: Mapping[str, Any], names: Sequence[str], *, where: str = "config.json") -> str:
    """Of several names of one setting, the one that a published config has; the first where it has none. Raises ConfigError if it has several
    that say different things, of which libraries take one or the other."""
    given = [name for name in names if name in raw]
    if any(raw[name] != raw[given[0]] for name in given[1:]):
        said = " and ".join(f"{name} {raw[name]!r:.{_SHOWN}}" for name in given)
        raise ConfigError(
            f"{where}: {said} are two names of one setting, and say different things. Remove the one that was not trained with."
        )
    return given[0] if given else names[0]


def token_ids(raw: Mapping[str, Any], name: str, default: int, *, where: str = "config.json") -> tuple[int, ...]:
    """Token ids of a setting that is one or several. Raises ConfigError if it is null, or not of numbers."""
    value = raw.get(name, default)
    if value is None:
        raise ConfigError(
            f"{where}: {name} is null, so that it does not say which token {_DOES.get(name, 'that is')}. Write the id there that the tokenizer "
            "has for it."
        )
    several = value if isinstance(value, list) and value else [value]
    return tuple(setting({name: each}, name, int, where=where) for each in several)


_DOES = {"bos_token_id": "begins a text", "eos_token_id": "ends a text"}


def plain_head_size(raw: Mapping[str, Any], width: int, heads: int, *, where: str = "config.json") -> None:
    """Raises ConfigError for a head_dim other than the width's share of a head: transformers would turn other positions by it."""
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim != width // heads:
        raise ConfigError(
            f"{where}: head_dim is {head_dim!r:.{_SHOWN}}, and a width of {width} with {heads} heads makes {width // heads}, which the "
            "tensors are read by. Remove it, or bring the config.json that the model was trained with."
        )


def rope_type(rope: Mapping[str, Any], known: Mapping[Any, Any], *, where: str) -> Any:
    """What the kind of rotary positions stands for here, `rope_type` or, as older files call it, `type`. Raises ConfigError as `choice`."""
    return choice(rope, "rope_type" if "rope_type" in rope else "type", known, "default", where=where)


def _first(sources: Sequence[Array]) -> Array:
    return sources[0]


def _reshaped(sources: Sequence[Array], *, shape: Shape) -> Array:
    return sources[0].reshape(shape)


def _transposed(sources: Sequence[Array]) -> Array:
    return sources[0].T


def _rows(sources: Sequence[Array], *, start: int, stop: int) -> Array:
    return sources[0][start:stop]


def _padded(sources: Sequence[Array], *, total: int) -> Array:
    (matrix,) = sources
    return np.concatenate([matrix, np.zeros((total - len(matrix), *matrix.shape[1:]), matrix.dtype)])


def renamed(recipes: Mapping[str, Conversion], rename: Callable[[str], str]) -> dict[str, Recipe]:
    """The same recipes, of tensors by other names."""
    return {
        ours: Recipe({rename(name): shape for name, shape in recipe.sources.items()}, recipe.make)
        for ours, recipe in recipes.items()
    }


def _joined(sources: Sequence[Array]) -> Array:
    return np.concatenate(sources)
