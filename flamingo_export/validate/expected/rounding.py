"""A reference model's parts with the numbers that a bundle holds: rounded to its storage type, or quantised and widened again.

What it rounds is written here a second time, from the policy and the checkpoint's weights, in PyTorch: the bundle's files are not read.
Quantised activations are rounded by hooks on the products they go into:

    fp8           to E4M3 times the table's scale, as the graph says
    int8, int4    to 8 bits in the weights' blocks: what ONNX Runtime's block-quantised product does to its input (accuracy level 4). A backend
                  that multiplies in 16 bits is closer to the reference than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flamingo_export.precision import E4M3_LARGEST, Precision, Quantisation, StorageType
from flamingo_export.quantize.matrices import dequantised, quantised, range_scale
from flamingo_export.validate.checks.stored_codes import codes_digest, int8_rounding
from flamingo_export.weights import Weight, bundle_weights
from flamingo_export.weights.calibration_table import CalibrationTable
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

_GATE = "_gate"
HEAD = "decoder/head"
DISTANCES = "/distances"
"""Of projected distances, which a bundle holds worked out: the table is rounded, not the matrix that it is made with."""


class StoredRounding:
    """Makes parts of a model what a bundle of this precision holds."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        calibration: CalibrationTable | None = None,
        *,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        """only: which weights and operands of attention are changed, by their names in the bundle; the others stay as they are. None is all."""
        self.precision = precision
        self._only = only if only is not None else lambda _: True
        self._calibration = calibration
        weights = [weight for weight in bundle_weights(config, precision) if not weight.full_precision]
        # Quantised ones first: a tied head is made of the embedding as it was, not as it is rounded for itself.
        self._weights = sorted(weights, key=lambda weight: weight.quantisation(precision) is None)
        self._tied = config.language_model.tied_head
        self.code_digests: dict[str, str] = {}
        """Of each quantised matrix and operand that was applied so far: digest of what the bundle must hold (`stored_codes`)."""
        self.roundings: dict[str, float] = {}
        """Of each matrix in int8 that was applied so far: `stored_codes.int8_rounding`."""

    @property
    def exact(self) -> bool:
        """Whether fp32 numbers stay as they are."""
        return self.precision.policy is None and self.precision.storage == "fp32"

    def apply(self, module: nn.Module, prefix: str) -> None:
        """Parameters to fp32 as the bundle stores them, in place; activations of quantised products are rounded from now on.

        prefix: the module's name in the model, empty for the whole.
        """
        for parameter in module.parameters():
            parameter.data = parameter.data.float()
        parameters = {f"{prefix}.{name}" if prefix else name: parameter for name, parameter in module.named_parameters()}
        for weight in self._weights:
            matrices = [name for name in weight.sources if name.endswith(".weight")]
            if not matrices or matrices[0] not in parameters:
                continue
            operands = [self._scale(name) if self._only(name) else None for name in weight.operands(self.precision)]
            for name, scale in zip(weight.operands(self.precision), operands, strict=True):
                if scale is not None:
                    self.code_digests[name] = codes_digest(np.array(scale, np.float32))
            if any(operands):
                owner = module.get_submodule(matrices[0].rsplit(".", 2)[0].removeprefix(prefix).removeprefix("."))
                if weight.group == "media_kv":
                    _round_media(owner, ("k_proj", "v_proj").index(weight.name.rpartition("/")[2]), operands[0] or 1.0)
                else:
                    _round_operands(owner, operands)
            if not self._only(weight.name):
                continue
            how = weight.quantisation(self.precision)
            if how is not None:
                self._quantise(module, prefix, weight, how, parameters)
                continue
            if weight.name.endswith(DISTANCES):
                owner = module.get_submodule(matrices[0].removesuffix(".weight").removeprefix(prefix).removeprefix("."))
                _round_table(owner, self.precision.element(weight.name))
                continue
            gate = next((parameters[name].data for name in weight.sources if name.endswith(_GATE)), None)
            for name in matrices:
                parameters[name].data = as_stored(parameters[name].data, gate, self.precision.element(weight.name))

    def _quantise(
        self, module: nn.Module, prefix: str, weight: Weight, how: Quantisation, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        import torch

        sources = [parameters[name].data.numpy() for name in weight.sources]
        importance = None
        if self._calibration is not None and how.element != "fp8":
            channels = self._calibration.rms(weight.name)
            importance = np.square(channels) if channels.size else None
        codes, scales = quantised(np.ascontiguousarray(weight.make(sources)), how, importance)
        inputs = [np.array(self._scale(weight.name), np.float32)] if how.element == "fp8" else []
        self.code_digests[weight.name] = codes_digest(codes, scales, *inputs)
        matrix = dequantised(codes, scales, how)
        if how.element == "int8":
            self.roundings[weight.name] = int8_rounding(weight.make(sources), matrix, how.block)
        names = [name for name in weight.sources if name.endswith(".weight")]
        gate = next((parameters[name].data for name in weight.sources if name.endswith(_GATE)), None)
        found = torch.from_numpy(np.ascontiguousarray(matrix.T)).split([len(parameters[name]) for name in names])
        round_input = self._rounding(weight, how)
        for name, part in zip(names, found, strict=True):
            if weight.name == HEAD:
                self._head(module, part, prefix, round_input)
                continue
            parameters[name].data = part if gate is None else ungated(parameters[name].data, part, gate)
            owner = name.removesuffix(".weight").removeprefix(f"{prefix}." if prefix else "")
            module.get_submodule(owner).register_forward_pre_hook(lambda _, arguments: (round_input(arguments[0]),))

    def _head(self, module: Any, matrix: Tensor, prefix: str, round_input: Any) -> None:
        """The head is applied as a function of its weight; a tied one gets a matrix of its own, as in the bundle."""
        import torch

        language_model = module if prefix else module.language_model
        if self._tied:
            width = matrix.shape[1]
            language_model.head = torch.nn.Linear(width, len(matrix), bias=False)
        language_model.head.weight = torch.nn.Parameter(matrix, requires_grad=False)
        language_model.norm.register_forward_hook(lambda _, __, result: round_input(result))

    def _rounding(self, weight: Weight, how: Quantisation) -> Any:
        if how.element != "fp8":
            return lambda x: rounded_in_blocks(x, how.block)
        scale = self._scale(weight.name)
        return lambda x: rounded_to_fp8(x, scale)

    def _scale(self, name: str) -> float:
        return range_scale(self._calibration.threshold(name) if self._calibration is not None else E4M3_LARGEST)


def _round_table(projection: Any, storage: StorageType) -> None:
    """Projected distances as they are stored, from now on."""
    projection.register_forward_hook(lambda _, __, found: as_stored(found, None, storage).to(found.dtype))


def _round_operands(layer: Any, scales: list[float | None]) -> None:
    """Queries, keys and values as they enter attention, queries with their bias for contents, through E4M3 from now on; None is left."""

    def rounded(_: Any, __: Any, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x if scale is None else rounded_to_fp8(x, scale) for x, scale in zip(operands, scales, strict=True))

    layer.operands.register_forward_hook(rounded)


def _round_media(block: Any, which: int, scale: float) -> None:
    """Keys (0) or values (1) of media through E4M3 from now on."""

    def rounded(_: Any, __: Any, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(rounded_to_fp8(x, scale) if index == which else x for index, x in enumerate(found))

    block.media.register_forward_hook(rounded)


def as_stored(weight: Tensor, gate: Tensor | None, storage: StorageType) -> Tensor:
    """A weight [out, in] in fp32 as the bundle stores it: rounded, where it is gated after it was multiplied by tanh(gate), [] or [out].

    The product is divided by the factor again, since the model that it goes into applies the gate itself.
    """
    import torch

    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    if gate is None or storage == "fp32":
        return weight.float().to(stored).float()
    factor = gate.double().tanh().float().reshape(-1, 1)
    return ungated(weight.float(), (weight.float() * factor).to(stored).float(), gate)


def ungated(weight: Tensor, gated: Tensor, gate: Tensor) -> Tensor:
    """What `gated` [out, in] is without its factor tanh(gate); the weight itself where that is zero, since nothing comes through."""
    import torch

    factor = gate.double().tanh().float().reshape(-1, 1)
    return torch.where(factor == 0, weight, gated / factor)


def rounded_to_fp8(x: Tensor, scale: float) -> Tensor:
    """x rounded to E4M3 times scale, what is beyond its range to its largest number."""
    import torch

    return (x / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale


def rounded_in_blocks(x: Tensor, block: int) -> Tensor:
    """x rounded to 8 bits, each `block` channels with a scale of their own."""
    import torch

    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    least = max(1e-30, torch.finfo(x.dtype).tiny)  # of a block of zeros
    rounded: Tensor = (blocks / scale.clamp_min(least)).round() * scale
    return rounded.flatten(-2)


def rounded_names(config: ModelConfig) -> Iterator[tuple[str, str | None]]:
    """Checkpoint tensors that reach a bundle in its storage type, each with the gate that it is multiplied by, if any."""
    for weight in bundle_weights(config):
        if not weight.full_precision:
            gate = next((source for source in weight.sources if source.endswith(_GATE)), None)
            yield from ((name, gate) for name in weight.sources if name.endswith(".weight"))
