"""Statistics of one tensor, gathered piece by piece: what is kept does not grow with the data.

Magnitudes are counted in one bin for each upper half of an fp32 number, that is for each bfloat16: 128 bins to an octave over the whole
range, so no range has to be guessed or grown, small numbers are distinguished as well as large ones, and the order in which pieces come
changes no count.
"""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

from flamingo_calibration import thresholds
from flamingo_export.errors import CalibrationError
from flamingo_export.weights.calibration_table import Statistics

_BINS = 1 << 15
_NOT_FINITE = 0x7F80
"""The first bin of infinities and NaN."""


class Collector:
    """Gathers a tensor's statistics. name: for messages. channels: whether the last axis is that of input channels."""

    def __init__(self, name: str, *, channels: bool) -> None:
        self.name, self._channels = name, channels
        self._counts = np.zeros(_BINS, np.int64)
        self._lowest, self._highest = np.inf, -np.inf
        self._squares: npt.NDArray[np.float64] | None = None

    def add(self, array: npt.NDArray[np.float32]) -> None:
        """Counts a piece, float32 [..., channels] or of any shape. Raises CalibrationError if it holds NaN or infinity."""
        if not array.size:
            return
        array = np.ascontiguousarray(array, np.float32)
        bins = (array.view(np.uint32).reshape(-1) >> np.uint32(16)) & np.uint32(_BINS - 1)
        counts = np.bincount(bins, minlength=_BINS)
        if bad := int(counts[_NOT_FINITE:].sum()):
            raise CalibrationError(
                f"{bad} of {array.size} numbers of {self.name} are NaN or infinite in the fp32 reference. "
                "The weights are damaged or not those of this model: flamingo-export inspect shows what a checkpoint is."
            )
        self._counts += counts
        self._lowest = min(self._lowest, float(array.min()))
        self._highest = max(self._highest, float(array.max()))
        if self._channels:
            rows = array.reshape(-1, array.shape[-1])
            squares = np.einsum("rc,rc->c", rows, rows, dtype=np.float64)
            self._squares = squares if self._squares is None else self._squares + squares

    def finish(self) -> Statistics:
        """The statistics of all pieces. Raises CalibrationError if there were none, or all numbers are the same one but zero."""
        total = int(self._counts.sum())
        if not total:
            raise CalibrationError(f"no sample reached {self.name}, so it has no statistics")
        if self._lowest == self._highest == 0:
            return Statistics(amax=0.0, percentile=0.0, mse=0.0, entropy=0.0)
        if self._lowest == self._highest and total > 1:
            raise CalibrationError(
                f"{self.name} is {self._highest:g} in all {total} places: constant activations give no statistics. "
                "The data repeat one token, or the weights are not those of a trained model."
            )
        amax = max(abs(self._lowest), abs(self._highest))
        values, edges, counts = self._histogram(amax)
        tried = thresholds.candidates(amax)
        return Statistics(
            amax=amax,
            percentile=thresholds.percentile(edges, counts),
            mse=thresholds.mse(values, counts, tried),
            entropy=thresholds.entropy(values, counts, tried),
            channel_rms=_packed(self._squares),
        )

    def _histogram(self, amax: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Centre, upper edge and count of each bin that is not empty, ascending. Zeros are left out, as are what is as good as zero."""
        filled = np.flatnonzero(self._counts[:_NOT_FINITE])
        filled = filled[filled > 0] if filled[-1] else filled
        lower, upper = (
            (step.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64) for step in (filled, filled + 1)
        )
        upper = np.minimum(upper, amax)
        return (lower + upper) / 2, upper, self._counts[filled]


def _packed(squares: npt.NDArray[np.float64] | None) -> str:
    """Root mean squares of channels over that of all, from sums of squares, as the table keeps them."""
    if squares is None:
        return ""
    relative = np.sqrt(squares / squares.mean()).astype("<f2")
    return base64.b64encode(relative.tobytes()).decode()
