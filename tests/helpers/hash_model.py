"""A stand-in for a model whose logits are integer hashes of exactly what each position sees: ids, positions, media, and what those had seen.

It is exact, so an engine that shows a branch one slot too many, or a neighbour's medium, gives other numbers, and one that does not gives
the same to the last bit. `Whole` computes the same of whole sequences: no cache, no bank, no batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from flamingo_export.runtime.candidates import candidates_of
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.specs import SubgraphSpec, TensorSpec

VOCAB = 70
_MASK = (1 << 64) - 1


def mixed(*values: int) -> int:
    """A hash of integers (the finaliser of SplitMix64, over a running sum)."""
    found = 0x9E3779B97F4A7C15
    for value in values:
        found = ((found ^ (value & _MASK)) * 0xBF58476D1CE4E5B9) & _MASK
        found ^= found >> 29
    return found


@functools.lru_cache(1 << 20)
def contribution(position: int, value: int) -> int:
    """What a seen slot adds to what a position knows."""
    return mixed(position, value, 7)


def logits_of(known: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits [V] of a position that knows this much. Two `<EOC>`s in seven: texts end early and late."""
    numbers = np.arange(VOCAB, dtype=np.uint64)
    bits = (np.uint64(known) ^ (numbers * np.uint64(0x94D049BB133111EB))) * np.uint64(0xBF58476D1CE4E5B9)
    logits = ((bits >> np.uint64(40)) & np.uint64(1023)).astype(np.float32) / np.float32(128)
    if known % 7 < 2:
        logits[2] += 6
    return logits


def sight(numbers: Sequence[int]) -> int:
    """What a position sees that looks at media of these numbers, in order: 0 for none, the number of one."""
    return mixed(*numbers) if len(numbers) > 1 else sum(numbers)


class Whole:
    """Logits after a sequence, a token at a time."""

    def __init__(self, image: int, reset: int | None, *, groups: bool = False) -> None:
        """groups: images that stand side by side are seen together."""
        self._image, self._reset, self._groups = image, reset, groups

    def begin(self, ids: Sequence[int], media: Sequence[Sequence[int]]) -> tuple[int, int, int]:
        """(position, what is known, what is seen) after a prompt; media: of each of its images in order, the numbers of its tiles."""
        state = (0, 0, 0)
        left = iter(media)
        group: list[int] = []
        before: int | None = None
        for token in ids:
            if token == self._image:
                group = [*(group if self._groups and before == self._image else []), *next(left)]
                state = (state[0], state[1], sight(group))
            state = self.extend(state, token)
            before = token
        return state

    def extend(self, state: tuple[int, int, int], token: int) -> tuple[int, int, int]:
        """After one more token."""
        position, known, medium = state
        value = mixed(token, position, medium, known)
        known = (known + contribution(position, value)) & _MASK
        return position + 1, known, 0 if token == self._reset else medium


class ArrayBuffer:
    """A buffer in host memory."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def write(self, index: int, value: Any) -> None:
        self.array[index] = value

    def publish(self) -> None:
        pass

    def read(self) -> np.ndarray[Any, Any]:
        return self.array.copy()

    def copy_from(self, other: Any) -> None:
        self.array[tuple(slice(size) for size in other.shape)] = other.array

    def rows(self, first: int, count: int) -> ArrayBuffer:
        assert 0 <= first < first + count <= len(self.array)
        return ArrayBuffer(self.array[first : first + count])

    def copy_slots(self, source: int, target: int, slots: int) -> None:
        self.array[target, :, :slots] = self.array[source, :, :slots]

    def view(self, shape: tuple[int, ...]) -> ArrayBuffer:
        raise AssertionError("no parts here")


class HashSession:
    """What the stand-ins have in common."""

    asynchronous = False

    def __init__(self, spec: SubgraphSpec, largest: Mapping[str, int], *, reads_bound_media: bool = False) -> None:
        self.spec, self.largest, self.reads_bound_media = spec, largest, reads_bound_media
        self.bound: dict[str, ArrayBuffer] = {}

    def allocate(self, name: str, shape: tuple[int, ...]) -> ArrayBuffer:
        return ArrayBuffer(np.full(shape, 0xDEAD, np.uint64))

    def bind(self, name: str, buffer: ArrayBuffer) -> None:
        self.bound[name] = buffer

    def run(self, feeds: Mapping[str, Any], outputs: Collection[str] | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def compute(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.run(feeds)

    def close(self) -> None:
        pass


class HashDecoder(HashSession):
    """One layer: past_k.0 [B, 1, C, 1] holds the value of each slot, media_k.0 [N, 1, 1, 1] the number of each medium."""

    def __init__(self, largest: Mapping[str, int], *, reads_bound_media: bool) -> None:
        inputs = [("token_ids", "BS"), ("positions", "BS"), ("media_rows", "BM"), ("phi", "BS"), ("first_media", "BS")]
        inputs += [("write_index", "B"), ("key_positions", "BC"), ("logit_positions", "BK")]
        spec = SubgraphSpec(
            name="decoder",
            inputs=(
                *(TensorSpec(name, "int64", tuple(shape)) for name, shape in inputs),
                TensorSpec("mask", "bool", ("B", 1, "S", "C")),
                TensorSpec("media_k.0", "float", ("N", 1, 1, 1)),
                TensorSpec("past_k.0", "float", ("B", 1, "C", 1)),
            ),
            outputs=(TensorSpec("logits", "float", ("B", "K", VOCAB)), TensorSpec("present_k.0", "float", ("B", 1, "C", 1))),
            aliases={"present_k.0": "past_k.0"},
        )
        super().__init__(spec, largest, reads_bound_media=reads_bound_media)

    def run(self, feeds: Mapping[str, Any], outputs: Collection[str] | None = None) -> dict[str, Any]:
        looked_at: set[int] = set()
        cache, bank = self.bound["past_k.0"].array, self.bound["media_k.0"].array
        batch, size = feeds["token_ids"].shape
        capacity = feeds["mask"].shape[-1]
        assert cache.shape[::2] == (batch, capacity)
        assert feeds["media_rows"].shape[1] <= self.largest.get("M", 99)
        assert (feeds["write_index"] >= 0).all()
        assert (feeds["write_index"] + size <= capacity).all(), "written past the cache"
        known = np.zeros((batch, size), np.uint64)
        for row in range(batch):
            for place in range(size):
                mask, own = feeds["mask"][row, 0, place], int(feeds["write_index"][row]) + place
                assert mask[own], "a position sees its own slot"
                seen = 0
                for slot in np.flatnonzero(mask).tolist():
                    if slot != own:
                        seen += contribution(int(feeds["key_positions"][row, slot]), int(cache[row, 0, slot, 0]))
                phi, first = int(feeds["phi"][row, place]), int(feeds["first_media"][row, place])
                assert phi == 0 or 1 <= first <= phi
                rows = feeds["media_rows"][row, first - 1 : phi].tolist() if phi else []
                assert len(rows) == (phi - first + 1 if phi else 0)
                looked_at.update(rows)
                medium = sight([int(bank[media_row, 0, 0, 0]) for media_row in rows])
                position = int(feeds["positions"][row, place])
                value = mixed(int(feeds["token_ids"][row, place]), position, medium, seen & _MASK)
                cache[row, 0, own, 0] = value
                known[row, place] = (seen + contribution(int(feeds["key_positions"][row, own]), value)) & _MASK
        if self.reads_bound_media:
            assert len(bank) <= max(1, 1.5 * len(looked_at)), "more is bound than is looked at"
        wanted = feeds["logit_positions"]
        logits = np.zeros((batch, wanted.shape[1], VOCAB), np.float32)
        for row, places in enumerate(wanted.tolist()):
            for index, place in enumerate(places):
                logits[row, index] = logits_of(int(known[row, place]))
        return {"logits": logits}


class FlushingBuffer(ArrayBuffer):
    """A buffer of a decoder that has not done all it was asked: that is done before anybody looks."""

    def __init__(self, array: np.ndarray[Any, Any], flush: Callable[[], None]) -> None:
        super().__init__(array)
        self._flush = flush

    def write(self, index: int, value: Any) -> None:
        self._flush()
        super().write(index, value)

    def copy_from(self, other: Any) -> None:
        self._flush()
        super().copy_from(other)

    def copy_slots(self, source: int, target: int, slots: int) -> None:
        self._flush()
        super().copy_slots(source, target, slots)

    def rows(self, first: int, count: int) -> FlushingBuffer:
        return FlushingBuffer(super().rows(first, count).array, self._flush)


class AheadRun:
    """A step that the stand-in was asked for: done when somebody waits for it or for a later one."""

    def __init__(self, work: Callable[[], tuple[Any, dict[str, Any]]], until: Callable[[AheadRun], None]) -> None:
        self._work, self._until = work, until
        self.found: tuple[Any, dict[str, Any]] | None = None
        self.drawn = False

    def do(self) -> None:
        self.found = self._work()

    def tokens(self) -> Any:
        if not self.drawn:
            return None
        self._until(self)
        assert self.found is not None
        return self.found[0]

    def result(self) -> dict[str, Any]:
        self._until(self)
        assert self.found is not None
        return self.found[1]


class AheadHashDecoder(HashDecoder):
    """One that finds candidates itself and takes a step's tokens of the step before. Every `slips`th draw is another than the host's."""

    runs_ahead = True

    def __init__(
        self, largest: Mapping[str, int], *, reads_bound_media: bool, banned: int = 3, count: int = 5, slips: int = 0
    ) -> None:
        super().__init__(largest, reads_bound_media=reads_bound_media)
        shapes = {
            "top_values": ("fp32", ("B", "K", count)),
            "top_ids": ("int64", ("B", "K", count)),
            "log_sum_exp": ("fp32", ("B", "K")),
        }
        added = tuple(TensorSpec(name, kind, shape) for name, (kind, shape) in shapes.items())  # type: ignore[arg-type]
        self.spec = msgspec.structs.replace(self.spec, outputs=(*self.spec.outputs, *added))
        self._banned, self._count, self._slips, self._draws = banned, count, slips, 0
        self._asked: list[AheadRun] = []
        self._last: dict[str, Any] = {}
        self.log: list[str] = []
        """What was asked and read, in order."""

    def allocate(self, name: str, shape: tuple[int, ...]) -> FlushingBuffer:
        return FlushingBuffer(super().allocate(name, shape).array, self._flush)

    def _flush(self) -> None:
        while self._asked:
            self._asked.pop(0).do()

    def _until(self, run: AheadRun) -> None:
        while run.found is None:
            self._asked.pop(0).do()

    def run(self, feeds: Mapping[str, Any], outputs: Collection[str] | None = None) -> dict[str, Any]:
        self._flush()
        return self._run(feeds, outputs)

    def _run(self, feeds: Mapping[str, Any], outputs: Collection[str] | None) -> dict[str, Any]:
        logits = super().run(feeds)["logits"]
        if outputs is None or "logits" in outputs:
            return {"logits": logits}
        batch, wanted, size = logits.shape
        if not wanted:
            nothing = np.zeros((batch, 0, self._count), np.float32)
            return {"top_ids": nothing.astype(np.int64), "top_values": nothing, "log_sum_exp": nothing[..., 0]}
        found = candidates_of(logits.reshape(batch * wanted, size), self._banned, self._count)
        self._last = {"ids": found.ids, "values": found.values}
        shape = (batch, wanted, self._count)
        return {
            "top_ids": found.ids.reshape(shape),
            "top_values": found.values.reshape(shape),
            "log_sum_exp": found.log_sum_exp.reshape(batch, wanted),
        }

    def start(self, feeds: Mapping[str, Any], outputs: Collection[str] | None = None, handed: Any = None) -> AheadRun:
        assert len(self._asked) < 2, "more than one step ahead"
        given, bound = {name: np.array(value) for name, value in feeds.items()}, dict(self.bound)
        self.log.append("asked")

        def work() -> tuple[Any, dict[str, Any]]:
            if handed is not None:
                for place in zip(*np.nonzero(handed.source >= 0), strict=True):
                    given["token_ids"][place] = self._taken(int(handed.source[place]), handed.draws, place)
            now, self.bound = self.bound, bound
            try:
                return given["token_ids"], self._run(given, outputs)
            finally:
                self.bound = now

        run = AheadRun(work, self._until)
        run.drawn = handed is not None and handed.draws is not None
        self._asked.append(run)
        return run

    def _taken(self, branch: int, draws: Any, place: tuple[int, int]) -> int:
        ids, values = self._last["ids"][branch], self._last["values"][branch]
        if draws is None or not draws.temperature[place]:
            return int(ids[0])
        self._draws += 1
        if self._slips and self._draws % self._slips == 0:
            return int(ids[-1])
        weights = np.exp((values[: draws.top_k[place]].astype(np.float64) - values[0]) / draws.temperature[place])
        weights /= weights.sum()
        if draws.top_p[place]:
            weights = weights[: int(np.searchsorted(np.cumsum(weights), draws.top_p[place])) + 1]
        mass = np.cumsum(weights)
        return int(ids[np.searchsorted(mass, draws.uniform[place] * mass[-1], side="right")])


class First(HashSession):
    """Passes on what it is given: pixels are a medium's number all over."""

    def __init__(self, given: str, result: str, largest: Mapping[str, int]) -> None:
        """Tiles are the second axis of pixels [1, Tmax, 1], each with a number of its own."""
        super().__init__(SubgraphSpec(name=given, inputs=(), outputs=()), largest)
        self._given, self._result = given, result

    def run(self, feeds: Mapping[str, Any], outputs: Collection[str] | None = None) -> dict[str, Any]:
        value = feeds[self._given]
        if "aspect_ratio_ids" in feeds:
            return {self._result: value.reshape(1, -1, 1, 1).astype(np.uint64)}
        return {self._result: value.reshape(len(value), -1).max(axis=1).reshape(-1, 1, 1, 1).astype(np.uint64)}


def hash_engines(largest: Mapping[str, int], *, reads_bound_media: bool = False, decoder: HashDecoder | None = None) -> Engines:
    """The stand-ins of all four subgraphs; largest: bounds of the decoder, unless one is given. reads_bound_media: it wants no rows bound but
    those looked at."""
    sessions: dict[str, Any] = {
        "vision_encoder": First("pixels", "features", {}),
        "resampler": First("features", "latents", {}),
        "media_kv": First("latents", "media_k.0", {}),
        "decoder": decoder or HashDecoder(largest, reads_bound_media=reads_bound_media),
    }
    return Engines(**sessions)
