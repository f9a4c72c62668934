"""What `measure` found."""

from __future__ import annotations

from typing import Literal

import msgspec

from flamingo_export.precision import Precision, QuantisedType
from flamingo_reference.config import ModelConfig


class MatrixError(msgspec.Struct, frozen=True, kw_only=True):
    """A matrix, or an operand of attention, and the error that quantising only it adds to its layer.

    error: rms of the change of the layer's output over the rms of what the layer adds (see `measure`). keep: the format with more bits
    that it may be kept in, for extra_bytes more in the bundle; the head of tied models has less (negative) where the embedding serves.
    """

    name: str
    layer: str
    kind: Literal["matrix", "operand"]
    element: QuantisedType
    error: float
    keep: Literal["storage", "int8"]
    extra_bytes: int


class LayerError(msgspec.Struct, frozen=True, kw_only=True):
    """A layer with all of it that the policy quantises quantised.

    error: as of a matrix. share: rms of what the layer adds over that of its output, 1 where it has no residual. kl: mean divergence of the
    logits from the reference's in nats, None where the whole model was not run.
    """

    name: str
    error: float
    share: float
    kl: float | None = None


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of a policy's quantisations on some samples.

    matrices: largest error first. layers: in the order of the model. kl: mean divergence of the logits in nats with everything quantised;
    None where the whole model was not run, for the reason in `no_kl`.
    """

    config: ModelConfig
    precision: Precision
    samples: int
    tokens: int
    images: int
    matrices: tuple[MatrixError, ...]
    layers: tuple[LayerError, ...]
    kl: float | None = None
    no_kl: str = ""
