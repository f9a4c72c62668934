"""Everything in a checkpoint is accounted for: each tensor used or ignored with a reason, each weight of the model found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.files.tensors import FLOATS, CheckpointError, TensorReader

_NUMBER = re.compile(r"\d+")


class Ignored(msgspec.Struct, frozen=True):
    """Tensors left out on purpose: a regular expression that must match the whole name, and why the model does not need them."""

    pattern: str
    reason: str


def check_tensors(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str, model: str, ignored: Sequence[Ignored] = ()
) -> dict[str, str]:
    """Names that are left out on purpose, each with the reason.

    expected, found: shape of every tensor by the file's names. model: what the tensors are for, as messages name it.
    Raises CheckpointError naming every tensor that is missing, unknown or misshapen, unknown ones with the nearest expected name.
    """
    left_out: dict[str, str] = {}
    names = NearestName(expected)
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        if name in expected:
            if shape != expected[name]:
                faults.append(f"{name} has shape {shape}, expected {expected[name]}")
            continue
        reason = next((rule.reason for rule in ignored if re.fullmatch(rule.pattern, name)), None)
        if reason is not None:
            left_out[name] = reason
        else:
            near = names.find(name)
            faults.append(f"unknown {name} {shape}" + (f" (nearest: {near})" if near else ""))
    if faults:
        raise CheckpointError(f"{where}: {len(faults)} tensors do not fit model {model!r}: " + "; ".join(faults))
    return left_out


def account(
    expected: Mapping[str, Shape],
    reader: TensorReader,
    *,
    where: str,
    model: str,
    ignored: Sequence[Ignored] = (),
    absent: Collection[str] = (),
) -> dict[str, str]:
    """`check_tensors` of a checkpoint's tensors, which must be floats where they are used. absent: those known only by name.

    Raises CheckpointError.
    """
    found = {name: expected.get(name, ()) if name in absent else reader.shape(name) for name in reader.names()}
    left_out = check_tensors(expected, found, where=where, model=model, ignored=ignored)
    present = [name for name in expected if name not in absent]
    others = [f"{name} has element type {reader.dtype(name)}" for name in present if reader.dtype(name) not in FLOATS]
    if others:
        raise CheckpointError(
            f"{where}: {'; '.join(others)}; expected one of {', '.join(str(dtype) for dtype in FLOATS)}. "
            "Bring the checkpoint as it was before it was quantised."
        )
    return left_out


class NearestName:
    """Finds the expected name most like another. Layers' names differ only in numbers, so their patterns are compared, once each: a
    checkpoint of another family has thousands of unknown names."""

    def __init__(self, expected: Iterable[str]) -> None:
        self._by_pattern: dict[str, list[str]] = {}
        for name in expected:
            self._by_pattern.setdefault(_pattern(name), []).append(name)
        self._known: dict[str, str | None] = {}

    def find(self, name: str) -> str | None:
        """The name with the same numbers where there is one; None if no pattern is alike."""
        pattern = _pattern(name)
        if pattern not in self._known:
            self._known[pattern] = next(iter(difflib.get_close_matches(pattern, self._by_pattern, n=1)), None)
        near = self._known[pattern]
        if near is None:
            return None
        numbers = iter(_NUMBER.findall(name))
        filled = re.sub("#", lambda _: next(numbers, "0"), near)
        alike = self._by_pattern[near]
        return filled if filled in alike else alike[0]


def _pattern(name: str) -> str:
    return _NUMBER.sub("#", name)
