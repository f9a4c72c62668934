"""What weights a caller can name: a checkpoint, random numbers, a live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from flamingo_export.errors import BuildError, CheckpointError
from flamingo_reference.checkpoints.loading import CheckpointFiles
from flamingo_reference.config import SIZES, ModelConfig, OwnVisionConfig
from flamingo_reference.input_format import PAPER, InputFormat


class CheckpointFolder(CheckpointFiles, frozen=True, kw_only=True):
    """Weights of a checkpoint: a folder or file in our own format or that of a known family, and the files that belong to it."""


class RandomWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Weights drawn from seeded generators."""

    config: ModelConfig
    seed: int = 0


class LiveModel(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of a `flamingo_reference.model.Flamingo` in memory; `tokenizer` is the `tokenizer.json` it was trained with, if any; `inputs`:
    how it takes images and text."""

    model: Any
    tokenizer: Path | None = None
    inputs: InputFormat = PAPER


Source = CheckpointFolder | RandomWeights | LiveModel


def with_vision_encoder(source: Source, module: Any) -> LiveModel:
    """A checkpoint in our own format and the vision encoder that no file of it holds, together as a live model.

    module: torch module from pixels [F, 3, I, I] to features [F, P, E]. Numbers stay in the checkpoint's files until they are used.
    Raises CheckpointError if the checkpoint is not such a one. Needs torch.
    """
    import torch

    from flamingo_export.sources.checkpoint import CheckpointSource
    from flamingo_reference.model import Flamingo

    if not isinstance(source, CheckpointFolder):
        raise CheckpointError(
            "a vision encoder of your own goes with a checkpoint's folder; a live model has it as its vision_encoder already."
        )
    opened = CheckpointSource(source)
    if not isinstance(opened.config.vision, OwnVisionConfig):
        raise CheckpointError(
            f"{source.path} has a vision encoder of its own ({type(opened.config.vision).__name__}). For another one, its config.json says "
            '"vision": {"type": "own", "image_size": I, "num_patches": P, "feature_width": E}, and it holds no vision_encoder tensors.'
        )
    with torch.device("meta"):
        model = Flamingo(opened.config)
    model.load_state_dict({name: _mapped(opened.read(name)) for name in opened.names()}, strict=True, assign=True)
    model.vision_encoder = module
    return LiveModel(model=model, tokenizer=opened.tokenizer, inputs=opened.inputs)


def _mapped(array: Any) -> Any:
    """A torch tensor on the array's own memory, which is that of the file; nobody writes to it."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the memory is not writable
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(array)


def source_for_size(size: str, *, seed: int | None = None) -> Source:
    """Where the weights of a preset come from: nano's trained checkpoint that is part of this package, random numbers for the others.

    With a seed nano is random too. Raises BuildError for an unknown size.
    """
    name = size.lower()
    if name not in SIZES:
        raise BuildError(f"{size!r} is not a size; there are {', '.join(SIZES)}")
    if name == "nano" and seed is None:
        folder = nano_checkpoint()
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"nano's trained checkpoint is not in this installation ({folder}). Reinstall flamingo-export, train it "
                "(python -m flamingo_reference.nano.train), or give --seed for random weights."
            )
        return CheckpointFolder(path=folder)
    return RandomWeights(config=SIZES[name], seed=seed or 0)


def nano_checkpoint() -> Path:
    """Folder of the trained checkpoint that is shipped with the package."""
    import flamingo_reference

    return Path(flamingo_reference.__file__).parent / "nano" / "checkpoint"
