"""What things take of memory before they are begun: running a bundle, the reference beside it, making weights, building engines.

They stand in one place so that what `load` refuses, parity leaves out, `--plan` prints and `doctor` says agree. All know the precision: they
count the bytes of each tensor as it is stored, and what ONNX Runtime makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.precision import BYTES_PER_WEIGHT, Precision
from flamingo_export.weights import Weight, WeightIndex, bundle_weights, groups, stored_bytes
from flamingo_reference.config import ModelConfig, NFNetConfig
from flamingo_reference.names import expected_tensors

QUERIES, CHUNK, SEEN_TILES = 512, 256, 16
"""Most queries of a slice of a transformer over tiles, positions of a prefill call, and tiles that one of them sees."""
PROGRAM = 300 << 20
"""Python, its libraries and the activations of short prompts."""
GIB = 1 << 30

_WIDENED = {"fp16": 2, "bf16": 2, "fp8": 4}
"""By how much a tensor's stored bytes grow once ONNX Runtime has opened it on a CPU: 16 bits and FP8 become fp32, codes of blocks stay."""
_TABLES = {"decoder/embedding", "text_tower/embedding", "vision_encoder/tile_position_embedding"}
_OPENING = {"fp32": 1.15, "fp16": 1.3, "bf16": 1.3, "fp8": 1.3, "int8": 1.2, "int4": 1.2}
"""Peak while opening over `opened_weights`: benchmarks/open_memory.py finds 1.13 for fp32, 1.29 for bf16, 1.24 for fp8, 1.17 for int8."""
_CONVOLUTIONS = 2.4
"""The same for NFNet, whose kernels are in memory twice while they are laid out in blocks: NFNet-F6 of 1.75 GB opens in 4.1 GB."""

ENGINE_RATIO = 1.05
"""An engine holds the weights of its graph once more, and its kernels."""
BUILD_RATIO, BUILD_BASE = 2.7, GIB
"""Peak memory of a streamed build of an engine over the bytes of its weights, and what any build takes: benchmarks/engine_build_memory.py."""

MAKING, BUILDING = 55 << 20, 110 << 20
"""Python and its libraries while weights are made, without PyTorch, and while graphs are, after it."""


def opened_weights(index: WeightIndex) -> int:
    """Bytes that a bundle's weights take while all its graphs are open on a CPU: the least that running it needs."""
    return sum(_opened(index, name) for name in index)


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a bundle takes while it runs: requests side by side, cache slots of each, rows of the media bank that are filled.

    work: what is computed on the way, at its peak, and on a CPU the program. Of a built engine TensorRT says how much it is (`inspect
    --engine`).
    """

    requests: int
    positions: int
    media: int
    weights: int
    cache: int
    bank: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.bank + self.work


def on_cpu(config: ModelConfig, index: WeightIndex, *, requests: int, positions: int, media: int) -> Needs:
    """What ONNX Runtime takes on a CPU, which computes in fp32. media: filled rows of the bank, tiles where images have them."""
    return Needs(
        requests=requests,
        positions=positions,
        media=media,
        weights=opened_weights(index),
        cache=cache_bytes(config, positions=requests * positions, width=4),
        bank=media_bytes(config, rows=media, width=4),
        work=PROGRAM + _encoding(config, width=4) + _prefilling(config, positions=positions, media=media, width=4),
    )


def on_gpu(
    config: ModelConfig, precision: Precision, limits: ShapeLimits, *, requests: int, positions: int, media: int
) -> Needs:
    """What engines take on a GPU: each holds the weights of its graph, caches and bank are in the storage type, or the bank in FP8."""
    width = BYTES_PER_WEIGHT[precision.storage]
    weights = sum(stored_bytes(weight, precision) for weight in bundle_weights(config, precision))
    return Needs(
        requests=requests,
        positions=positions,
        media=media,
        weights=int(ENGINE_RATIO * weights),
        cache=cache_bytes(config, positions=requests * positions, width=width),
        bank=media * media_row(config, precision),
        work=max(_encoding(config, width=width), _stepping_in_engines(config, limits, width=width)),
    )


def _encoding(config: ModelConfig, *, width: int) -> int:
    """Bytes of what a transformer over tiles computes on the way; other vision encoders' images are small and in the program's share.

    A slice of scores and its softmax, the wide half of a feed-forward before and after its activation, and the states that become features.
    """
    tiled = config.tiled
    if tiled is None:
        return 0
    tokens = tiled.max_tiles * tiled.padded_patches
    scores = tiled.num_heads * min(tokens, QUERIES) * tokens
    return width * (2 * scores + 2 * tokens * tiled.ffw_width + tokens * tiled.width * (4 + len(tiled.feature_layers)))


def _prefilling(config: ModelConfig, *, positions: int, media: int, width: int) -> int:
    """Bytes of what ONNX Runtime computes on the way of a chunk of a prompt: the wide half of a feed-forward, scores and their softmax."""
    lm, block = config.language_model, config.cross_attention
    seen = min(media, SEEN_TILES) if config.sees_groups else 1
    scores = max(lm.num_heads * positions, block.num_heads * seen * config.resampler.num_latents)
    return min(CHUNK, positions) * width * (_wide(config) + 2 * scores)


def _stepping_in_engines(config: ModelConfig, limits: ShapeLimits, *, width: int) -> int:
    """The same of engines, at the most of prefill and of steps of shared rows. Their attentions keep no scores. The rows of the media bank that
    a call looks at are there twice, as they were gathered and as heads want them; logits once more in fp32.

    Of Llama 3.2 Vision's 11B, compiled for sm89, TensorRT for RTX says 3.24 GB for prefill and 3.41 GB for such steps; this 3.14 and 3.46.
    """
    block, lm = config.cross_attention, config.language_model
    keys = config.resampler.num_latents
    gathered = 2 * 2 * block.kv_heads * block.head_size * keys
    calls = ((limits.chunk, limits.chunk_media), (limits.branches, limits.branch_media))
    return max(
        limits.batch
        * width
        * (media * gathered + positions * (_wide(config) + 2 * lm.vocab_size + limits.max_length + media * keys))
        for positions, media in calls
    )


def _wide(config: ModelConfig) -> int:
    """Numbers of a position that are there at once in a layer."""
    return 3 * max(config.language_model.ffw_width, config.cross_attention.ffw_width) + 6 * config.language_model.width


def resident(config: ModelConfig, index: WeightIndex) -> int:
    """Bytes that a bundle takes once it is open on a CPU, with the program, a cache for short prompts and the keys of an image."""
    tiles = config.tiled.max_tiles if config.tiled is not None else 1
    return on_cpu(config, index, requests=1, positions=512, media=tiles).total


def running(config: ModelConfig, index: WeightIndex) -> int:
    """The same at its peak, which is reached while the graph that takes most is opened after all others."""
    extra: dict[str, float] = {}
    for name in index:
        graph = name.split("/", 1)[0]
        kernels = isinstance(config.vision, NFNetConfig) and graph == "vision_encoder"
        factor = _CONVOLUTIONS if kernels else _OPENING[index[name].storage]
        extra[graph] = extra.get(graph, 0.0) + (factor - 1) * _opened(index, name)
    return resident(config, index) + int(max(extra.values(), default=0.0))


def cache_bytes(config: ModelConfig, *, positions: int, width: int) -> int:
    """Bytes of the keys and values of so many positions, in numbers of `width` bytes."""
    lm = config.language_model
    return 2 * lm.num_layers * lm.kv_heads * lm.head_size * positions * width


def media_bytes(config: ModelConfig, *, rows: int, width: int) -> int:
    """Bytes of the keys and values of so many rows of the media bank, in numbers of `width` bytes. A row is an image, a video, or a tile."""
    block = config.cross_attention
    return 2 * len(config.gated_layers) * block.kv_heads * config.resampler.num_latents * block.head_size * rows * width


def reference(config: ModelConfig) -> int:
    """Bytes that the whole reference takes for token traces, whatever the bundle's precision: fp64 and fp32 side by side, and activations."""
    return int(12.5 * _numbers(config)) + PROGRAM


def quantised_copies(config: ModelConfig, precision: Precision) -> int:
    """Bytes of the fp32 reference with each matrix that the policy quantises once more in its layer's copy and once in that of all, and
    activations."""
    quantised = [weight for weight in bundle_weights(config, precision) if weight.quantisation(precision) is not None]
    return int(4.5 * _numbers(config)) + 8 * sum(math.prod(weight.shape) for weight in quantised) + PROGRAM


def making(
    weights: Iterable[Weight], precision: Precision, *, source_bytes: Mapping[str, int] | None, large: int, threads: int
) -> int:
    """Bytes that writing a bundle's weights takes at its peak, pages of mapped files included.

    source_bytes: of a number of each of the source's tensors, 4 where it is not known; None for random weights, which are drawn in fp32 and
    in the bundle's order. Groups are written in order, `threads` of them side by side, and tensors of more than `large` numbers one at a time.
    """
    largest = []  # of each group: of its tensors of up to `large` numbers, and of those of more
    for members in groups(weights).values():
        small, big = [0], [0]
        for weight in members:
            (big if math.prod(weight.shape) > large else small).append(_made(weight, precision, source_bytes))
        largest.append((max(small), max(big)))
    peak = 0
    for first in range(max(1, len(largest) - threads + 1)):
        beside = largest[first : first + threads]
        smalls = sum(small for small, _ in beside)
        peak = max(peak, smalls, *(smalls - small + big for small, big in beside))
    return max(BUILDING, MAKING + peak)


def _made(weight: Weight, precision: Precision, known: Mapping[str, int] | None) -> int:
    """Bytes that one tensor takes while it is made: what it is made of, copies on the way, what is stored."""
    given = 8 if not weight.sources else 4 if known is None else known.get(weight.sources[0], 4)
    numbers, stored = math.prod(weight.shape), BYTES_PER_WEIGHT[weight.storage(precision)]
    how = weight.quantisation(precision)
    if not weight.moves_only:
        return numbers * (given + (4 if given != 4 else 0) + 4 + (stored if stored != 4 and how is None else 0))
    kept = stored if how is None else min(given, 4)
    cast = kept if kept != given else 0
    in_order = not weight.product or (known is None and len(weight.sources) == 1)
    codes = stored_bytes(weight, precision) if how is not None else 0
    return max(numbers * (given + cast + (0 if in_order else kept)), numbers * kept + codes)


def calibrating(config: ModelConfig) -> int:
    """Bytes that calibration takes: the largest part of the reference in fp32, twice, as it is read and as it is used."""
    sizes: dict[str, int] = {}
    for name, shape in expected_tensors(config).items():
        parts = name.split(".")
        numbered = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
        part = ".".join(parts[: numbered + 1]) if parts[0] in ("language_model", "cross_attention") else parts[0]
        sizes[part] = sizes.get(part, 0) + 4 * math.prod(shape)
    return PROGRAM + 2 * max(sizes.values())


def device(config: ModelConfig, precision: Precision, limits: ShapeLimits) -> int:
    """Bytes on a GPU, were all graphs engines: they, caches of the limits' batch and length, the media bank, what is computed on the way."""
    requests, positions = limits.batch, limits.max_length
    return on_gpu(config, precision, limits, requests=requests, positions=positions, media=limits.bank_rows).total


def work_of_row(config: ModelConfig, precision: Precision, limits: ShapeLimits) -> int:
    """Bytes that an engine of the decoder computes on the way for each request that it is built for."""
    return _stepping_in_engines(config, msgspec.structs.replace(limits, batch=1), width=BYTES_PER_WEIGHT[precision.storage])


def work_of_encoder(config: ModelConfig, precision: Precision) -> int:
    """The same of the vision encoder, for an image."""
    return _encoding(config, width=BYTES_PER_WEIGHT[precision.storage])


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a graph keeps on the GPU that runs it: its engine (weights, intermediate results where they are known), the bank of its gated
    layers, and a row of its layers' caches.

    work: of intermediate results for each row, where the engine is yet to be built. Graphs of one GPU run one after the other and share them.
    """

    engine: int
    bank: int = 0
    row: int = 0
    work: int = 0

    def total(self, rows: int) -> int:
        """With so many rows of the cache, but for `work`."""
        return self.engine + self.bank + rows * self.row


def graph_on_gpu(config: ModelConfig, precision: Precision, limits: ShapeLimits, layers: range | None, engine: int) -> Resident:
    """What a graph keeps there. layers: LM layers of (a part of) the decoder, None for another graph. engine: bytes of its engine."""
    if layers is None:
        return Resident(engine=engine)
    gated = sum(layer in layers for layer in config.gated_layers)
    bank = limits.bank_rows * media_row(config, precision) * gated // max(1, len(config.gated_layers))
    width = BYTES_PER_WEIGHT[precision.storage]
    row = cache_bytes(config, positions=limits.max_length, width=width) * len(layers) // config.language_model.num_layers
    return Resident(engine=engine, bank=bank, row=row)


def media_row(config: ModelConfig, precision: Precision) -> int:
    """Bytes of a row of the media bank on a GPU."""
    return media_bytes(config, rows=1, width=1 if precision.media == "fp8" else BYTES_PER_WEIGHT[precision.storage])


def engine_building(weight_bytes: int) -> int:
    """Bytes of host memory that compiling an engine takes. weight_bytes: of the weights that its graph reads."""
    return int(weight_bytes * BUILD_RATIO) + BUILD_BASE


def engine_weights(memory: int) -> int:
    """Most bytes of weights whose engine compiles in so much host memory."""
    return int((memory - BUILD_BASE) / BUILD_RATIO)


def reducing(weight_bytes: int) -> int:
    """Bytes that reducing a graph takes, from those of its weights as stored: in fp32 here, in Polygraphy and in the check, each twice."""
    return int(12 * weight_bytes) + PROGRAM


def shortage(what: str, needed: int, available: int) -> str:
    """Why something does not fit, for messages; empty if it does."""
    if needed <= available:
        return ""
    wanted, there = rounded_apart(needed, available)
    return f"{what} takes about {wanted} of memory, {there} may be used"


def rounded_apart(needed: int, available: int) -> tuple[str, str]:
    """What is needed and the less that is there, for messages: rounded up and down, so that they are never the same number."""
    unit, name, places = (GIB, "GiB", 10) if needed >= GIB else (1 << 20, "MiB", 1)
    up, down = -(-needed * places // unit) / places, max(0, available) * places // unit / places
    return (f"{up:.1f} {name}", f"{down:.1f} {name}") if places > 1 else (f"{up:.0f} {name}", f"{down:.0f} {name}")


def _opened(index: WeightIndex, name: str) -> int:
    """Of a table only the rows asked for are read, from its mapped file. A tied embedding is a table, and the head's matrix besides."""
    widened = _WIDENED.get(index[name].storage, 1)
    if name in _TABLES:
        tied = name == "decoder/embedding" and "decoder/head" not in index
        widened = (widened + 1 if widened > 1 else 1) if tied else 0
    return index[name].length * widened


def _numbers(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(config).values())
