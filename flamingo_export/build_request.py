"""What a build is asked to do, resolved once at the edge: from here on nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from flamingo_export.errors import BuildError, CheckpointError
from flamingo_export.manifest import ShapeLimits, read_manifest
from flamingo_export.precision import Policy, Precision, StorageType, default_storage
from flamingo_reference.checkpoints.loading import CheckpointFiles
from flamingo_reference.checkpoints.names import parameter_counts
from flamingo_reference.config import PRESETS, ModelConfig, OwnVisionConfig
from flamingo_reference.input_format import PAPER, InputFormat

BuildBackend = Literal["onnxruntime", "tensorrt-rtx", "tensorrt"]
ParityMode = Literal["auto", "skip"]
"""auto: against PyTorch where it is installed, else the manifest says `not_run`. skip: the manifest says `not_run`."""


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


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One build.

    storage: None takes fp32 below a billion parameters, bf16 above. policy: which matrices are quantised, None is none. calibration: the
    table of activation ranges for it; without one the model is calibrated first, unless `uncalibrated`. limits: None takes those of
    `default_limits`. overwrite: a bundle at `out` is replaced once the new one is complete. resume: go on with what an interrupted build
    of the same request has finished. backend: `onnxruntime`, which runs the portable graphs, or `tensorrt-rtx` or `tensorrt`, which
    compile engines beside them. target: the GPU they are for (`sm89`), None for this machine's. parts: graphs that the
    decoder is cut into, 1 to its number of LM layers. graphs_of: a bundle whose graphs (and their parts), limits and, where the source
    has none, tokenizer are taken as they are (`refit_request`).
    """

    source: Source
    out: Path
    storage: StorageType | None = None
    policy: Policy | None = None
    calibration: Path | None = None
    uncalibrated: bool = False
    limits: ShapeLimits | None = None
    parity: ParityMode = "auto"
    overwrite: bool = False
    resume: bool = True
    backend: BuildBackend = "onnxruntime"
    target: str | None = None
    parts: int = 1
    graphs_of: Path | None = None


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


def refit_request(
    bundle: Path, source: Source, out: Path, *, parity: ParityMode = "auto", overwrite: bool = False, resume: bool = True
) -> BuildRequest:
    """A new bundle at `out` of the source's weights in the graphs of `bundle`, stored in its types, within its limits.

    Raises BundleError if there is no such bundle. Engines are not taken over: they hold the weights they were compiled with.
    """
    manifest = read_manifest(bundle)
    return BuildRequest(
        source=source,
        out=out,
        storage=manifest.precision.storage,
        policy=manifest.precision.policy,
        limits=manifest.limits,
        parity=parity,
        overwrite=overwrite,
        resume=resume,
        graphs_of=bundle,
    )


def source_for_size(size: str, *, seed: int | None = None) -> Source:
    """Where the weights of a preset come from: nano's trained checkpoint that is part of this package, random numbers for the others.

    With a seed nano is random too. Raises BuildError for an unknown size.
    """
    name = size.lower()
    if name not in PRESETS:
        raise BuildError(f"{size!r} is no size; there are {', '.join(PRESETS)}")
    if name == "nano" and seed is None:
        folder = nano_checkpoint()
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"nano's trained checkpoint is not in this installation ({folder}). Reinstall flamingo-export, train it "
                "(python -m flamingo_reference.nano.train), or give --seed for random weights."
            )
        return CheckpointFolder(path=folder)
    return RandomWeights(config=PRESETS[name], seed=seed or 0)


def nano_checkpoint() -> Path:
    """Folder of the trained checkpoint that is shipped with the package."""
    import flamingo_reference

    return Path(flamingo_reference.__file__).parent / "nano" / "checkpoint"


def default_out(source: Source, policy: Policy | None = None) -> Path:
    """Where a bundle goes when nothing else is said: `flamingo-9b.bundle` (`flamingo-9b-fp8.bundle`) for sizes and models, `NAME.bundle`
    for a folder NAME or a file in it."""
    plain = _plain_out(source)
    return plain if policy is None else plain.with_name(f"{plain.stem}-{_file_name(policy.name)}.bundle")


def _file_name(name: str) -> str:
    """What of a policy's name can stand in a file's."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "quantised"


def _plain_out(source: Source) -> Path:
    if isinstance(source, CheckpointFolder):
        folder = source.path.resolve()
        name = folder.parent.name if folder.is_file() else folder.name
        return Path("flamingo-nano.bundle" if folder == nano_checkpoint().resolve() else f"{name}.bundle")
    # A live model may be anything until it is looked at, which opening it as a source does.
    config = source.config if isinstance(source, RandomWeights) else getattr(source.model, "config", None)
    return Path(f"flamingo-{config.name}.bundle" if isinstance(config, ModelConfig) else "flamingo.bundle")


def resolve_precision(config: ModelConfig, storage: StorageType | None, policy: Policy | None = None) -> Precision:
    """The precision asked for, or the default for a model of this size."""
    return Precision(storage=storage or default_storage(sum(parameter_counts(config).values())), policy=policy)


def default_limits(config: ModelConfig) -> ShapeLimits:
    """Twice the positions that the model knows, 2048 at least: room for 32 shots, the beams' tokens and a chunk of scratch.

    The cache grows as it is needed, so a high limit costs nothing until it is used.
    """
    return ShapeLimits(max_length=max(2048, 2 * config.language_model.max_positions))
