"""One matrix [in, out] in fewer bits, and back: what every backend must understand by a quantised weight.

    fp8     w ~ code * scale[out]             E4M3 codes; scales are powers of two, which cost a floating format no accuracy and are exact
                                              in whatever type a backend computes in
    int8    w ~ code * scale[in // block, out]
    int4    the same; two codes a byte along the output, the first in the low half

All are symmetric: zero is exactly zero. Every scale is positive: a block of zeros, as behind a gate of exactly 0, has scale 1, and no
other scale is below SMALLEST_SCALE, which fp16 still holds with five bits; a block whose numbers are so small that the floor is felt adds
nothing that a neighbouring block's rounding would not hide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from flamingo_export.precision import E4M3_LARGEST, Quantisation
from flamingo_reference.arrays import Array

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SMALLEST_SCALE = 2.0**-20
# What a scale is tried at, of that which keeps the block's largest number: outliers of a block may be clipped for the others' sake.
SEARCHED = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
# Columns worked on at a time: a block of rows of them and its temporaries stay in the processor's cache.
_TILE = 512


def quantised(matrix: Array, how: Quantisation, importance: Array | None = None) -> tuple[Array, Array]:
    """Codes as they are stored (fp8 and int8 [in, out], int4 uint8 [in, out / 2]) and scales (fp32 [out] or [in / block, out]).

    matrix: of any float type; it is widened to fp32 a piece at a time.

    importance: of each input channel [in], the mean square of what it is multiplied with; scales of int4 are chosen by the error so
    weighted, by the plain error without it. Raises ValueError if the matrix does not divide into blocks or pairs.
    """
    if how.element == "fp8":
        return _fp8(matrix)
    return _blocks(matrix, how, importance)


def dequantised(codes: Array, scales: Array, how: Quantisation) -> Array:
    """The fp32 numbers [in, out] that stored codes stand for."""
    if how.element == "fp8":
        return codes.astype(np.float32) * scales
    whole = unpacked(codes) if how.element == "int4" else codes
    numbers: Array = whole.astype(np.float32) * np.repeat(scales, how.block, axis=0)
    return numbers


def scale_shape(shape: tuple[int, ...], how: Quantisation) -> tuple[int, ...]:
    """Shape of the scales of a matrix."""
    return (shape[1],) if how.element == "fp8" else (shape[0] // how.block, shape[1])


def code_shape(shape: tuple[int, ...], how: Quantisation) -> tuple[int, ...]:
    """Shape in which the codes of a matrix are stored."""
    return (shape[0], shape[1] // 2) if how.element == "int4" else shape


def range_scale(threshold: float) -> float:
    """Scale of an E4M3 tensor whose numbers up to `threshold` in magnitude are to be kept: a power of two."""
    if threshold <= 0:
        return 1.0
    return 2.0 ** math.ceil(math.log2(max(threshold / E4M3_LARGEST, SMALLEST_SCALE)))


def packed(codes: Array) -> Array:
    """int8 codes of four bits [in, out] as uint8 [in, out / 2]."""
    low, high = codes[:, 0::2].view(np.uint8) & 0xF, codes[:, 1::2].view(np.uint8) << 4
    both: Array = low | high
    return both


def unpacked(pairs: Array) -> Array:
    """The opposite of `packed`."""
    codes = np.empty((pairs.shape[0], 2 * pairs.shape[1]), np.int8)
    # Shifted up and, as signed numbers, down again: the upper bits become those of the sign.
    codes[:, 0::2] = (pairs << 4).view(np.int8) >> 4
    codes[:, 1::2] = pairs.view(np.int8) >> 4
    return codes


def _fp8(matrix: Array) -> tuple[Array, Array]:
    scales = np.array([range_scale(peak) for peak in _column_peaks(matrix)], np.float32)
    codes = np.empty(matrix.shape, FP8)
    for columns in _tiles(matrix.shape[1]):
        # Division by a power of two is exact, and 448 times the scale is at least the peak: nothing overflows into NaN.
        codes[:, columns] = (np.asarray(matrix[:, columns], np.float32) / scales[columns]).astype(FP8)
    return codes, scales


def _column_peaks(matrix: Array) -> Array:
    return np.concatenate(
        [np.abs(np.asarray(matrix[:, columns], np.float32)).max(axis=0) for columns in _tiles(matrix.shape[1])]
    )


def _blocks(matrix: Array, how: Quantisation, importance: Array | None) -> tuple[Array, Array]:
    rows, columns = matrix.shape
    if rows % how.block:
        raise ValueError(f"{rows} input channels do not divide into blocks of {how.block}")
    bits = 4 if how.element == "int4" else 8
    if bits == 4 and columns % 2:
        raise ValueError(f"{columns} output channels do not pair up")
    scales = np.empty((rows // how.block, columns), np.float32)
    stored = np.empty(code_shape(matrix.shape, how), np.uint8 if bits == 4 else np.int8)
    for index in range(rows // how.block):
        inside = slice(index * how.block, (index + 1) * how.block)
        weight = None if importance is None else np.asarray(importance[inside], np.float32)[:, None]
        for part in _tiles(columns):
            codes, scales[index, part] = _block(np.asarray(matrix[inside, part], np.float32), bits, weight)
            if bits == 4:
                stored[inside, part.start // 2 : part.stop // 2] = packed(codes)
            else:
                stored[inside, part] = codes
    return stored, scales


def _block(block: Array, bits: int, weight: Array | None) -> tuple[Array, Array]:
    """Codes int8 and scales of one block [rows, columns]: of those tried, each column takes the scale of least (weighted) square error."""
    largest = 2 ** (bits - 1) - 1
    peak = np.abs(block).max(axis=0)
    fitting = np.where(peak > 0, np.maximum(peak / np.float32(largest), np.float32(SMALLEST_SCALE)), np.float32(1.0))
    tried = SEARCHED[bits]
    if len(tried) == 1:
        return _codes(block, fitting, largest).astype(np.int8), fitting
    best_error = np.full(fitting.shape, np.inf, np.float32)
    best = fitting
    for share in tried:
        scale = np.where(peak > 0, np.maximum(fitting * np.float32(share), np.float32(SMALLEST_SCALE)), fitting)
        error = _codes(block, scale, largest)
        error *= scale
        error -= block
        np.square(error, out=error)
        if weight is not None:
            error *= weight
        total = error.sum(axis=0)
        better = total < best_error
        best_error, best = np.where(better, total, best_error), np.where(better, scale, best)
    return _codes(block, best, largest).astype(np.int8), best


def _codes(block: Array, scale: Array, largest: int) -> Array:
    codes = block * (np.float32(1.0) / scale)
    np.rint(codes, out=codes)
    np.clip(codes, -largest - 1, largest, out=codes)
    return codes


def _tiles(columns: int) -> Iterator[slice]:
    """An even number of columns at a time."""
    for start in range(0, columns, _TILE):
        yield slice(start, min(start + _TILE, columns))
