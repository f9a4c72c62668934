"""Clipping thresholds from a histogram: the magnitude that the largest quantised number should stand for.

A threshold below the largest number seen clips the few that are above it, and gives the others finer steps. All methods leave zeros out:
they are exact whatever the threshold. Sources: Migacz 2017 (entropy, "8-bit inference with TensorRT"), Wu et al. 2020 (arXiv 2004.09602).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flamingo_export.precision import E4M3_LARGEST
from flamingo_reference.arrays import Floats

Rounding = Callable[[Floats, Floats], Floats]
"""(magnitudes, thresholds) -> what is left of the magnitudes; broadcasts."""

PERCENTILE = 99.99
_PER_OCTAVE, _OCTAVES = 32, 8
_MOST_CLIPPED = 0.1
"""Share of the numbers beyond which `entropy` looks no further: such a threshold is not a candidate, and trying them all takes time."""


def e4m3(magnitudes: Floats, thresholds: Floats) -> Floats:
    """Magnitudes clipped to a threshold and rounded to E4M3, the threshold being its largest number."""
    scales = np.asarray(thresholds) / E4M3_LARGEST
    kept = np.minimum(magnitudes / scales, E4M3_LARGEST).astype(ml_dtypes.float8_e4m3fn)
    rounded: Floats = kept.astype(np.float64) * scales
    return rounded


def candidates(amax: float) -> Floats:
    """Thresholds that are tried: 32 to an octave, from `amax` eight octaves down."""
    tried: Floats = amax * 2.0 ** (-np.arange(_PER_OCTAVE * _OCTAVES + 1) / _PER_OCTAVE)
    return tried


def percentile(edges: Floats, counts: npt.NDArray[Any], share: float = PERCENTILE) -> float:
    """Upper edge of the bin that this share (per cent) of the numbers is reached in. edges, counts: [bins], ascending."""
    reached = np.cumsum(counts)
    return float(edges[np.searchsorted(reached, share / 100 * reached[-1])])


def mse(values: Floats, counts: npt.NDArray[Any], tried: Floats, rounding: Rounding = e4m3) -> float:
    """The threshold with the least squared error, the largest of equals.

    values, counts: centre and count of each bin [bins]. tried: thresholds, descending; rounding clips to them.
    """
    best, least = float(tried[0]), np.inf
    for threshold in tried:
        if float(counts @ np.maximum(values - threshold, 0) ** 2) > least:
            break  # what clipping by itself costs only grows from here
        error = float(counts @ (rounding(values, threshold) - values) ** 2)
        if error < least:
            best, least = float(threshold), error
    return best


def entropy(values: Floats, counts: npt.NDArray[Any], tried: Floats, rounding: Rounding = e4m3) -> float:
    """The threshold whose rounding leaves most of the distribution: least Kullback-Leibler divergence, the largest of equals.

    values, counts: centre and count of each bin that is not empty [bins], ascending. The distribution holds what is clipped in its last bin;
    what is compared with it has only the numbers below the threshold, each step's spread evenly over its bins.
    """
    best, least, total = float(tried[0]), np.inf, counts.sum()
    for threshold in tried:
        kept = int(np.searchsorted(values, threshold, "right"))
        clipped = counts[kept:].sum()
        if kept == 0 or clipped > _MOST_CLIPPED * total:
            break
        inside = counts[:kept].astype(np.float64)
        given = inside.copy()
        given[-1] += clipped
        steps = rounding(values[:kept], threshold)
        starts = np.flatnonzero(np.concatenate([[True], steps[1:] != steps[:-1]]))
        lengths = np.append(starts[1:], kept) - starts
        spread = np.repeat(np.add.reduceat(inside, starts) / lengths, lengths)
        given, spread = given / given.sum(), spread / spread.sum()
        divergence = float(given @ np.log(given / spread))
        if divergence < least:
            best, least = float(threshold), divergence
    return best
