"""How a session's feeds get to the device: each through pinned memory of its own, or those of a captured step by what differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from flamingo_export.backends.tensorrt.device_memory import DeviceStream, DeviceTensor, Memory, Pinned
from flamingo_export.backends.tensorrt.dtypes import ElementType, encode
from flamingo_export.backends.tensorrt.engine_contract import Contract
from flamingo_export.backends.tensorrt.handing import Hand
from flamingo_export.backends.tensorrt.launch import Call
from flamingo_export.backends.tensorrt.result_buffers import TOKENS
from flamingo_export.backends.tensorrt.sending import (
    KEPT,
    MOST_UPDATES,
    NO_CHOICES,
    NO_UPDATES,
    Kept,
    Pack,
    Updates,
    aligned,
    places_of,
    written,
)
from flamingo_export.backends.tensorrt.step_kernels import CHOICE, UPDATE
from flamingo_export.specs import HIDDEN
from flamingo_reference.arrays import Array

Given = Mapping[str, Array | DeviceTensor]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Where the feeds of a captured step lie. places: of small ones in the pack. size: of all of them there. kept: those that stay."""

    places: dict[str, int]
    size: int
    kept: dict[str, Kept]


class Feeds:
    """Memory of a session's feeds on both sides, and what is on its way between."""

    def __init__(self, stream: DeviceStream, contract: Contract, profiles: Collection[int], moved: Callable[[], None]) -> None:
        """profiles: those whose calls may be captured. moved: called before addresses that captured steps know are given up."""
        self._stream, self._cuda, self._contract, self._moved = stream, stream.cuda, contract, moved
        self._inputs = {tensor.name: tensor for tensor in contract.spec.inputs}
        self._profiles = profiles or {len(contract.profiles) - 1}
        self._own: dict[str, tuple[Pinned, Memory]] = {}
        self._pack: Pack | None = None
        self._copied = self._cuda.event()
        self.in_flight = False
        """Whether what is in the pinned blocks of feeds may still be on its way to the device."""

    def close(self) -> None:
        """Frees everything; the stream must have been waited for."""
        self._cuda.destroy_event(self._copied)
        if self._pack is not None:
            self._pack.close()
        self._pack, self._own = None, {}

    # Memory.

    def most(self, name: str, profile: int) -> int:
        """Bytes of an input at most in a profile."""
        bounds, tensor = self._contract.profiles[profile].bounds, self._inputs[name]
        shape = self._contract.shape(tensor, {symbol: size.most for symbol, size in bounds.items()})
        return math.prod(shape) * self._element(name).size

    def address(self, name: str) -> int:
        """Of an input's own memory on the device: it never changes."""
        return self._memory(name)[1].address

    def addresses(self, sent: Sent) -> dict[str, int]:
        """Of all feeds of a captured step."""
        pack = self._packed(0)
        found = {name: pack.address + place for name, place in sent.places.items()}
        return found | {name: kept.address for name, kept in sent.kept.items()}

    def _element(self, name: str) -> ElementType:
        return self._contract.element(self._inputs[name])

    def _memory(self, name: str) -> tuple[Pinned, Memory]:
        """Pinned and device memory of an input that is fed, as large as any profile wants it."""
        if name not in self._own:
            size = max(self.most(name, index) for index in range(len(self._contract.profiles)))
            self._own[name] = (Pinned(self._cuda, size), Memory(self._stream, size))
        return self._own[name]

    def _packed(self, needed: int) -> Pack:
        """The block of small feeds, updates and choices, as large as any captured step wants it, or more where a call wants more."""
        if self._pack is None or self._pack.size < needed:
            self._moved()
            resident = {*KEPT, HIDDEN, *self._contract.spec.aliases.values()}
            names = [name for name in self._inputs if name not in resident and not name.startswith(("media_k.", "media_v."))]
            feeds = max(sum(aligned(self.most(name, index)) for name in names) for index in self._profiles)
            branches = max(self.most(TOKENS, index) // 8 for index in self._profiles) if TOKENS in self._inputs else 0
            if self._pack is not None:
                self._pack.close()
            self._pack = Pack(self._stream, max(feeds + _room(branches), needed))
        return self._pack

    # Calls that are run as they are.

    def whole(self, call: Call, feeds: Given) -> None:
        """All feeds of the host to memory of their own."""
        cuda, stream = self._cuda, self._stream.handle
        self._settle()
        for name in call.fed:
            value, element = feeds[name], self._element(name)
            assert isinstance(value, np.ndarray)
            into = self._memory(name)[0].view(element.storage, call.shapes[name])
            if call.empty and value.size == 0:
                into[...] = 0
            else:
                encode(value, into, element)
        for name in call.fed:
            pinned, memory = self._own[name]
            cuda.copy(memory.address, pinned.address, self._size(call, name), "to device", stream)
        cuda.record(self._copied, stream)
        self.in_flight = True

    def hand(self, call: Call, hand: Hand) -> None:
        """After `whole`: tokens that are handed over, in place of those that were fed."""
        tokens = self.address(TOKENS)
        self._send(0, {}, *hand.at(tokens), hand)
        if hand.draws:
            hand.fetch(self._stream, tokens, math.prod(call.shapes[TOKENS]))

    # Captured steps.

    def step(self, call: Call) -> Sent:
        """Memory for the feeds of a step that is about to be captured. Raises DeviceMemoryError."""
        names = [name for name in call.fed if name not in KEPT]
        places, size = places_of(names, {name: self._size(call, name) for name in names})
        self._packed(size + _room(math.prod(call.shapes.get(TOKENS, (0,)))))
        kept = {name: Kept(self._stream, call.shapes[name], self._element(name)) for name in call.fed if name in KEPT}
        return Sent(places=places, size=size, kept=kept)

    def differing(self, sent: Sent, call: Call, feeds: Given, hand: Hand | None) -> None:
        """What differs of a step's feeds from what the device holds, and tokens that are handed over."""
        try:
            updates = self._changes(sent, feeds)
            small = {name: feeds[name] for name in sent.places}
            values = {name: (sent.places[name], call.shapes[name], value) for name, value in small.items()}
            if hand is None:
                self._send(sent.size, values, updates, NO_CHOICES, None)  # type: ignore[arg-type]
                return
            tokens = self._packed(0).address + sent.places[TOKENS]
            handed, choices = hand.at(tokens)
            self._send(sent.size, values, np.concatenate([updates, handed]), choices, hand)  # type: ignore[arg-type]
            if hand.draws:
                hand.fetch(self._stream, tokens, math.prod(call.shapes[TOKENS]))
        except BaseException:
            for kept in sent.kept.values():
                kept.forget()
            raise

    def _changes(self, sent: Sent, feeds: Given) -> Updates:
        """Updates of the feeds that stay on the device. Those that differ too much are sent whole."""
        cuda, stream = self._cuda, self._stream.handle
        found, room, whole = [NO_UPDATES], MOST_UPDATES if cuda.step_kernels else 0, []
        for name, kept in sent.kept.items():
            value = feeds[name]
            assert isinstance(value, np.ndarray)
            changes = kept.changes(value, room)
            if changes is None:
                whole.append(name)
            else:
                found.append(changes)
                room -= len(changes)
        if whole:
            self._settle()
            for name in whole:
                kept, pinned = sent.kept[name], self._memory(name)[0]
                pinned.bytes[: kept.nbytes] = kept.whole
                cuda.copy(kept.address, pinned.address, kept.nbytes, "to device", stream)
            cuda.record(self._copied, stream)
            self.in_flight = True
        return np.concatenate(found)

    def _send(
        self,
        start: int,
        small: Mapping[str, tuple[int, tuple[int, ...], Array]],
        updates: Updates,
        choices: Updates,
        hand: Hand | None,
    ) -> None:
        """Small feeds (place, shape, value), and from `start` on updates and choices, in one copy; then the kernels that carry them out."""
        cuda, stream = self._cuda, self._stream.handle
        pack = self._packed(start + updates.nbytes + choices.nbytes)
        block = pack.block()
        for name, (place, shape, value) in small.items():
            element = self._element(name)
            size = math.prod(shape) * element.size
            encode(value, block.bytes[place : place + size].view(element.storage).reshape(shape), element)
        middle = written(block, start, updates)
        pack.send(written(block, middle, choices))
        if len(updates):
            cuda.update(pack.address + start, len(updates), stream)
        if hand is not None and len(choices):
            cuda.choose(pack.address + middle, len(choices), hand.values.address, hand.ids.address, hand.n, stream)

    def _settle(self) -> None:
        """Waits until the pinned blocks of feeds may be filled again."""
        if self.in_flight:
            self._cuda.wait_on_host(self._copied)
            self.in_flight = False

    def _size(self, call: Call, name: str) -> int:
        return math.prod(call.shapes[name]) * self._element(name).size


def _room(branches: int) -> int:
    """Bytes of updates and choices of a step at most."""
    return MOST_UPDATES * UPDATE.itemsize + branches * (UPDATE.itemsize + CHOICE.itemsize)
