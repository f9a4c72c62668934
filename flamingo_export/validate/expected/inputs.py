"""Inputs of parity cases, the same numbers on every machine and with every version of numpy, so that golden files hold seeds only."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def bits(key: str, count: int) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit words for a name: SplitMix64 (Steele et al. 2014) of a counter, started from the name's CRC."""
    start = np.uint64(zlib.crc32(key.encode()))
    with np.errstate(over="ignore"):
        z = (start << np.uint64(32)) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _STEP
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def normal(key: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Roughly normal numbers of mean 0 and standard deviation 1, each exact in fp32: the sum of four 16-bit uniforms."""
    words = bits(key, int(np.prod(shape)))
    total = np.zeros(words.shape, np.int64)
    for shift in (0, 16, 32, 48):
        total += ((words >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    centred = (total - 2 * 65535).astype(np.float32)  # 18 bits: exact
    return (centred * np.float32(2.0**-15 * 0.875)).reshape(shape)


def integers(key: str, count: int, low: int, high: int) -> list[int]:
    """`count` integers in low .. high - 1."""
    return [low + int(word >> np.uint64(32)) * (high - low) // 2**32 for word in bits(key, count)]
