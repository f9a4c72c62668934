"""What feeds amount to: which profile serves them, the shapes of everything, what comes back."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flamingo_export.backends.base import check_feeds
from flamingo_export.backends.tensorrt.device_memory import DeviceBuffer, DeviceTensor
from flamingo_export.backends.tensorrt.dtypes import ElementType
from flamingo_export.backends.tensorrt.engine_contract import Contract
from flamingo_export.errors import InputError
from flamingo_reference.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Result:
    """An output of a call."""

    name: str
    shape: tuple[int, ...]
    element: ElementType

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.element.size


@dataclass(frozen=True, kw_only=True)
class Call:
    """What feeds of one set of shapes amount to: profile, shapes of all inputs, those fed from the host, outputs that no buffer is bound to,
    results that are wanted.

    empty: no logits were wanted (K = 0). Engines give one at least, which nobody reads.
    """

    key: tuple[Any, ...]
    profile: int
    shapes: dict[str, tuple[int, ...]]
    fed: tuple[str, ...]
    outputs: tuple[Result, ...]
    wanted: tuple[Result, ...]
    empty: bool


def plan(
    contract: Contract,
    feeds: Mapping[str, Array | DeviceTensor],
    bound: Mapping[str, DeviceBuffer],
    wanted: Collection[str] | None,
) -> Call:
    """The call that feeds of these shapes are; wanted: outputs that are to come back, None for all.

    Raises InputError for feeds that break the contract, and for sizes that no profile has.
    """
    spec = contract.spec
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    aliased = set(spec.aliases.values())
    check_feeds(spec, feeds, bound)
    faults = [
        f"{name} is {value.element.name} on the device, expected {contract.element(inputs[name]).name}"
        for name, value in feeds.items()
        if isinstance(value, DeviceTensor) and value.element is not contract.element(inputs[name])
    ]
    faults += [f"{name} is updated in place: bind a buffer to it" for name in feeds if name in aliased]
    unknown = set(wanted or ()) - {tensor.name for tensor in spec.outputs}
    faults += [f"{name} is not an output" for name in sorted(unknown)]
    if faults:
        raise InputError(f"{spec.name}: " + "; ".join(faults))
    shapes = {name: feeds[name].shape if name in feeds else bound[name].shape for name in inputs}
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        sizes.update((dim, size) for dim, size in zip(tensor.shape, shapes[tensor.name], strict=True) if isinstance(dim, str))
    asked = dict(sizes)
    empty = sizes.get("K") == 0
    if empty:
        sizes["K"] = 1
        shapes = {
            name: tuple(1 if dim == "K" else size for dim, size in zip(inputs[name].shape, shape, strict=True))
            for name, shape in shapes.items()
        }

    def results(sizes: dict[str, int]) -> list[Result]:
        return [
            Result(name=tensor.name, shape=contract.shape(tensor, sizes), element=contract.element(tensor))
            for tensor in spec.outputs
            if tensor.name not in spec.aliases and tensor.name not in bound
        ]

    return Call(
        key=(tuple(shapes.items()), tuple(feeds), None if wanted is None else tuple(wanted)),
        profile=_profile(contract, sizes),
        shapes=shapes,
        fed=tuple(name for name, value in feeds.items() if isinstance(value, np.ndarray)),
        outputs=tuple(results(sizes)),
        wanted=tuple(result for result in results(asked) if wanted is None or result.name in wanted),
        empty=empty,
    )


def _profile(contract: Contract, sizes: dict[str, int]) -> int:
    """The narrowest profile that has these sizes. Raises InputError."""
    capacity = sizes.get("C", contract.capacity)
    if capacity != contract.capacity:
        raise InputError(
            f"{contract.spec.name}: caches of {capacity} slots, the engine was built for {contract.capacity} and no other number"
        )
    profiles = contract.profiles
    for index in reversed(range(len(profiles))):
        if all(bounds.least <= sizes[symbol] <= bounds.most for symbol, bounds in profiles[index].bounds.items()):
            return index
    bounds = " or ".join(
        ", ".join(f"{symbol} {bounds.least} to {bounds.most}" for symbol, bounds in profile.bounds.items())
        for profile in profiles
    )
    asked = ", ".join(f"{symbol} {sizes[symbol]}" for symbol in profiles[0].bounds)
    raise InputError(f"{contract.spec.name}: {asked} were asked for, the engine takes {bounds}. Build it with larger limits.")
