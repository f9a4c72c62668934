"""Subgraphs that compute nothing and take their time on a virtual clock: the engine around them is the real one.

The engine schedules, joins, copies, shares and pads as it does on a backend; what each call would cost follows from its shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from flamingo_export.backends.base import Buffer, HostSession, Tensor
from flamingo_export.deploy.capacity.costs import StepCosts
from flamingo_export.runtime.subgraphs import Engines
from flamingo_export.specs import SubgraphSpec, TensorSpec
from flamingo_reference.arrays import Array


class Clock:
    """Seconds that have passed in the simulation, and on what.

    spent: seconds by what they were spent on: decode, prefill, encode, copy.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.spent: Counter[str] = Counter()

    def __call__(self) -> float:
        return self.now

    def spend(self, kind: str, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.spent[kind] += seconds  # type: ignore[assignment]  # a Counter adds up any number


class _Nothing:
    """A buffer of which only the shape exists."""

    def __init__(self, shape: tuple[int, ...], clock: Clock, copy_slot: float) -> None:
        self.shape, self._clock, self._copy_slot = shape, clock, copy_slot
        self._views: dict[tuple[int, int], _Nothing] = {}

    @property
    def nbytes(self) -> int:
        return 0

    def write(self, index: int, value: Tensor) -> None:
        pass

    def publish(self) -> None:
        pass

    def read(self) -> Array:
        return np.zeros(self.shape, np.float32)

    def copy_from(self, other: Buffer) -> None:
        pass

    def rows(self, first: int, count: int) -> Buffer:
        if (first, count) not in self._views:
            self._views[first, count] = _Nothing((count, *self.shape[1:]), self._clock, self._copy_slot)
        return self._views[first, count]

    def copy_slots(self, source: int, target: int, count: int) -> None:
        self._clock.spend("copy", count * self._copy_slot)

    def view(self, shape: tuple[int, ...]) -> Buffer:
        return _Nothing(shape, self._clock, self._copy_slot)


class _Session(HostSession):
    def __init__(self, spec: SubgraphSpec, clock: Clock, costs: StepCosts) -> None:
        self.spec = spec
        self._clock, self._costs = clock, costs

    def allocate(self, name: str, shape: tuple[int, ...]) -> Buffer:
        return _Nothing(shape, self._clock, self._costs.copy_slot)

    def bind(self, name: str, buffer: Buffer) -> None:
        pass

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class _Decoder(_Session):
    def __init__(self, clock: Clock, costs: StepCosts) -> None:
        spec = SubgraphSpec(
            name="decoder",
            inputs=(
                *(TensorSpec(name, "int64", ("B", "S")) for name in ("token_ids", "positions", "phi")),
                TensorSpec("media_rows", "int64", ("B", "M")),
                TensorSpec("write_index", "int64", ("B",)),
                TensorSpec("mask", "bool", ("B", 1, "S", "C")),
                TensorSpec("logit_positions", "int64", ("B", "K")),
                TensorSpec("media_k.0", "float", ("N", 1, 1, 1)),
                TensorSpec("past_k.0", "float", ("B", 1, "C", 1)),
            ),
            outputs=(TensorSpec("logits", "float", ("B", "K", 1)), TensorSpec("present_k.0", "float", ("B", 1, "C", 1))),
            aliases={"present_k.0": "past_k.0"},
        )
        super().__init__(spec, clock, costs)
        if costs.fixed_capacity:
            self.largest = {"C": costs.limits.max_length, "M": costs.limits.chunk_media}

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        batch, size = feeds["token_ids"].shape
        wanted = feeds["logit_positions"].shape[1]
        slots = feeds["mask"].shape[-1]
        if self._costs.fixed_capacity:
            slots = int(np.asarray(feeds["write_index"]).max()) + size
        if wanted == size:  # a step wants logits of every position, a chunk of a prompt of the last one at most
            self._clock.spend("decode", self._costs.decoding(batch, size, slots))
        else:
            self._clock.spend("prefill", self._costs.prefilling(size, slots))
        return {"logits": np.zeros((batch, wanted, 1), np.float32)}


class _VisionEncoder(_Session):
    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        frames = feeds["pixels"].shape[0]
        self._clock.spend("encode", self._costs.encoding(frames))
        return {"features": np.zeros((frames, 1, 1), np.float32)}


class _Passed(_Session):
    """Its cost is in the vision encoder's."""

    def run(self, feeds: Mapping[str, Tensor], outputs: Collection[str] | None = None) -> dict[str, Array]:
        media = next(iter(feeds.values())).shape[0]
        return {self.spec.outputs[0].name: np.zeros((media, 1, 1, 1), np.float32)}


def stand_ins(costs: StepCosts, clock: Clock) -> Engines:
    """The four subgraphs of a model that takes as long as `costs` says, on `clock`."""

    def spec(name: str, output: str) -> SubgraphSpec:
        return SubgraphSpec(name=name, inputs=(), outputs=(TensorSpec(output, "float", ("N", 1, 1, 1)),))

    encoder = _VisionEncoder(spec("vision_encoder", "features"), clock, costs)
    encoder.largest = {"F": costs.frames[-1]}
    return Engines(
        vision_encoder=encoder,
        resampler=_Passed(spec("resampler", "latents"), clock, costs),
        media_kv=_Passed(spec("media_kv", "media_k.0"), clock, costs),
        decoder=_Decoder(clock, costs),
    )
