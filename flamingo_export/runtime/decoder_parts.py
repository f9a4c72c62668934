"""A decoder in parts, run one after the other: to the loop, the cache and the media bank it is one session like any other.

    token_ids ─> decoder.0 ── hidden ─> decoder.1 ── hidden ─> ... ─> decoder.K-1 ─> logits, candidates
                 caches 0..a-1          caches a..b-1                 caches z..L-1

Caches and media belong to the part that reads them: it allocates them, where it runs. Hidden states lie in a buffer that is output of one
part and input of the next, at the same address as long as sizes allow: they never pass through a device's host, and on a GPU each part's
step can be captured. Where the next part runs on another device there is a buffer on either side, and a copy between them after each run:

    decoder.1 on cuda:0 ── hidden_out ── copy, ordered by events ──> hidden ── decoder.2 on cuda:1

All but the last part are asked with `compute`, which need not wait, and nobody asks them for results.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from flamingo_export.backends.base import Buffer, Session, Tensor, check_feeds
from flamingo_export.errors import InputError
from flamingo_export.specs import HIDDEN, HIDDEN_OUT, SubgraphSpec
from flamingo_reference.arrays import Array


class DecoderParts:
    """Sessions of the decoder's parts, in order, as one session. It closes them."""

    def __init__(self, parts: Sequence[Session]) -> None:
        """Raises DeviceMemoryError where there is no room for the hidden states."""
        self._parts = tuple(parts)
        self._reads = [frozenset(tensor.name for tensor in part.spec.inputs) - {HIDDEN} for part in parts]
        inputs = {tensor.name: tensor for part in parts for tensor in part.spec.inputs if tensor.name != HIDDEN}
        outputs = {tensor.name: tensor for part in parts for tensor in part.spec.outputs if tensor.name != HIDDEN_OUT}
        self.spec = SubgraphSpec(
            name="decoder",
            inputs=tuple(inputs.values()),
            outputs=tuple(outputs.values()),
            aliases={output: source for part in parts for output, source in part.spec.aliases.items()},
        )
        self._bound: dict[str, Buffer] = {}
        self._checked: set[tuple[Any, ...]] = set()
        self._hidden: list[tuple[Buffer, Buffer]] = []
        """Between each part and the next, for as many positions as were ever asked for: what one writes and the other reads, which is the same
        buffer where both run in one place."""
        self._passed: list[tuple[Buffer, Buffer]] = []
        """The parts of them that are bound."""
        largest = self.largest
        self._connect(largest.get("B", 1), largest.get("S", 1))

    @property
    def largest(self) -> Mapping[str, int]:
        """Sizes that some part cannot go beyond."""
        found: dict[str, int] = {}
        for part in self._parts:
            for symbol, size in part.largest.items():
                found[symbol] = min(found.get(symbol, size), size)
        return MappingProxyType(found)

    @property
    def place(self) -> Hashable:
        return tuple(part.place for part in self._parts)

    @property
    def asynchronous(self) -> bool:
        return any(part.asynchronous for part in self._parts)

    @property
    def reads_bound_media(self) -> bool:
        return any(part.reads_bound_media for part in self._parts)

    def allocate(self, name: str, shape: tuple[int, ...]) -> Buffer:
        """A zeroed buffer for input `name`, where the part that reads it runs. Raises InputError for an unknown input."""
        return self._readers(name)[0].allocate(name, shape)

    def bind(self, name: str, buffer: Buffer) -> None:
        """Input `name`, and the output that aliases it, are this buffer from now on. Raises InputError for one that does not fit."""
        for part in self._readers(name):
            part.bind(name, buffer)
        if self._bound.get(name) is not buffer:
            self._bound[name] = buffer
            self._checked.clear()

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        """Runs every part once; results are those of the last one. Raises as a single session does, before any part is run."""
        return self._parts[-1].run(self._before_last(feeds), outputs)

    def compute(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As `run`, the results left where the last part has them."""
        return self._parts[-1].compute(self._before_last(feeds))

    def close(self) -> None:
        """Frees the parts; bound buffers stay valid."""
        for part in self._parts:
            part.close()
        self._bound, self._hidden, self._passed = {}, [], []

    def _readers(self, name: str) -> list[Session]:
        found = [part for part, reads in zip(self._parts, self._reads, strict=True) if name in reads]
        if not found:
            raise InputError(f"{self.spec.name}: {name} is not an input")
        return found

    def _before_last(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs all parts but the last; returns what the last one is fed with."""
        self._check(feeds)
        tokens = feeds["token_ids"] if "token_ids" in feeds else self._bound["token_ids"]
        self._connect(*tokens.shape)
        *given, last = ({name: value for name, value in feeds.items() if name in reads} for reads in self._reads)
        for part, each, (written, read) in zip(self._parts[:-1], given, self._passed, strict=True):
            part.compute(each)
            if read is not written:
                read.copy_from(written)
        return last

    def _check(self, feeds: Mapping[str, Tensor]) -> None:
        """Whether feeds are those of a whole decoder, once for each set of shapes and not at each step. Raises InputError."""
        key = tuple((name, value.shape, value.dtype) for name, value in feeds.items())
        if key in self._checked:
            return
        check_feeds(self.spec, feeds, self._bound)
        caches = sorted(feeds.keys() & set(self.spec.aliases.values()))
        if caches:
            raise InputError(f"{self.spec.name}: {caches[0]} is updated in place: bind a buffer to it")
        if len(self._checked) > 256:  # prompts of ever new lengths must not fill memory
            self._checked.clear()
        self._checked.add(key)

    def _connect(self, batch: int, length: int) -> None:
        """Hidden states of `batch` x `length` positions from each part to the next, in the memory there is or, where it is too small, in new.

        This is the only place where two parts share anything.
        """
        self._passed = []
        for index, (giver, taker) in enumerate(pairwise(self._parts)):
            shape = (batch, length, *(int(size) for size in taker.spec.input(HIDDEN).shape[2:]))
            if len(self._hidden) == index:
                self._hidden.append(_between(giver, taker, shape))
            elif math.prod(self._hidden[index][0].shape) < math.prod(shape):
                self._hidden[index] = _between(giver, taker, shape)
            written, read = (buffer.view(shape) for buffer in self._hidden[index])
            giver.bind(HIDDEN_OUT, written)
            taker.bind(HIDDEN, read)
            self._passed.append((written, read))


def _between(giver: Session, taker: Session, shape: tuple[int, ...]) -> tuple[Buffer, Buffer]:
    """What a part writes and the next one reads."""
    read = taker.allocate(HIDDEN, shape)
    return (read if giver.place == taker.place else giver.allocate(HIDDEN_OUT, shape)), read
