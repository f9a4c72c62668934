"""measure(): the error that each quantised matrix adds to its layer, one part of the model in memory at a time.

Calibration's walk runs the fp32 reference; of each part, copies with one matrix quantised are run on the same inputs, which lie on the disk.

    hidden --> part ---------> reference's output --> next part
           \\-> part's copy --> compared with it

Inputs are the reference's own, so what is measured is the layer by itself: errors do not add up from part to part.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from flamingo_calibration.layer_runner import Step, Walk
from flamingo_calibration.run import calibrate
from flamingo_calibration.samples import BadSample, Checked, Sample, check_samples
from flamingo_calibration.streams import Stream, Work, append
from flamingo_export.backends.host_memory import release
from flamingo_export.errors import BuildError, CalibrationError, pip_install
from flamingo_export.precision import Policy, Precision, QuantisedType
from flamingo_export.progress import SILENT, Progress
from flamingo_export.quantize.policies import check_policy
from flamingo_export.runtime.tokenizer import Tokenizer
from flamingo_export.sensitivity.divergence import OF_CONTRASTIVE, divergences, no_room
from flamingo_export.sensitivity.findings import LayerError, MatrixError, Sensitivity
from flamingo_export.sensitivity.quantised_copies import QuantisedCopies
from flamingo_export.sensitivity.suggest import extra_bytes, kept_format
from flamingo_export.sources import WeightSource
from flamingo_export.sources.origin import source_digest
from flamingo_export.validate.expected.rounding import HEAD
from flamingo_export.weights import bundle_weights
from flamingo_export.weights.calibration_table import CalibrationTable, check_fits
from flamingo_reference.arrays import Floats32
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn


class _Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy quantises. source: a tensor of the checkpoint that it is made of."""

    name: str
    source: str
    kind: Literal["matrix", "operand"]
    element: QuantisedType


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """Root mean squares over all samples: of the change, of what the part adds, of its output."""

    change: float
    added: float
    output: float

    @property
    def error(self) -> float:
        """Change over what is added. A part behind a gate of zero adds nothing and changes nothing: 0."""
        return self.change / self.added if self.added else 0.0


def measure(
    source: WeightSource,
    samples: Sequence[Sample | BadSample],
    *,
    tokenizer: Tokenizer | None,
    precision: Precision,
    calibration: CalibrationTable | None = None,
    weights_sha256: str | None = None,
    skip_bad: bool = False,
    memory: int | None = None,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Errors of all that the precision's policy quantises, against the fp32 reference on the samples.

    The error of a matrix (or operand of attention) is what quantising it by itself, with its input where the policy quantises that, changes
    of the output of its layer: rms of the difference over rms of what the layer adds, which is its output minus the hidden states
    that it was given. The resampler, the vision encoder and the towers of a contrastive encoder, each one layer here, have no such
    residual, nor has the head: of them it is the rms of the output itself (latents, features, embeddings, logits). Keys and values of
    media belong to the gated block that reads them.

    calibration: ranges of activations; None measures them on the samples, where the policy needs any. weights_sha256: of the source,
    where it is known; else it is worked out to check the table. memory: bytes for the whole model, whose logits are compared where
    it fits; None is what the machine has free.

    Raises BuildError (a policy with rules that match nothing, or that quantises nothing of this model), CalibrationError (torch missing,
    samples that cannot be used, a table of other weights, numbers that are not finite).
    """
    if importlib.util.find_spec("torch") is None:
        raise CalibrationError(f"sensitivity runs the PyTorch reference. Install it: {pip_install('torch')}")
    targets = _targets(source.config, precision)
    if calibration is not None:
        if weights_sha256 is None:
            weights_sha256 = source_digest(source) if source.digested else source.record({}).sha256
        check_fits(calibration, source.config, weights_sha256)
    checked = check_samples(samples, source, tokenizer, skip_bad=skip_bad, progress=progress)
    if calibration is None and precision.policy is not None and precision.policy.needs_ranges:
        calibration = calibrate(source, samples, tokenizer=tokenizer, skip_bad=skip_bad, progress=progress)
    copies = QuantisedCopies(source.config, precision, calibration)
    with tempfile.TemporaryDirectory(prefix="flamingo-sensitivity-") as folder:
        matrices, layers = _Measuring(source, checked, precision, copies, targets, Path(folder), progress).run()
    reason, kl = no_room(source.config, precision, memory), None
    if not reason:
        named = {layer.name: {each.name for each in matrices if each.layer == layer.name} for layer in layers}
        kl, of_layers = divergences(source, checked, copies, named, progress)
        layers = [msgspec.structs.replace(layer, kl=of_layers[layer.name]) for layer in layers]
    return Sensitivity(
        config=source.config,
        precision=precision,
        samples=len(checked.samples),
        tokens=checked.num_tokens,
        images=checked.num_media,
        matrices=tuple(sorted(matrices, key=lambda each: (-each.error, each.name))),
        layers=tuple(layers),
        kl=kl,
        no_kl=reason,
    )


def _targets(config: ModelConfig, precision: Precision) -> list[_Target]:
    """All that the policy quantises. Raises BuildError if that is nothing."""
    policy = precision.policy or Policy(name=precision.storage)
    weights = [weight for weight in bundle_weights(config, precision) if weight.product]
    check_policy(policy, [weight.name for weight in weights])
    found: list[_Target] = []
    for weight in weights:
        how = weight.quantisation(precision)
        if how is not None:
            found.append(_Target(name=weight.name, source=weight.sources[0], kind="matrix", element=how.element))
        found += [
            _Target(name=name, source=weight.sources[0], kind="operand", element="fp8") for name in weight.operands(precision)
        ]
    if not found:
        raise BuildError(
            f"policy {policy.name!r} quantises no matrix of {config.name}, so it adds no error. Give one that does: --fp8, --int8, --int4, "
            "or a file with other rules (docs/precision.md)"
        )
    return found


class _Measuring:
    def __init__(
        self,
        source: WeightSource,
        checked: Checked,
        precision: Precision,
        copies: QuantisedCopies,
        targets: Sequence[_Target],
        folder: Path,
        progress: Progress,
    ) -> None:
        self.source, self.config, self.precision, self.copies, self.progress = (
            source,
            source.config,
            precision,
            copies,
            progress,
        )
        self.targets = targets
        self.extra = extra_bytes(source.config, precision)
        self.work = Work(folder, "")
        self.walk = Walk(source, checked, self.work)

    def run(self) -> tuple[list[MatrixError], list[LayerError]]:
        """All parts in order."""
        import torch

        from flamingo_reference.model.modules import load_part

        steps = list(self.walk.steps())
        quantised = [self._of(step) for step in steps]
        runs = [bool(step.output) + len(found) + (len(found) > 1) for step, found in zip(steps, quantised, strict=True)]
        self.progress.stage("measuring", sum(len(step.shapes) * count for step, count in zip(steps, runs, strict=True)))
        matrices: list[MatrixError] = []
        layers: list[LayerError] = []
        for number, (step, found) in enumerate(zip(steps, quantised, strict=True)):
            if step.output is not None or found:
                module = load_part(self.config, step.prefix, self.source.read)
                with torch.no_grad():
                    expected = self._expected(step, module)
                    if found:
                        each, together = self._part(step, module, found, expected)
                        matrices += each
                        layers.append(together)
                del module, expected
                release()
            self.work.keep(self.walk.needed(steps, number + 1))
        return matrices, layers

    def _of(self, step: Step) -> list[_Target]:
        """What is quantised of a part. The head goes with the norm before it, whatever tensor it is made of."""
        if step.prefix == "language_model":
            return [target for target in self.targets if target.name == HEAD and step.output is None]
        return [target for target in self.targets if target.name != HEAD and target.source.startswith(f"{step.prefix}.")]

    def _expected(self, step: Step, module: nn.Module) -> Callable[[int], Floats32]:
        """What the reference makes of each item: written for the next part, but for logits, which are worked out again."""
        if step.output is None:
            return lambda index: _logits(step, module, index)
        stream = self.work.stream(step.output, step.shapes)
        with stream.writing() as file:
            for index in range(len(step.shapes)):
                append(file, step.run(module, index).numpy())
                self.progress.advance(1)
        return stream.read

    def _part(
        self, step: Step, module: nn.Module, found: Sequence[_Target], expected: Callable[[int], Floats32]
    ) -> tuple[list[MatrixError], LayerError]:
        layer = layer_name(self.config, step.prefix)
        errors = {target.name: self._error(step, module, {target.name}, expected) for target in found}
        whole = self._error(step, module, set(errors), expected) if len(found) > 1 else errors[found[0].name]
        matrices = [
            MatrixError(
                name=target.name,
                layer=layer,
                kind=target.kind,
                element=target.element,
                error=errors[target.name].error,
                keep=kept_format(target.element),
                extra_bytes=self.extra.get(target.name, 0),
            )
            for target in found
        ]
        return matrices, LayerError(name=layer, error=whole.error, share=whole.added / whole.output if whole.output else 0.0)

    def _error(self, step: Step, module: nn.Module, names: set[str], expected: Callable[[int], Floats32]) -> _Found:
        copy = self.copies.of(module, step.prefix, names)
        residual: Stream | None = step.hidden if step.output is not None else None
        squares, count = np.zeros(3), 0
        for index in range(len(step.shapes)):
            actual = _logits(step, copy, index) if step.output is None else step.run(copy, index).numpy()
            output = expected(index).astype(np.float64)
            added = output if residual is None else output - residual.read(index)
            squares += [float(np.square(each).sum()) for each in (actual - output, added, output)]
            count += output.size
            self.progress.advance(1)
        if not np.isfinite(squares).all():
            raise CalibrationError(
                f"outputs of {layer_name(self.config, step.prefix)} are NaN or infinite, with {', '.join(sorted(names))} quantised or without. "
                "The weights are damaged, or the calibration table's ranges are invalid."
            )
        change, added_rms, output_rms = (math.sqrt(each / count) for each in squares)
        return _Found(change=change, added=added_rms, output=output_rms)


def _logits(step: Step, module: Any, index: int) -> Floats32:
    """Logits [S, V] of an item's last hidden states."""
    import torch

    assert step.hidden is not None  # of the head's step it never is
    logits: Floats32 = module.logits(torch.from_numpy(step.hidden.read(index))).numpy()
    return logits


def layer_name(config: ModelConfig, prefix: str) -> str:
    """What a part of the reference is called in a bundle."""
    kind, _, index = prefix.rpartition(".")
    if kind == "cross_attention":
        return f"decoder/layer.{config.gated_layers[int(index)]}/cross_attention"
    if kind == "language_model.layers":
        return f"decoder/layer.{index}"
    if prefix.startswith("contrastive."):
        return OF_CONTRASTIVE[prefix]
    return HEAD if prefix == "language_model" else prefix
