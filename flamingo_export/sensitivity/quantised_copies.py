"""Copies of a reference module that share its weights, but for those that are quantised in them."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from flamingo_export.precision import Precision
from flamingo_export.validate.expected.rounding import StoredRounding
from flamingo_export.weights.calibration_table import CalibrationTable
from flamingo_reference.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn


class QuantisedCopies:
    """Makes copies of parts of one model under one precision. calibration: None where activations are not quantised."""

    def __init__(self, config: ModelConfig, precision: Precision, calibration: CalibrationTable | None) -> None:
        self._config, self._precision, self._calibration = config, precision, calibration

    def of(self, module: nn.Module, prefix: str, quantised: Container[str]) -> Any:
        """The module with these matrices and operands quantised; all else is the very same numbers, in the same memory.

        module: in fp32, left as it is. prefix: its name in the model, empty for the whole.
        """
        import torch

        shared: dict[int, Any] = {
            id(parameter): torch.nn.Parameter(parameter.data, requires_grad=False) for parameter in module.parameters()
        }
        changed = copy.deepcopy(module, shared)
        StoredRounding(self._config, self._precision, self._calibration, only=quantised.__contains__).apply(changed, prefix)
        return changed
