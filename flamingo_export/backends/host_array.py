"""The part of a buffer that is the same wherever it is an array of the host."""

from __future__ import annotations

from flamingo_export.backends.base import Buffer, Tensor, on_host
from flamingo_reference.arrays import Array


class HostArray:
    """A tensor in host memory, as `Buffer` describes it; `rows` and `view` are left to the backend, which may have to keep what they return."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def write(self, index: int, value: Tensor) -> None:
        """Copies `value` into row `index`."""
        self.array[index] = on_host("the value", value)

    def publish(self) -> None:
        """Nothing: what was written is there."""

    def read(self) -> Array:
        """A copy."""
        return self.array.copy()

    def copy_from(self, other: Buffer) -> None:
        """Copies the whole of `other` into the leading corner."""
        source = other.array if isinstance(other, HostArray) else other.read()
        self.array[tuple(slice(size) for size in source.shape)] = source

    def copy_slots(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` slots [:, :, count] of a row to another."""
        self.array[target, :, :count] = self.array[source, :, :count]
