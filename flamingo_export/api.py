"""What `import flamingo_export` gives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from flamingo_export.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from flamingo_export.backends.base import Backend, SessionOptions
    from flamingo_export.bundle.manifest import Manifest, ShapeLimits
    from flamingo_export.pipeline.build_request import BuildBackend, ParityMode
    from flamingo_export.pipeline.run import BuildResult
    from flamingo_export.precision import Policy, StorageType
    from flamingo_export.runtime.contrastive import ContrastiveEncoder
    from flamingo_export.runtime.model import Model
    from flamingo_export.sources.choice import Source
    from flamingo_reference.model import Flamingo

DEFAULT_ROWS = 16
_log = logging.getLogger(__name__)


def build(
    model: Path | str | Flamingo | Source,
    *,
    out: Path | str | None = None,
    storage: StorageType | None = None,
    policy: Policy | str | None = None,
    calibration: Path | str | None = None,
    uncalibrated: bool = False,
    limits: ShapeLimits | None = None,
    card: str | None = None,
    parts: int = 1,
    tokenizer: Path | None = None,
    vision_encoder: nn.Module | None = None,
    parity: ParityMode = "auto",
    overwrite: bool = False,
    resume: bool = True,
    backend: BuildBackend = "onnxruntime",
    target: str | None = None,
    progress: Progress = SILENT,
) -> BuildResult:
    """Builds a bundle and publishes it at `out` once it is complete and, where PyTorch is installed, parity has passed.

    model: a checkpoint folder, a live `flamingo_reference.model.Flamingo`, or a source such as `sources.choice.source_for_size("9b")`.
    out: the bundle; None takes `pipeline.build_request.default_out`.
    storage: how weights are stored, "fp32", "fp16" or "bf16"; None takes fp32 below a billion parameters, bf16 above.
    policy: which matrices are quantised, "fp8", "int8", "int4" or one of `quantize.policies.read_policy`.
    calibration: the table of activation ranges for it; without one the model is calibrated first, unless `uncalibrated`.
    limits: sizes that the bundle is made for; None takes those of the model and, for engines, as many requests as fit on the card.
    card: what engines will run on, "H200", "48GB" or "2xH100"; None is this machine's GPU.
    parts: graphs that the decoder is cut into, run one after the other.
    tokenizer: the `tokenizer.json` that a live model was trained with.
    vision_encoder: for a checkpoint in our own format whose config says `"vision": {"type": "own", ...}`, the module from pixels
        [F, 3, I, I] to features [F, P, E] that its bridge was trained on. It is traced with torch.onnx and proved by parity like the
        rest. (A live model has it as its `vision_encoder`.)
    parity: "auto" compares with PyTorch where it is installed, "skip" does not.
    overwrite: replaces a bundle at `out`.
    resume: takes up what an interrupted build of the same request has finished.
    backend: "onnxruntime" runs the graphs as they are; "tensorrt-rtx" and "tensorrt" compile engines beside them.
    target: the GPU that engines are for, such as "sm89"; None for this machine's.
    progress: hears how far it is.

    Returns the bundle's path, its manifest and what a user should know about it. An interrupted build resumes where it stopped.

    Raises CheckpointError (weights missing, unknown, misshapen or not finite), UnsupportedModel (a live model with parts that are not
    known), CalibrationError (a table that does not fit, activations that give none), BuildError (output taken, no space, another build to
    the same path, a policy that model or backend cannot follow), ParityError (parity failed or could not be run).
    """
    from flamingo_export.backends.registry import COMPILERS
    from flamingo_export.errors import BuildError
    from flamingo_export.pipeline import run
    from flamingo_export.pipeline.build_request import BuildRequest, default_out
    from flamingo_export.pipeline.card import read_card
    from flamingo_export.quantize.policies import preset
    from flamingo_export.sources.choice import with_vision_encoder

    if target is not None and backend not in COMPILERS:
        raise BuildError(f"target is {target!r}, but only engines have one: add backend='tensorrt-rtx'")
    source = _source(model, tokenizer)
    chosen = preset(policy) if isinstance(policy, str) else policy
    if vision_encoder is not None:
        source = with_vision_encoder(source, vision_encoder)
    request = BuildRequest(
        source=source,
        out=Path(out) if out is not None else default_out(source, chosen),
        storage=storage,
        policy=chosen,
        calibration=Path(calibration) if calibration is not None else None,
        uncalibrated=uncalibrated,
        limits=limits,
        card=None if card is None else read_card(card),
        parts=parts,
        parity=parity,
        overwrite=overwrite,
        resume=resume,
        backend=backend,
        target=target,
    )
    return run.build(request, progress=progress)


def refit(
    bundle: Path | str,
    model: Path | str | Flamingo | Source,
    *,
    out: Path | str,
    parity: ParityMode = "auto",
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> BuildResult:
    """A new bundle at `out`: the graphs of `bundle` with the weights of `model`, another of the same shapes, a fine-tuned one say.

    model: as `build` takes it. Stored in the bundle's type, within its limits, proved and published as `build` does.
    Raises what `build` raises; BundleError if `bundle` is damaged; CheckpointError naming every setting in which the two differ.
    """
    from flamingo_export.pipeline import run
    from flamingo_export.pipeline.build_request import refit_request

    request = refit_request(Path(bundle), _source(model, None), Path(out), parity=parity, overwrite=overwrite)
    return run.build(request, progress=progress)


def load(
    bundle: Path | str,
    *,
    backend: str = "auto",
    device: str = "cpu",
    threads: int = 0,
    fallback: str | None = None,
    rows: int | None = None,
    queue: int | None = None,
) -> Model:
    """Opens a bundle to generate text with: `load("nano.bundle").generate("<image>Output:", images=["a.png"])`.

    backend: a name of `backends.registry.BACKEND_NAMES`, or `auto`: TensorRT where an engine in the bundle fits this machine,
        else ONNX Runtime. PyTorch is not needed.
    device: `cpu`, `cuda`, one GPU of several, `cuda:1`, or several, `cuda:0,cuda:1`, among which the decoder's parts are shared by memory
        (`build(parts=...)`). Engines run on GPU 0 unless another is named.
    threads: 0 takes the physical cores.
    fallback: a backend to use where the other one cannot run the bundle, which is logged as a warning.
    rows: requests that run at once; None takes 16, or as many as the engines were built for or as fit in memory.
    queue: requests that may wait beside them; None is any number.

    Raises BundleError (incomplete, damaged, of a newer schema), BackendError (unknown or not installed, device missing, an engine that
    does not fit this machine).
    """
    from flamingo_export.backends.base import SessionOptions
    from flamingo_export.backends.registry import get_backend
    from flamingo_export.bundle.earlier import completed
    from flamingo_export.bundle.verify import open_bundle
    from flamingo_export.errors import BackendError

    path = Path(bundle)
    manifest = completed(path, open_bundle(path))
    options = SessionOptions(threads=threads, device=device)
    try:
        chosen = get_backend(backend, manifest, gpus=options.gpus)
        fitting = _fitting_rows(path, manifest, chosen, options, rows)
        return _opened(path, manifest, chosen, options, fitting, queue)
    except BackendError as error:
        if fallback is None:
            raise
        other = get_backend(fallback, manifest, gpus=options.gpus)
        try:
            fitting = _fitting_rows(path, manifest, other, options, rows)
        except BackendError as short:
            raise BackendError(f"{error} --fallback {fallback}: {short}") from error
        _log.warning("using %s instead: %s", other.name, error)
        return _opened(path, manifest, other, options, fitting, queue)


def load_encoder(
    bundle: Path | str, *, backend: str = "auto", device: str = "cpu", threads: int = 0, fallback: str | None = None
) -> ContrastiveEncoder:
    """Opens a bundle's contrastive encoder without its decoder: `load_encoder("nano.bundle").classify("a.png", ["a red circle", "a cross"])`.

    backend, device, threads, fallback: as `load` takes them. Graphs are opened when they are first used.
    Raises BundleError (incomplete, damaged, of a newer schema, or without a contrastive encoder), BackendError.
    """
    from flamingo_export.backends.base import SessionOptions
    from flamingo_export.backends.registry import get_backend
    from flamingo_export.bundle.verify import open_bundle
    from flamingo_export.errors import BackendError
    from flamingo_export.runtime.contrastive import ContrastiveEncoder

    path = Path(bundle)
    manifest = open_bundle(path)
    options = SessionOptions(threads=threads, device=device)
    try:
        chosen = get_backend(backend, manifest, gpus=options.gpus)
    except BackendError as error:
        if fallback is None:
            raise
        chosen = get_backend(fallback, manifest, gpus=options.gpus)
        _log.warning("using %s instead: %s", chosen.name, error)
    return ContrastiveEncoder(path, manifest, chosen, options)


def _opened(
    path: Path, manifest: Manifest, backend: Backend, options: SessionOptions, rows: int | None, queue: int | None
) -> Model:
    from flamingo_export.runtime.model import Model

    policy = manifest.precision.policy
    if not backend.capabilities.fp8_products and policy is not None and policy.needs_ranges:
        _log.warning(
            "%s has no products of FP8: it computes them in fp32, at fp32's speed and memory, which is only for parity. "
            "For speed on a CPU build with --int4 or --int8.", backend.name
        )  # fmt: skip
    return Model(path, manifest, backend, options, rows=rows, queue=queue)


def _fitting_rows(path: Path, manifest: Manifest, backend: Backend, options: SessionOptions, rows: int | None) -> int | None:
    """Rows of the cache: those asked for, else as many full ones as fit beside the weights, at most 16; None leaves it to the engine.

    Raises BackendError if the weights, as ONNX Runtime holds them on a CPU, or the rows asked for do not fit in the memory there is: a
    process that takes more is killed without a word.
    """
    from flamingo_export.errors import BackendError
    from flamingo_export.estimates import cache_bytes, opened_weights, rounded_apart
    from flamingo_export.machine import available_memory
    from flamingo_export.weights import WeightIndex

    if not backend.capabilities.widens_weights or options.device != "cpu":
        return rows
    needed, available = opened_weights(WeightIndex.read(path)), available_memory()
    if needed > available:
        blocks = manifest.precision.policy is not None and not manifest.precision.policy.needs_ranges
        advice = "Free some" if blocks else "Build it with --int4 or --int8, whose codes stay as they are, free some"
        wanted, there = rounded_apart(needed, available)
        raise BackendError(
            f"the weights of {path.name} take {wanted} of memory on a CPU, where 16 bits and FP8 are widened to fp32; "
            f"{there} are available. {advice}, or run it on a GPU."
        )
    each = cache_bytes(manifest.config, positions=manifest.limits.max_length, width=4)
    fitting = (available - needed) // each
    if rows is not None and rows > max(1, fitting):
        raise BackendError(
            f"{rows} rows of {manifest.limits.max_length} cache slots take {rows * each / 2**30:.1f} GiB beside the weights of {path.name}; "
            f"there is room for {max(1, fitting)}. Ask for fewer (--rows), or build with a smaller --max-length."
        )
    return rows if rows is not None else max(1, min(DEFAULT_ROWS, fitting))


def _source(model: Path | str | Flamingo | Source, tokenizer: Path | None) -> Source:
    from flamingo_export.sources.choice import CheckpointFolder, LiveModel, RandomWeights

    if isinstance(model, (CheckpointFolder, RandomWeights, LiveModel)):
        return model
    if isinstance(model, (str, Path)):
        return CheckpointFolder(path=Path(model))
    return LiveModel(model=model, tokenizer=tokenizer)
