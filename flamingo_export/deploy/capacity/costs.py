"""What a decoder call costs by its shape, as measured; between and beyond the measured shapes it is linear."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import msgspec

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import InputError

_LEAST = 0.25
"""Of the nearest measured cost: below it an extrapolation is never believed."""


class StepCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of the engine's actions, their share of the loop and of the search included.

    rows, widths, slots: axes of `decode` [rows][widths][slots]: rows that decode together, branches of each, slots that attention reads.
    chunks: positions of a prompt computed in one call; `prefill` [chunks][slots].
    frames: images of one call of the vision encoder; `encode` [frames].
    copy_slot: copying one slot of a cache row to another row.
    prepare_image: reading, decoding and scaling one JPEG of 640 x 480, on one core beside the engine.
    limits: of the bundle. fixed_capacity: whether the cache has one capacity, so that attention knows how much of it is in use.
    asynchronous: whether encoding overlaps with steps; the simulation then counts it as if it did not.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    slots: tuple[int, ...]
    decode: tuple[tuple[tuple[float, ...], ...], ...]
    chunks: tuple[int, ...]
    prefill: tuple[tuple[float, ...], ...]
    frames: tuple[int, ...]
    encode: tuple[float, ...]
    copy_slot: float
    prepare_image: float
    limits: ShapeLimits
    fixed_capacity: bool = False
    asynchronous: bool = False

    def decoding(self, rows: int, width: int, slots: int) -> float:
        """Of a step of `rows` rows with `width` branches each."""
        return _linear((self.rows, self.widths, self.slots), self.decode, (rows, width, slots))

    def prefilling(self, chunk: int, slots: int) -> float:
        """Of `chunk` positions of one prompt."""
        return _linear((self.chunks, self.slots), self.prefill, (chunk, slots))

    def encoding(self, frames: int) -> float:
        """Of one call of the vision encoder and what follows it."""
        return _linear((self.frames,), self.encode, (frames,))


class Benched(msgspec.Struct, frozen=True, kw_only=True):
    """What `capacity` reads of `bench --json --grid`."""

    bundle: str
    model: str
    backend: str
    cores: int
    grid: StepCosts | None = None


def read_bench(path: Path) -> tuple[Benched, StepCosts]:
    """The file's head and its step costs. Raises InputError for a file that is none, or was written without --grid."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Benched)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not what bench writes: {error}. Make it: flamingo-export bench BUNDLE --json --grid"
        ) from error
    if found.grid is None:
        raise InputError(f"{path} has no step costs. Measure them: flamingo-export bench BUNDLE --json --grid > {path.name}")
    fault = _fault(found.grid)
    if fault:
        raise InputError(f"the step costs in {path} are not complete: {fault}. Measure them again.")
    return found, found.grid


def _fault(costs: StepCosts) -> str | None:
    axes = {"rows": costs.rows, "widths": costs.widths, "slots": costs.slots, "chunks": costs.chunks, "frames": costs.frames}
    for name, axis in axes.items():
        if not axis or list(axis) != sorted(set(axis)) or axis[0] < 1:
            return f"{name} is {json.dumps(axis)}, expected numbers that grow from at least 1"
    tables = (
        ("decode", costs.decode, (costs.rows, costs.widths, costs.slots)),
        ("prefill", costs.prefill, (costs.chunks, costs.slots)),
    )
    for name, table, sides in tables:
        if not _is_full(table, [len(side) for side in sides]):
            return f"{name} has not one positive number for each of its axes' places"
    if not _is_full(costs.encode, [len(costs.frames)]):
        return "encode has not one positive number for each of frames"
    return None


def _is_full(table: object, sides: Sequence[int]) -> bool:
    if not sides:
        return isinstance(table, float | int) and table > 0
    return isinstance(table, tuple) and len(table) == sides[0] and all(_is_full(part, sides[1:]) for part in table)


def _linear(axes: Sequence[tuple[int, ...]], table: object, point: Sequence[int]) -> float:
    """Multilinear in the table; beyond an axis' ends the last piece continues, an axis with one place is constant."""
    places: list[tuple[tuple[int, float], ...]] = []
    for axis, value in zip(axes, point, strict=True):
        if len(axis) == 1:
            places.append(((0, 1.0),))
            continue
        low = max(0, min(len(axis) - 2, sum(each <= value for each in axis) - 1))
        share = (value - axis[low]) / (axis[low + 1] - axis[low])
        places.append(((low, 1.0 - share), (low + 1, share)))
    total, nearest, weight_of_nearest = 0.0, 0.0, -1.0
    for corner in product(*places):
        cell: object = table
        weight = 1.0
        for index, part in corner:
            assert isinstance(cell, tuple)
            cell, weight = cell[index], weight * part
        assert isinstance(cell, float | int)
        total += weight * cell
        if weight > weight_of_nearest:
            nearest, weight_of_nearest = float(cell), weight
    return max(total, _LEAST * nearest)
