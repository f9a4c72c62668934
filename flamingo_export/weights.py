"""From a checkpoint's tensors to the bundle's: names, shapes, where each comes from and where it is stored.

A bundle's matrices are [in, out]; what is constant once training is over is folded: NFNet's standardised kernels and activation gains,
tanh of the gates into the output projections, Transformer-XL's projected distances. `layout` says where each tensor lies in its
safetensors file before a byte of it is written, so graphs can be built, and builds planned, without the weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.precision import Precision, StorageType
from flamingo_reference.checkpoints.native import needs_downsample, open_header, squeeze_width
from flamingo_reference.config import ModelConfig

Array = npt.NDArray[Any]
Recipe = Callable[[Sequence[Array]], Array]

STORAGE_DTYPES: Mapping[StorageType, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_SAFETENSORS_NAMES: Mapping[StorageType, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
WEIGHTS_FOLDER = "weights"
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
    they may be applied after rounding to the storage type. `full_precision` tensors stay fp32 whatever the storage.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    sources: tuple[str, ...]
    make: Recipe
    full_precision: bool = False
    moves_only: bool = False

    def storage(self, precision: Precision) -> StorageType:
        """Type the tensor is stored in."""
        return "fp32" if self.full_precision else precision.storage


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies: file relative to the bundle, byte offset and length in it."""

    file: str
    offset: int
    length: int
    storage: StorageType
    shape: tuple[int, ...]


def bundle_weights(config: ModelConfig) -> list[Weight]:
    """Every tensor of the bundle, group by group. A group is one safetensors file, the unit of resuming a build."""
    return [*_vision_encoder(config), *_resampler(config), *_media_kv(config), *_decoder(config)]


def groups(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Weights by group, in order."""
    grouped: dict[str, list[Weight]] = {}
    for weight in weights:
        grouped.setdefault(weight.group, []).append(weight)
    return grouped


def group_file(group: str) -> str:
    """Path of a group's file in the bundle."""
    return f"{WEIGHTS_FOLDER}/{group}.safetensors"


def layout(weights: Sequence[Weight], precision: Precision) -> tuple[bytes, dict[str, Placed]]:
    """Header of a group's safetensors file, and where each tensor will lie in it. Tensor data follow in the order given."""
    entries: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    start = 0
    for weight in weights:
        storage = weight.storage(precision)
        stop = start + math.prod(weight.shape) * np.dtype(STORAGE_DTYPES[storage]).itemsize
        entries[weight.name] = {
            "dtype": _SAFETENSORS_NAMES[storage],
            "shape": list(weight.shape),
            "data_offsets": [start, stop],
        }
        spans[weight.name] = (start, stop)
        start = stop
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 64)  # tensor data begin on a cache line
    header = len(text).to_bytes(8, "little") + text
    placed = {
        weight.name: Placed(
            file=group_file(weight.group),
            offset=len(header) + spans[weight.name][0],
            length=spans[weight.name][1] - spans[weight.name][0],
            storage=weight.storage(precision),
            shape=weight.shape,
        )
        for weight in weights
    }
    return header, placed


class WeightIndex:
    """Where every tensor of a bundle lies."""

    def __init__(self, placed: Mapping[str, Placed]) -> None:
        self._placed = dict(placed)

    @classmethod
    def planned(cls, config: ModelConfig, precision: Precision) -> WeightIndex:
        """The index of a bundle that need not exist yet."""
        placed: dict[str, Placed] = {}
        for members in groups(bundle_weights(config)).values():
            placed |= layout(members, precision)[1]
        return cls(placed)

    @classmethod
    def read(cls, bundle: Path) -> WeightIndex:
        """The index of a bundle folder, from its files' headers. Raises CheckpointError if one is cut short or malformed."""
        storages: dict[str, StorageType] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        placed = {}
        for path in sorted((bundle / WEIGHTS_FOLDER).glob("*.safetensors")):
            for name, entry in open_header(path).items():
                placed[name] = Placed(
                    file=f"{WEIGHTS_FOLDER}/{path.name}",
                    offset=entry.start,
                    length=entry.size,
                    storage=storages[entry.dtype.name],
                    shape=entry.shape,
                )
        return cls(placed)

    def __getitem__(self, name: str) -> Placed:
        return self._placed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def read_tensor(self, bundle: Path, name: str) -> Array:
        """The numbers of a tensor, mapped from its file (read-only)."""
        placed = self._placed[name]
        raw = np.memmap(bundle / placed.file, mode="r", dtype=np.uint8, offset=placed.offset, shape=(placed.length,))
        array: Array = raw.view(STORAGE_DTYPES[placed.storage]).reshape(placed.shape)
        return array


# Recipes. Each takes the source tensors in order.


def _transposed(sources: Sequence[Array]) -> Array:
    """Linear weights [out, in] side by side as [in, out + out + ...]."""
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


def _as_is(sources: Sequence[Array]) -> Array:
    return sources[0]


def _gated_transposed(sources: Sequence[Array]) -> Array:
    """Output projection [out, in] times tanh(gate), as [in, out]: sign and zero of the gate live in the weights."""
    weight, gate = sources
    moved = _transposed([weight.astype(np.float32, copy=False)])
    moved *= np.float32(np.tanh(np.float64(gate)))
    return moved


def _standardised(sources: Sequence[Array], *, scale: float) -> Array:
    """The kernels that NFNet's convolution applies, times the gain of the activation before it."""
    weight, gain = (source.astype(np.float64) for source in sources)
    fan_in = math.prod(weight.shape[1:])
    mean = weight.mean(axis=(1, 2, 3), keepdims=True)
    variance = weight.var(axis=(1, 2, 3), keepdims=True)
    standardised: Array = (weight - mean) * (scale * gain / np.sqrt(fan_in * (variance + STANDARDISATION_EPS)))
    return standardised


def _branch_scale(sources: Sequence[Array], *, alpha: float) -> Array:
    return (sources[0].astype(np.float64) * (alpha * SQUEEZE_EXCITE_GAIN)).reshape(1)


def distance_blocks(num_distances: int) -> int:
    """Blocks of DISTANCE_BLOCK that hold this many distances, the last one padded."""
    return -(-num_distances // DISTANCE_BLOCK)


def _distances(sources: Sequence[Array], *, num_distances: int, num_heads: int) -> Array:
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


def _head_bias(sources: Sequence[Array]) -> Array:
    """[H, D] -> [H, 1, D], to be added to queries [B, H, S, D]."""
    return sources[0][:, None, :]


# Components.


def _vision_encoder(config: ModelConfig) -> Iterator[Weight]:
    vision = config.vision

    def conv(name: str, out: int, into: int, kernel: int, scale: float) -> Iterator[Weight]:
        source = f"vision_encoder.{name.replace('/', '.')}"
        yield Weight(
            name=f"vision_encoder/{name}/weight",
            shape=(out, into, kernel, kernel),
            group="vision_encoder",
            sources=(f"{source}.weight", f"{source}.gain"),
            make=functools.partial(_standardised, scale=scale),
        )
        yield bias(name, out)

    def bias(name: str, out: int) -> Weight:
        source = f"vision_encoder.{name.replace('/', '.')}.bias"
        return Weight(
            name=f"vision_encoder/{name}/bias",
            shape=(out,),
            group="vision_encoder",
            sources=(source,),
            make=_as_is,
            full_precision=True,
        )

    width = 3
    for index, out in enumerate(vision.stem_widths):
        yield from conv(f"stem/{index}", out, width, 3, GELU_GAIN if index else 1.0)
        width = out
    variance = 1.0
    for stage, (out, depth) in enumerate(zip(vision.widths, vision.depths, strict=True)):
        middle, squeezed = int(out * vision.bottleneck_ratio), squeeze_width(out, vision.squeeze_excite_ratio)
        for block in range(depth):
            prefix = f"stages/{stage}/{block}"
            into_block = GELU_GAIN * variance**-0.5
            if needs_downsample(stage, block, width, out):
                yield from conv(f"{prefix}/downsample", out, width, 1, into_block)
            yield from conv(f"{prefix}/conv1", middle, width, 1, into_block)
            yield from conv(f"{prefix}/conv2", middle, vision.group_width, 3, GELU_GAIN)
            yield from conv(f"{prefix}/conv2b", middle, vision.group_width, 3, GELU_GAIN)
            yield from conv(f"{prefix}/conv3", out, middle, 1, GELU_GAIN)
            for name, rows, columns in (("fc1", squeezed, out), ("fc2", out, squeezed)):
                yield Weight(
                    name=f"vision_encoder/{prefix}/squeeze_excite/{name}/weight",
                    shape=(rows, columns, 1, 1),
                    group="vision_encoder",
                    sources=(f"vision_encoder.stages.{stage}.{block}.squeeze_excite.{name}.weight",),
                    make=_as_is,
                )
                yield bias(f"{prefix}/squeeze_excite/{name}", rows)
            yield Weight(
                name=f"vision_encoder/{prefix}/branch_scale",
                shape=(1,),
                group="vision_encoder",
                sources=(f"vision_encoder.stages.{stage}.{block}.skip_gain",),
                make=functools.partial(_branch_scale, alpha=vision.alpha),
                full_precision=True,
            )
            variance = (1.0 if block == 0 else variance) + vision.alpha**2
            width = out
    yield from conv("final_conv", vision.feature_width, width, 1, 1.0)


def _linear(name: str, shape: tuple[int, int], group: str, *sources: str) -> Weight:
    return Weight(name=name, shape=shape, group=group, sources=sources, make=_transposed, moves_only=True)


def _plain(name: str, shape: tuple[int, ...], group: str, source: str) -> Weight:
    return Weight(name=name, shape=shape, group=group, sources=(source,), make=_as_is, full_precision=True)


def _layer_norm(name: str, width: int, group: str, source: str) -> Iterator[Weight]:
    for part in ("weight", "bias"):
        yield _plain(f"{name}/{part}", (width,), group, f"{source}.{part}")


def _resampler(config: ModelConfig) -> Iterator[Weight]:
    resampler, group = config.resampler, "resampler"
    width, inner = resampler.width, resampler.num_heads * resampler.head_size
    yield _linear("resampler/input_proj", (config.vision.feature_width, width), group, "resampler.input_proj.weight")
    yield _plain("resampler/latents", (resampler.num_latents, width), group, "resampler.latents")
    yield _plain("resampler/time_embeddings", (resampler.num_time_embeddings, width), group, "resampler.time_embeddings")
    for layer in range(resampler.num_layers):
        name, source = f"resampler/layer.{layer}", f"resampler.layers.{layer}"
        yield from _layer_norm(f"{name}/media_norm", width, group, f"{source}.media_norm")
        yield from _layer_norm(f"{name}/latent_norm", width, group, f"{source}.latent_norm")
        yield _linear(f"{name}/q_proj", (width, inner), group, f"{source}.q_proj.weight")
        yield _linear(f"{name}/kv_proj", (width, 2 * inner), group, f"{source}.k_proj.weight", f"{source}.v_proj.weight")
        yield _linear(f"{name}/out_proj", (inner, width), group, f"{source}.out_proj.weight")
        yield from _layer_norm(f"{name}/ffw_norm", width, group, f"{source}.ffw_norm")
        yield _linear(f"{name}/ffw_up", (width, resampler.ffw_width), group, f"{source}.ffw_up.weight")
        yield _linear(f"{name}/ffw_down", (resampler.ffw_width, width), group, f"{source}.ffw_down.weight")
    yield from _layer_norm("resampler/norm", width, group, "resampler.norm")


def _media_kv(config: ModelConfig) -> Iterator[Weight]:
    block = config.cross_attention
    shape = (config.resampler.width, block.num_heads * block.head_size)
    for i in range(len(config.gated_layers)):
        for kind in "kv":
            yield _linear(f"media_kv/layer.{i}/{kind}_proj", shape, "media_kv", f"cross_attention.{i}.{kind}_proj.weight")


def _decoder(config: ModelConfig) -> Iterator[Weight]:
    lm = config.language_model
    yield Weight(
        name="decoder/embedding",
        shape=(lm.vocab_size, lm.width),
        group="decoder.embedding",
        sources=("language_model.embedding.weight",),
        make=_as_is,
        moves_only=True,
    )
    yield _plain("decoder/norm/weight", (lm.width,), "decoder.embedding", "language_model.norm.weight")
    for layer in range(lm.num_layers):
        if layer in config.gated_layers:
            yield from _gated_block(config, config.gated_layers.index(layer), layer)
        yield from _language_model_layer(config, layer)


def _gated_block(config: ModelConfig, i: int, layer: int) -> Iterator[Weight]:
    block, width = config.cross_attention, config.language_model.width
    inner, group = block.num_heads * block.head_size, f"decoder.cross_attention.{i:03d}"
    name, source = f"decoder/layer.{layer}/cross_attention", f"cross_attention.{i}"
    yield from _layer_norm(f"{name}/norm", width, group, f"{source}.norm")
    yield _linear(f"{name}/q_proj", (width, inner), group, f"{source}.q_proj.weight")
    yield _gated(f"{name}/out_proj", (inner, width), group, f"{source}.out_proj.weight", f"{source}.attention_gate")
    yield from _layer_norm(f"{name}/ffw_norm", width, group, f"{source}.ffw_norm")
    yield _linear(f"{name}/ffw_up", (width, block.ffw_width), group, f"{source}.ffw_up.weight")
    yield _gated(f"{name}/ffw_down", (block.ffw_width, width), group, f"{source}.ffw_down.weight", f"{source}.ffw_gate")


def _gated(name: str, shape: tuple[int, int], group: str, *sources: str) -> Weight:
    return Weight(name=name, shape=shape, group=group, sources=sources, make=_gated_transposed)


def _language_model_layer(config: ModelConfig, layer: int) -> Iterator[Weight]:
    lm = config.language_model
    inner, group = lm.num_heads * lm.head_size, f"decoder.layer.{layer:03d}"
    name, source = f"decoder/layer.{layer}", f"language_model.layers.{layer}"
    qkv = [f"{source}.{part}_proj.weight" for part in "qkv"]
    yield _plain(f"{name}/attention_norm/weight", (lm.width,), group, f"{source}.attention_norm.weight")
    yield _linear(f"{name}/self_attention/qkv_proj", (lm.width, 3 * inner), group, *qkv)
    for part in ("content_bias", "position_bias"):
        yield Weight(
            name=f"{name}/self_attention/{part}",
            shape=(lm.num_heads, 1, lm.head_size),
            group=group,
            sources=(f"{source}.{part}",),
            make=_head_bias,
            full_precision=True,
        )
    yield Weight(
        name=f"{name}/self_attention/distances",
        shape=(lm.num_heads, lm.head_size, distance_blocks(lm.max_positions), DISTANCE_BLOCK),
        group=group,
        sources=(f"{source}.relative_proj.weight",),
        make=functools.partial(_distances, num_distances=lm.max_positions, num_heads=lm.num_heads),
    )
    yield _linear(f"{name}/self_attention/out_proj", (inner, lm.width), group, f"{source}.out_proj.weight")
    yield _plain(f"{name}/ffw_norm/weight", (lm.width,), group, f"{source}.ffw_norm.weight")
    yield _linear(f"{name}/ffw_up", (lm.width, lm.ffw_width), group, f"{source}.ffw_up.weight")
    yield _linear(f"{name}/ffw_down", (lm.ffw_width, lm.width), group, f"{source}.ffw_down.weight")
