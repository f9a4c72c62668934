"""What a build is asked to do, resolved once at the edge: from here on nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from flamingo_export.backends.compiler import Compiler
from flamingo_export.bundle.manifest import ShapeLimits, read_manifest
from flamingo_export.pipeline.card import Card, chosen_limits
from flamingo_export.precision import Policy, Precision, StorageType, default_storage
from flamingo_export.quantize.policies import for_model
from flamingo_export.sources.choice import CheckpointFolder, RandomWeights, Source, nano_checkpoint
from flamingo_reference.config import ModelConfig
from flamingo_reference.names import parameter_counts

BuildBackend = Literal["onnxruntime", "tensorrt-rtx", "tensorrt"]
ParityMode = Literal["auto", "skip"]
"""auto: against PyTorch where it is installed, else the manifest says `not_run`. skip: the manifest says `not_run`."""


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One build.

    storage: None takes fp32 below a billion parameters, bf16 above. policy: which matrices are quantised, None is none. calibration: the
    table of activation ranges for it; without one the model is calibrated first, unless `uncalibrated`. limits: None takes those of
    `card.chosen_limits` with max_length, max_batch and, for engines, card (None: this machine's GPU, where they are for it).
    overwrite: a bundle at `out` is replaced once the new one is complete. resume: take up what an interrupted build
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
    max_length: int | None = None
    max_batch: int | None = None
    card: Card | None = None
    parity: ParityMode = "auto"
    overwrite: bool = False
    resume: bool = True
    backend: BuildBackend = "onnxruntime"
    target: str | None = None
    parts: int = 1
    graphs_of: Path | None = None


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
    chosen = None if policy is None else for_model(policy, config)
    return Precision(storage=storage or default_storage(_model_size(config)), policy=chosen)


def resolve_limits(
    request: BuildRequest, config: ModelConfig, precision: Precision, compiler: Compiler | None
) -> tuple[ShapeLimits, str | None]:
    """The limits asked for, or those that suit model and card, and what a user should know about them."""
    if request.limits is not None:
        return request.limits, None
    card = None
    if compiler is not None:
        here = compiler.card_memory()
        card = request.card or (Card(name="this machine's GPU", memory=here) if here else None)
    return chosen_limits(config, precision, length=request.max_length, batch=request.max_batch, parts=request.parts, card=card)


def _model_size(config: ModelConfig) -> int:
    """Parameters of the model itself: a contrastive encoder beside it does not change the type that it is stored in."""
    return sum(count for component, count in parameter_counts(config).items() if component != "contrastive")
