"""Keys and values of media as a bundle's bank holds them: fp32 numbers, or E4M3 codes and the scales that the calibration table gives.

The scales are worked out from the table and not read from the bundle, so that one which was stored wrong is found.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from flamingo_export.precision import E4M3_LARGEST, Precision
from flamingo_export.quantize.matrices import FP8, range_scale
from flamingo_export.validate.expected import inputs
from flamingo_export.weights.calibration_table import CalibrationTable
from flamingo_reference.arrays import Array
from flamingo_reference.config import ModelConfig

BANK_ROWS = 32
_DRAWN_PEAK = 8.0
"""No number drawn from the standard distribution comes near it."""


class MediaFormat:
    """What a bank holds of media_k.i and media_v.i [N, Hx, R, Dx]."""

    def __init__(self, precision: Precision, calibration: CalibrationTable | None = None) -> None:
        self._fp8 = precision.media == "fp8"
        self._calibration = calibration

    def drawn(self, config: ModelConfig, i: int, rows: int) -> tuple[Array, Array]:
        """media_k.i and media_v.i float32 [rows, G, R, Dx] of cases whose media are drawn; small enough for the bank."""
        block = config.cross_attention
        shape = (BANK_ROWS, block.kv_heads, config.resampler.num_latents, block.head_size)
        k, v = (self._fitting(i, kind) * inputs.normal(f"bank/{kind}.{i}", shape)[:rows] for kind in "kv")
        return k, v

    def codes(self, name: str, values: Array) -> Array:
        """Numbers of media_k.i or media_v.i as E4M3 codes, what is beyond their range as the largest."""
        codes: Array = np.clip(values / self._scale(name), -E4M3_LARGEST, E4M3_LARGEST).astype(FP8)
        return codes

    def numbers(self, name: str, held: Array) -> Array:
        """What an engine gave of media_k.i or media_v.i in float32, whichever way the bank holds it."""
        if held.dtype != ml_dtypes.float8_e4m3fn:
            return held
        numbers: Array = held.astype(np.float32) * np.float32(self._scale(name))
        return numbers

    def rounded(self, name: str, values: Array) -> Array:
        """Numbers of media_k.i or media_v.i as the bank gives them back."""
        return self.numbers(name, self.codes(name, values)) if self._fp8 else values

    def _fitting(self, i: int, kind: str) -> np.float32:
        largest = E4M3_LARGEST * self._scale(f"media_{kind}.{i}") if self._fp8 else _DRAWN_PEAK
        return np.float32(min(1.0, largest / _DRAWN_PEAK))

    def _scale(self, name: str) -> float:
        stem, _, i = name.partition(".")
        key = f"media_kv/layer.{i}/{stem.removeprefix('media_')}"
        return range_scale(self._calibration.threshold(key) if self._calibration is not None else E4M3_LARGEST)


FLOATS = MediaFormat(Precision(storage="fp32"))
"""A bank of numbers as they are."""
