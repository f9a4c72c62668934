"""Our own checkpoint format: `config.json`, `*.safetensors` (one file, or shards with an index), `tokenizer/tokenizer.json`.

Tensor names are the parameter names of `flamingo_reference.model.Flamingo`; linear weights are [out, in] as PyTorch has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from flamingo_reference import ablations
from flamingo_reference.arrays import Array, Shape
from flamingo_reference.checkpoints import accounting
from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.tensors import CheckpointError, FileReader
from flamingo_reference.checkpoints.files.writer import SINGLE, writing
from flamingo_reference.config import ConfigError, ModelConfig
from flamingo_reference.names import expected_tensors


def load_native(folder: Path) -> tuple[ModelConfig, FileReader]:
    """Config and tensors of a checkpoint in our own format, checked against each other.

    Raises CheckpointError naming all tensors that are missing, unknown or of another shape at once.
    """
    config = read_config(folder / "config.json")
    reader = open_tensors(folder, (SINGLE,))
    accounting.account(expected_tensors(config), reader, where=str(folder), model=config.name)
    return config, reader


def read_config(path: Path) -> ModelConfig:
    """The model that a config.json in our own format describes. Raises CheckpointError if it is none, or cannot be built."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=ModelConfig)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); a checkpoint folder needs one.") from error
    except msgspec.MsgspecError as error:
        raise CheckpointError(_refused(path) or f"{path} is not a model config: {error}") from error
    try:
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config


def _refused(path: Path) -> str:
    """Why a config names a model that is known and not supported; empty where it does not."""
    try:
        found = list(ablations.refused(msgspec.json.decode(path.read_bytes())))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return f"{path}: {'; '.join(found)}." if found else ""


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape], *, where: str) -> None:
    """Raises CheckpointError naming every tensor that is missing, unknown or misshapen, with the nearest expected name."""
    accounting.check_tensors(expected_tensors(config), shapes, where=where, model=config.name)


def save_native(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Array]],
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
