"""Our own checkpoint format: `config.json`, `*.safetensors` (one file, or shards with an index), `tokenizer/tokenizer.json`.

Tensor names are the parameter names of `flamingo_reference.model.Flamingo`; linear weights are [out, in] as PyTorch has them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_reference.checkpoints.writer import INDEX, SINGLE, writing
from flamingo_reference.config import ConfigError, ModelConfig

Shape = tuple[int, ...]
AnyArray = npt.NDArray[Any]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint, in the order the model uses them."""
    tensors: dict[str, Shape] = {}
    for name, shape in _vision_encoder(config):
        tensors[f"vision_encoder.{name}"] = shape
    for name, shape in _resampler(config):
        tensors[f"resampler.{name}"] = shape
    for index in range(len(config.gated_layers)):
        for name, shape in _cross_attention(config):
            tensors[f"cross_attention.{index}.{name}"] = shape
    for name, shape in _language_model(config):
        tensors[f"language_model.{name}"] = shape
    return tensors


def component_of(name: str) -> str:
    """The component a tensor belongs to: vision_encoder, resampler, cross_attention or language_model."""
    return name.split(".", 1)[0]


def squeeze_width(width: int, ratio: float) -> int:
    """Width inside a squeeze-excite block: width * ratio to the nearest multiple of 8, at least 8 (as timm has it)."""
    return max(8, int(width * ratio + 4) // 8 * 8)


def needs_downsample(stage: int, block: int, width: int, out: int) -> bool:
    """Whether an NFNet block has a convolution on its shortcut: where the width changes or a later stage begins with stride 2."""
    return width != out or (block == 0 and stage > 0)


def _conv(name: str, out: int, into: int, kernel: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{name}.bias", (out,)
    yield f"{name}.gain", (out, 1, 1, 1)


def _vision_encoder(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    vision = config.vision
    width = 3
    for index, stem_width in enumerate(vision.stem_widths):
        yield from _conv(f"stem.{index}", stem_width, width, 3)
        width = stem_width
    for stage, (out, depth) in enumerate(zip(vision.widths, vision.depths, strict=True)):
        middle = int(out * vision.bottleneck_ratio)
        squeezed = squeeze_width(out, vision.squeeze_excite_ratio)
        for block in range(depth):
            prefix = f"stages.{stage}.{block}"
            if needs_downsample(stage, block, width, out):
                yield from _conv(f"{prefix}.downsample", out, width, 1)
            yield from _conv(f"{prefix}.conv1", middle, width, 1)
            yield from _conv(f"{prefix}.conv2", middle, vision.group_width, 3)
            yield from _conv(f"{prefix}.conv2b", middle, vision.group_width, 3)
            yield from _conv(f"{prefix}.conv3", out, middle, 1)
            yield f"{prefix}.squeeze_excite.fc1.weight", (squeezed, out, 1, 1)
            yield f"{prefix}.squeeze_excite.fc1.bias", (squeezed,)
            yield f"{prefix}.squeeze_excite.fc2.weight", (out, squeezed, 1, 1)
            yield f"{prefix}.squeeze_excite.fc2.bias", (out,)
            yield f"{prefix}.skip_gain", ()
            width = out
    yield from _conv("final_conv", vision.feature_width, width, 1)


def _layer_norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resampler(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    resampler = config.resampler
    width, inner = resampler.width, resampler.num_heads * resampler.head_size
    yield "input_proj.weight", (width, config.vision.feature_width)
    yield "latents", (resampler.num_latents, width)
    yield "time_embeddings", (resampler.num_time_embeddings, width)
    for layer in range(resampler.num_layers):
        prefix = f"layers.{layer}"
        yield from _layer_norm(f"{prefix}.media_norm", width)
        yield from _layer_norm(f"{prefix}.latent_norm", width)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}.{name}.weight", (inner, width)
        yield f"{prefix}.out_proj.weight", (width, inner)
        yield from _layer_norm(f"{prefix}.ffw_norm", width)
        yield f"{prefix}.ffw_up.weight", (resampler.ffw_width, width)
        yield f"{prefix}.ffw_down.weight", (width, resampler.ffw_width)
    yield from _layer_norm("norm", width)


def _cross_attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    block = config.cross_attention
    width, media_width, inner = config.language_model.width, config.resampler.width, block.num_heads * block.head_size
    yield from _layer_norm("norm", width)
    yield "q_proj.weight", (inner, width)
    yield "k_proj.weight", (inner, media_width)
    yield "v_proj.weight", (inner, media_width)
    yield "out_proj.weight", (width, inner)
    yield "attention_gate", ()
    yield from _layer_norm("ffw_norm", width)
    yield "ffw_up.weight", (block.ffw_width, width)
    yield "ffw_down.weight", (width, block.ffw_width)
    yield "ffw_gate", ()


def _language_model(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    lm = config.language_model
    inner = lm.num_heads * lm.head_size
    yield "embedding.weight", (lm.vocab_size, lm.width)
    for layer in range(lm.num_layers):
        prefix = f"layers.{layer}"
        yield f"{prefix}.attention_norm.weight", (lm.width,)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}.{name}.weight", (inner, lm.width)
        yield f"{prefix}.relative_proj.weight", (inner, lm.width)
        yield f"{prefix}.content_bias", (lm.num_heads, lm.head_size)
        yield f"{prefix}.position_bias", (lm.num_heads, lm.head_size)
        yield f"{prefix}.out_proj.weight", (lm.width, inner)
        yield f"{prefix}.ffw_norm.weight", (lm.width,)
        yield f"{prefix}.ffw_up.weight", (lm.ffw_width, lm.width)
        yield f"{prefix}.ffw_down.weight", (lm.width, lm.ffw_width)
    yield "norm.weight", (lm.width,)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold exactly the tensors of its config."""


class TensorReader:
    """Tensors of a checkpoint folder, read one at a time from its safetensors files."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: tensor name -> the file that holds it."""
        self._files = dict(files)
        self._entries: dict[str, TensorEntry] = {}
        headers = {path: open_header(path) for path in sorted(set(self._files.values()))}
        for name, path in self._files.items():
            if name not in headers[path]:
                raise CheckpointError(f"{path} does not hold {name}, which the index places there. Fetch the checkpoint again.")
            self._entries[name] = headers[path][name]
        owners: dict[str, list[str]] = {}
        for path, header in headers.items():
            for name in header:
                owners.setdefault(name, []).append(path.name)
        twice = {name: places for name, places in owners.items() if len(places) > 1}
        if twice:
            raise CheckpointError(f"tensors held by more than one file: {twice}. Remove the files that do not belong.")
        unlisted = sorted(set(owners) - set(self._files))
        if unlisted:
            raise CheckpointError(f"the index does not list {', '.join(unlisted)}. Remove the files that do not belong.")

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._entries)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor; bfloat16 is that of ml_dtypes."""
        dtype: np.dtype[Any] = self._entries[name].dtype
        return dtype

    def read(self, name: str) -> AnyArray:
        """A tensor's numbers, mapped from the file (read-only)."""
        entry = self._entries[name]
        if entry.size == 0:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(self._files[name], mode="r", offset=entry.start, shape=(entry.size,), dtype=np.uint8)
        array: AnyArray = raw.view(entry.dtype).reshape(entry.shape)
        return array


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor's place in its safetensors file: start and size in bytes."""

    dtype: Any
    shape: Shape
    start: int
    size: int


class _RawEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def open_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, without reading them. Raises CheckpointError if the file is cut short or malformed."""
    advice = "Fetch the checkpoint again."
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is cut short or no safetensors file ({total} bytes). {advice}")
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        header = {name: msgspec.json.decode(entry, type=_RawEntry) for name, entry in raw.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} has a malformed safetensors header ({error}). {advice}") from error
    entries = {}
    for name, entry in header.items():
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has element type {entry.dtype}, expected one of {', '.join(_DTYPES)}.")
        dtype = np.dtype(_DTYPES[entry.dtype])
        start, stop = entry.data_offsets
        if stop - start != math.prod(entry.shape) * dtype.itemsize or start < 0:
            raise CheckpointError(f"{path}: {name} has {stop - start} bytes for shape {entry.shape}. {advice}")
        if 8 + length + stop > total:
            raise CheckpointError(f"{path} is cut short: {name} ends beyond its {total} bytes. {advice}")
        entries[name] = TensorEntry(dtype, entry.shape, 8 + length + start, stop - start)
    end = 8 + length
    for name, placed in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if placed.start != end:
            raise CheckpointError(
                f"{path}: {name} begins at byte {placed.start}, expected {end}: tensors overlap or leave gaps. {advice}"
            )
        end += placed.size
    if end != total:
        raise CheckpointError(f"{path} has {total - end} bytes after its last tensor. {advice}")
    return entries


def open_tensors(folder: Path) -> TensorReader:
    """The tensors of a checkpoint folder: `model.safetensors`, or shards listed by `model.safetensors.index.json`.

    Raises CheckpointError if files are missing, cut short, malformed or hold a tensor twice.
    """
    index_path, single = folder / INDEX, folder / SINGLE
    if index_path.is_file():
        try:
            index = msgspec.json.decode(index_path.read_bytes(), type=_Index)
        except msgspec.MsgspecError as error:
            raise CheckpointError(f"{index_path} is malformed: {error}") from error
        outside = sorted({file for file in index.weight_map.values() if Path(file).name != file})
        if outside:
            raise CheckpointError(f"{index_path} names files outside of its folder: {', '.join(outside)}")
        missing = sorted({file for file in index.weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{index_path} names files that are not there: {', '.join(missing)}. Fetch them.")
        return TensorReader({name: folder / file for name, file in index.weight_map.items()})
    if single.is_file():
        return TensorReader(dict.fromkeys(open_header(single), single))
    raise CheckpointError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; a checkpoint folder needs one."
    )


def load_native(folder: Path) -> tuple[ModelConfig, TensorReader]:
    """Config and tensors of a checkpoint in our own format, checked against each other.

    Raises CheckpointError naming all tensors that are missing, unknown or of another shape at once.
    """
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=ModelConfig)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); a checkpoint folder needs one.") from error
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} is no model config: {error}") from error
    try:
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    reader = open_tensors(folder)
    check_tensors(config, {name: reader.shape(name) for name in reader.names()}, where=str(folder))
    return config, reader


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape], *, where: str) -> None:
    """Raises CheckpointError naming every tensor that is missing, unknown or misshapen, with the nearest expected name."""
    expected = expected_tensors(config)
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in shapes]
    for name, shape in shapes.items():
        if name not in expected:
            nearest = difflib.get_close_matches(name, expected, n=1)
            faults.append(f"unknown {name} {shape}" + (f" (nearest: {nearest[0]})" if nearest else ""))
        elif shape != expected[name]:
            faults.append(f"{name} has shape {shape}, expected {expected[name]}")
    if faults:
        raise CheckpointError(f"{where}: {len(faults)} tensors do not fit model {config.name!r}: " + "; ".join(faults))


def save_native(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, AnyArray]],
    *,
    tokenizer: Path | None = None,
    max_file_bytes: int | None = None,
) -> None:
    """Writes `config.json`, the tensors and, where given, a copy of the tokenizer.json `tokenizer`.

    Tensors are taken one by one. They go to `model.safetensors`, or, where max_file_bytes is given and it would grow beyond, to shards with
    an index. A checkpoint already there is replaced once all has been written. Raises CheckpointError naming all tensors that do not fit.
    """
    expected = expected_tensors(config)
    shapes: dict[str, Shape] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder, expected, max_file_bytes=max_file_bytes) as writer:
        for name, array in tensors:
            if name in shapes:
                raise CheckpointError(f"{folder}: tensor {name} was given twice")
            shapes[name] = tuple(array.shape)
            if expected.get(name) == shapes[name]:
                writer.add(name, array)
        check_tensors(config, shapes, where=str(folder))
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=1) + b"\n")
    if tokenizer is not None:
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters of each component, in model order."""
    counts: dict[str, int] = {}
    for name, shape in expected_tensors(config).items():
        counts[component_of(name)] = counts.get(component_of(name), 0) + math.prod(shape)
    return counts
