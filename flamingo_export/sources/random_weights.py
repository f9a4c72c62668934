"""Seeded random weights: a model of the right size and sane activations, for measuring and for proving parity, not for captions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import msgspec
import numpy as np

from flamingo_export.bundle.manifest import SourceRecord
from flamingo_export.errors import CheckpointError
from flamingo_reference.arrays import Array
from flamingo_reference.config import ConfigError, ModelConfig
from flamingo_reference.input_format import PAPER
from flamingo_reference.names import expected_tensors

# Bumped whenever other numbers are drawn for the same seed.
RECIPE = 1
# Numbers drawn and scaled at a time: they stay in the processor's cache.
_BLOCK = 1 << 16


class RandomSource:
    """Weights in the sizes of a config, drawn uniformly.

    Each tensor has a generator of its own, seeded by (seed, name), so the order of reading does not matter. Scales keep activations sane;
    gates and NFNet's skip gains are drawn too, so that no part of the model is silent.
    """

    tokenizer = None
    text_tokenizer = None
    golden = None
    notes: tuple[str, ...] = ()
    inputs = PAPER
    digested = False

    def __init__(self, config: ModelConfig, seed: int) -> None:
        """Raises CheckpointError if the config cannot be built."""
        try:
            config.validate()
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        self.config, self.seed = config, seed
        self._shapes = expected_tensors(config)
        digest = hashlib.sha256(msgspec.json.encode([RECIPE, seed, self._shapes])).hexdigest()
        self.identity = f"random {digest}"

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str) -> Array:
        """Draws a tensor: float32. Linear weights lie in memory as the bundle stores them, [in, out]."""
        shape = self._shapes[name]
        centre, deviation = _centre_and_deviation(name, shape)
        values = draw([self.seed, *hashlib.sha256(name.encode()).digest()], math.prod(shape), deviation)
        if centre:
            values += np.float32(centre)
        return values.reshape(shape[::-1]).T if _is_linear(name, shape) else values.reshape(shape)

    def record(self, digests: Mapping[str, str]) -> SourceRecord:
        """Kind and seed; the digest is that of what the numbers follow from."""
        return SourceRecord(kind="random", seed=self.seed, sha256=self.identity.split()[1])


def draw(seed: list[int], count: int, deviation: float) -> Array:
    """`count` float32 numbers, uniform around 0 with this standard deviation. Several times as fast as normal ones."""
    random = np.random.Generator(np.random.SFC64(seed))
    values = np.empty(count, np.float32)
    width = np.float32(deviation * math.sqrt(12.0))
    for start in range(0, count, _BLOCK):
        block = values[start : start + _BLOCK]
        random.random(out=block, dtype=np.float32)
        block -= np.float32(0.5)
        block *= width
    return values


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith("weight") and not name.endswith("embedding.weight")


def _centre_and_deviation(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    last = name.rsplit(".", 1)[-1]
    if last == "gain" or (last == "weight" and len(shape) == 1):
        return 1.0, 0.1
    if last in ("attention_gate", "ffw_gate", "skip_gain"):
        return 0.5, 0.2
    if last in ("bias", "content_bias", "position_bias"):
        return 0.0, 0.1
    if last in ("latents", "time_embeddings"):
        return 0.0, 1.0
    return 0.0, math.prod(shape[1:]) ** -0.5
