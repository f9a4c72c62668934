"""A bundle's tensor, and the recipes by which it is made of a checkpoint's: transposing, joining, folding what no longer changes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from flamingo_export.precision import Precision, Quantisation, StorageType
from flamingo_reference.arrays import Array
from flamingo_reference.config import FeedForward, Norm, RotaryPositions, ViTConfig
from flamingo_reference.contrastive_config import TextConfig

Recipe = Callable[[Sequence[Array]], Array]

# Rows and columns moved at a time: a block of the source and of the target lie in the cache together.
_TRANSPOSED_BLOCK = 64
DISTANCE_BLOCK = 128
"""Distances of a block of the relative positions' table: the part of it that is read grows with the cache in such steps."""

# The definitions are the reference's (vision_nfnet.py), repeated because torch must not be imported here; a test compares them.
GELU_GAIN = 1.7015043497085571
SQUEEZE_EXCITE_GAIN = 2.0
STANDARDISATION_EPS = 1e-5


class Weight(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of the bundle.

    sources: the checkpoint's tensors it is made of, given to `make` in this order; `moves_only` recipes merely transpose and join, so
    they may be applied after rounding to the storage type. `full_precision` tensors stay fp32 whatever the storage. `product`: it is
    the right side of a matrix product and nothing else, so a policy may quantise it.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    sources: tuple[str, ...]
    make: Recipe
    full_precision: bool = False
    moves_only: bool = False
    product: bool = False

    def storage(self, precision: Precision) -> StorageType:
        """Type the tensor is stored in where it is not quantised."""
        return "fp32" if self.full_precision else precision.element(self.name)

    def quantisation(self, precision: Precision) -> Quantisation | None:
        """How the tensor is quantised, if it is. int4 packs outputs in pairs, so it leaves a matrix with an odd number of them as it is."""
        if not self.product:
            return None
        how = precision.quantisation(self.name, self.shape[0])
        return None if how is not None and how.element == "int4" and self.shape[1] % 2 else how

    def operands(self, precision: Precision) -> tuple[str, ...]:
        """Names of the operands of attention that this product makes, where the policy quantises them: the calibration table's keys."""
        policy = precision.policy
        if policy is None:
            return ()
        if policy.attention == "fp8" and self.name.endswith("/self_attention/qkv_proj"):
            return tuple(f"{self.name.removesuffix('qkv_proj')}{part}" for part in "qkv")
        if policy.media == "fp8" and self.name.startswith("media_kv/") and self.name.endswith("_proj"):
            return (self.name.removesuffix("_proj"),)
        return ()


# Recipes. Each takes the source tensors in order.


def transposed(sources: Sequence[Array]) -> Array:
    """Linear weights [out, in] side by side as [in, out + out + ...]. One that lies in memory as [in, out] is returned as it lies."""
    if len(sources) == 1 and sources[0].flags.f_contiguous:
        return sources[0].T
    return _side_by_side(sources)


def _side_by_side(sources: Sequence[Array]) -> Array:
    joined = np.empty((sources[0].shape[1], sum(len(source) for source in sources)), sources[0].dtype)
    start = 0
    for source in sources:
        _write_transposed(source, joined[:, start : start + len(source)])
        start += len(source)
    return joined


def _write_transposed(source: Array, target: Array) -> None:
    """target = source.T, block by block: three times as fast as numpy's own walk over a large matrix."""
    if source.flags.f_contiguous:
        target[:] = source.T
        return
    rows, columns = source.shape
    for top in range(0, rows, _TRANSPOSED_BLOCK):
        for left in range(0, columns, _TRANSPOSED_BLOCK):
            block = source[top : top + _TRANSPOSED_BLOCK, left : left + _TRANSPOSED_BLOCK]
            target[left : left + _TRANSPOSED_BLOCK, top : top + _TRANSPOSED_BLOCK] = block.T


def as_is(sources: Sequence[Array]) -> Array:
    """The tensor itself."""
    return sources[0]


def gated_transposed(sources: Sequence[Array]) -> Array:
    """Output projection [out, in] times tanh(gate), as [in, out]: sign and zero of the gate live in the weights."""
    weight, gate = sources
    moved = _side_by_side([weight.astype(np.float32, copy=False)])
    moved *= np.float32(np.tanh(np.float64(gate)))
    return moved


def gated(sources: Sequence[Array]) -> Array:
    """A tensor times tanh(gate)."""
    tensor, gate = sources
    product: Array = tensor.astype(np.float32)
    product *= np.float32(np.tanh(np.float64(gate)))
    return product


def standardised(sources: Sequence[Array], *, scale: float) -> Array:
    """The kernels that NFNet's convolution applies, times the gain of the activation before it."""
    weight, gain = (source.astype(np.float64) for source in sources)
    fan_in = math.prod(weight.shape[1:])
    mean = weight.mean(axis=(1, 2, 3), keepdims=True)
    variance = weight.var(axis=(1, 2, 3), keepdims=True)
    standardised: Array = (weight - mean) * (scale * gain / np.sqrt(fan_in * (variance + STANDARDISATION_EPS)))
    return standardised


def branch_scale(sources: Sequence[Array], *, alpha: float) -> Array:
    """What NFNet multiplies a branch with, the gain of its squeeze-excite included: [1]."""
    return (sources[0].astype(np.float64) * (alpha * SQUEEZE_EXCITE_GAIN)).reshape(1)


def distance_blocks(num_distances: int) -> int:
    """Blocks of DISTANCE_BLOCK that hold this many distances, the last one padded."""
    return -(-num_distances // DISTANCE_BLOCK)


def distances(sources: Sequence[Array], *, num_distances: int, num_heads: int) -> Array:
    """relative_proj @ sinusoid(distance), scaled like attention scores: [H, D, blocks, DISTANCE_BLOCK], padded with the last."""
    weight = sources[0].astype(np.float32, copy=False)
    inner, width = weight.shape
    head_size, blocks = inner // num_heads, distance_blocks(num_distances)
    table = weight @ _sinusoids(num_distances, width).T
    table *= np.float32(head_size**-0.5)
    return table.reshape(num_heads, head_size, blocks, DISTANCE_BLOCK)


@functools.lru_cache(maxsize=1)
def _sinusoids(num_distances: int, width: int) -> Array:
    """Transformer-XL's encoding of the table's distances [blocks * DISTANCE_BLOCK, width]; all layers have the same."""
    frequency = 10000.0 ** (-np.arange(0, width, 2) / width)
    angle = np.minimum(np.arange(distance_blocks(num_distances) * DISTANCE_BLOCK), num_distances - 1)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def head_bias(sources: Sequence[Array]) -> Array:
    """[H, D] -> [H, 1, D], to be added to queries [B, H, S, D]."""
    return sources[0][:, None, :]


def joined(sources: Sequence[Array]) -> Array:
    """Vectors one after the other."""
    return np.concatenate(sources)


def rotary_table(
    _: Sequence[Array], *, positions: RotaryPositions, num_positions: int, function: Callable[[Array], Array]
) -> Array:
    """Cosines or sines of the angle of each position and turned pair of channels: [num_positions, size / 2]."""
    half = positions.size // 2
    frequency = positions.base ** (-np.arange(half) / half)
    if (rates := positions.rates()) is not None:
        frequency = frequency * np.array(rates)
    return function(np.arange(num_positions)[:, None] * frequency)


# Weights of the usual layers. `name` is the bundle's, `source` the checkpoint's.


def linear(name: str, shape: tuple[int, int], group: str, *sources: str) -> Weight:
    """One matrix [in, out], or several side by side."""
    return Weight(name=name, shape=shape, group=group, sources=sources, make=transposed, moves_only=True, product=True)


def linear_bias(name: str, width: int, group: str, *sources: str) -> Weight:
    """The biases that go with `linear`, named after it."""
    return Weight(name=f"{name}.bias", shape=(width,), group=group, sources=sources, make=joined, full_precision=True)


def plain(name: str, shape: tuple[int, ...], group: str, source: str) -> Weight:
    """A tensor as it is, in full precision: small, and its rounding would be felt."""
    return Weight(name=name, shape=shape, group=group, sources=(source,), make=as_is, full_precision=True)


def norm(name: str, width: int, group: str, source: str, *, kind: Norm = "layer_norm", bias: bool = True) -> Iterator[Weight]:
    """Scale of a norm, and bias of a LayerNorm that has one."""
    yield plain(f"{name}/weight", (width,), group, f"{source}.weight")
    if kind == "layer_norm" and bias:
        yield plain(f"{name}/bias", (width,), group, f"{source}.bias")


def feed_forward_up(
    name: str, source: str, group: str, width: int, inner: int, kind: FeedForward, *, bias: bool = False
) -> Iterator[Weight]:
    """What goes into the activation: for swiglu both of its projections, the one under the swish first."""
    parts = [f"{source}.{part}" for part in (("ffw_swish", "ffw_up") if kind == "swiglu" else ("ffw_up",))]
    yield linear(f"{name}/ffw_up", (width, inner * len(parts)), group, *(f"{part}.weight" for part in parts))
    if bias:
        yield linear_bias(f"{name}/ffw_up", inner * len(parts), group, *(f"{part}.bias" for part in parts))


def encoder_layer(name: str, source: str, group: str, config: ViTConfig | TextConfig) -> Iterator[Weight]:
    """One layer of CLIP's image or text transformer."""
    width = config.width
    qkv = [f"{source}.{part}_proj" for part in "qkv"]
    yield from norm(f"{name}/attention_norm", width, group, f"{source}.attention_norm")
    yield linear(f"{name}/qkv_proj", (width, 3 * width), group, *(f"{part}.weight" for part in qkv))
    yield linear_bias(f"{name}/qkv_proj", 3 * width, group, *(f"{part}.bias" for part in qkv))
    yield linear(f"{name}/out_proj", (width, width), group, f"{source}.out_proj.weight")
    yield linear_bias(f"{name}/out_proj", width, group, f"{source}.out_proj.bias")
    yield from norm(f"{name}/ffw_norm", width, group, f"{source}.ffw_norm")
    yield from feed_forward_up(name, source, group, width, config.ffw_width, config.activation, bias=True)
    yield linear(f"{name}/ffw_down", (config.ffw_width, width), group, f"{source}.ffw_down.weight")
    yield linear_bias(f"{name}/ffw_down", width, group, f"{source}.ffw_down.bias")
