"""How the decoder is cut into parts: between LM layers, so that the largest part, by bytes of weights read, is as small as possible.

decoder.0       embedding, LM layers 0 .. a - 1, each with the gated block before it
decoder.1                  LM layers a .. b - 1
decoder.2                  LM layers b .. L - 1, norm, output (the embedding once more, where the two are one)
"""

from __future__ import annotations

from collections.abc import Mapping

from flamingo_export.bundle.manifest import GraphRecord
from flamingo_export.errors import BuildError
from flamingo_export.specs import SUBGRAPHS, towers_of
from flamingo_reference.config import ModelConfig


def graph_records(config: ModelConfig, sizes: Mapping[str, int], parts: int) -> tuple[GraphRecord, ...]:
    """The graphs of a bundle whose decoder is in `parts` parts: `decoder`, or `decoder.0`, `decoder.1` and so on.

    sizes: bytes of each of the bundle's weights by name. Raises BuildError unless there are 1 to num_layers parts.
    """
    others = (*(name for name in SUBGRAPHS if name != "decoder"), *towers_of(config))
    records = [GraphRecord(name=name, file=f"{name}.onnx") for name in others]
    for number, layers in enumerate(cut(config, sizes, parts)):
        name = "decoder" if parts == 1 else f"decoder.{number}"
        records.append(GraphRecord(name=name, file=f"{name}.onnx", layers=(layers.start, layers.stop)))
    return tuple(records)


def check_parts(config: ModelConfig, parts: int) -> None:
    """Raises BuildError unless the decoder can be cut into so many parts."""
    layers = config.language_model.num_layers
    if not 1 <= parts <= layers:
        raise BuildError(
            f"the decoder cannot be cut into {parts} parts: it is cut between LM layers, and {config.name} has {layers} of them. "
            f"Choose --parts from 1 to {layers}."
        )


def cut(config: ModelConfig, sizes: Mapping[str, int], parts: int) -> tuple[range, ...]:
    """LM layers of each part, in order; the largest part is the smallest possible. Raises BuildError as `check_parts` does."""
    check_parts(config, parts)
    count = config.language_model.num_layers
    weigh = _Scale(config, sizes)
    # best[stop]: (bytes of the largest part, sum of squares, where each part begins) of the layers before `stop`, in the parts so far.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for part in range(1, parts + 1):
        longer = {}
        for stop in range(part, count - (parts - part) + 1):
            options = []
            for start, (largest, squares, begins) in best.items():
                if start < stop:
                    size = weigh(range(start, stop))
                    options.append((max(largest, size), squares + size**2, (*begins, start)))
            longer[stop] = min(options)
        best = longer
    begins = best[count][2]
    return tuple(range(start, stop) for start, stop in zip(begins, (*begins[1:], count), strict=True))


def graph_bytes(config: ModelConfig, sizes: Mapping[str, int], graph: GraphRecord) -> int:
    """Bytes of the weights that a graph reads."""
    if graph.layers is not None:
        return _Scale(config, sizes)(range(*graph.layers))
    return sum(size for name, size in sizes.items() if name.split("/", 1)[0] == graph.name)


def fewest_parts(config: ModelConfig, sizes: Mapping[str, int], most: int) -> int | None:
    """The fewest parts of which none reads more than `most` bytes of weights; None where a single LM layer does."""
    count, weigh = config.language_model.num_layers, _Scale(config, sizes)
    parts = start = 0
    while start < count:
        stop = start
        while stop < count and weigh(range(start, stop + 1)) <= most:
            stop += 1
        if stop == start:
            return None
        parts, start = parts + 1, stop
    return parts


class _Scale:
    """Bytes of the decoder's weights by the layers that read them."""

    def __init__(self, config: ModelConfig, sizes: Mapping[str, int]) -> None:
        self._count = config.language_model.num_layers
        self._upto = [0] * (self._count + 1)
        """Bytes of the layers before each, after all have been added up."""
        self._first = self._last = self._every = 0
        for name, size in sizes.items():
            component, _, rest = name.partition("/")
            if component != "decoder":
                continue
            place = rest.split("/", 1)[0]
            if place.startswith("layer."):
                self._upto[int(place.removeprefix("layer.")) + 1] += size
            elif place == "embedding":
                self._first += size
                self._last += size if config.language_model.tied_head else 0
            elif place.startswith("rotary_"):
                self._every += size
            else:
                self._last += size
        for layer in range(self._count):
            self._upto[layer + 1] += self._upto[layer]
        self._shared = self._first if config.language_model.tied_head else 0

    def __call__(self, layers: range) -> int:
        size = self._every + self._upto[layers.stop] - self._upto[layers.start]
        first, last = layers.start == 0, layers.stop == self._count
        size += self._first if first else 0
        size += self._last if last else 0
        return size - self._shared if first and last else size  # the whole decoder reads a shared embedding once
