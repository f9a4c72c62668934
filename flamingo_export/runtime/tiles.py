"""An image as tiles: scaled into the best of a few canvases of whole tiles, padded with black, cut, normalised.

The canvas is the one that lets the image be shown largest without making it smaller; where every canvas makes it smaller, the one that
shrinks it least. Of equal ones the smallest wins. An image that is smaller than a tile is enlarged until one of its sides fills it, others
are never enlarged beyond the canvas. Filter, rounding and arithmetic are those of Llama 3.2 Vision's published transform, so that
the numbers are equal to the last bit (transformers' PIL processor of Mllama is the oracle in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from flamingo_export.runtime.pixels import Pixels

RESAMPLING = Image.Resampling.BILINEAR
Arrangement = tuple[int, int]
"""(rows, columns) of tiles."""
Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """pixels: float32 [Tmax, 3, I, I], row by row, zeros behind the last one. aspect_ratio_id: place of the arrangement in the model's list,
    from 1. arrangement: (rows, columns)."""

    pixels: npt.NDArray[np.float32]
    aspect_ratio_id: int
    arrangement: Arrangement

    @property
    def num_tiles(self) -> int:
        """Tiles that show something of the image."""
        return self.arrangement[0] * self.arrangement[1]


def arrangements_of(max_tiles: int) -> list[Arrangement]:
    """Every arrangement of at most `max_tiles` tiles, in the order in which Llama 3.2 Vision numbers them from 1."""
    counts = range(1, max_tiles + 1)
    return [(rows, columns) for rows in counts for columns in counts if rows * columns <= max_tiles]


def tiles_of(image: Pixels, side: int, arrangements: Sequence[Arrangement], mean: Colour, std: Colour) -> Tiles:
    """The tiles of a decoded image, uint8 RGB [H, W, 3] as load_image returns it.

    side: I, pixels of a tile. arrangements: those that the model knows, in its order. mean, std: of RGB in 0..1.
    """
    height, width = image.shape[:2]
    chosen = _best_arrangement(height, width, side, arrangements)
    rows, columns = chosen
    height, width = _size_within(height, width, rows * side, columns * side, side)
    scaled = np.asarray(Image.fromarray(image).resize((width, height), RESAMPLING))
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas[:height, :width] = scaled
    cut = canvas.reshape(rows, side, columns, side, 3).transpose(4, 0, 2, 1, 3).reshape(3, rows * columns, side, side)
    pixels = np.zeros((max(r * c for r, c in arrangements), 3, side, side), np.float32)
    for channel, levels in enumerate(_levels(mean, std)):
        pixels[: rows * columns, channel] = levels[cut[channel]]
    return Tiles(pixels=pixels, aspect_ratio_id=arrangements.index(chosen) + 1, arrangement=chosen)


@lru_cache(maxsize=8)
def _levels(mean: Colour, std: Colour) -> npt.NDArray[np.float32]:
    """What becomes of each level of each channel, float32 [3, 256]: scaled in float64 and rounded, then normalised in float32."""
    shift, scale = (np.asarray(values, np.float32)[:, None] for values in (mean, std))
    levels: npt.NDArray[np.float32] = ((np.arange(256) * (1 / 255)).astype(np.float32) - shift) / scale
    return levels


def num_tiles(height: int, width: int, side: int, arrangements: Sequence[Arrangement]) -> int:
    """Tiles that an image of this size becomes; turned by a quarter it becomes as many."""
    rows, columns = _best_arrangement(height, width, side, arrangements)
    return rows * columns


def _best_arrangement(height: int, width: int, side: int, arrangements: Sequence[Arrangement]) -> Arrangement:
    """Smallest scale of at least 1, else the largest below; of equal ones the least area, then the first."""
    scales = [min(rows * side / height, columns * side / width) for rows, columns in arrangements]
    best = min((scale for scale in scales if scale >= 1), default=max(scales))
    equal = [arrangement for arrangement, scale in zip(arrangements, scales, strict=True) if scale == best]
    return min(equal, key=lambda arrangement: arrangement[0] * arrangement[1])


def _size_within(height: int, width: int, most_height: int, most_width: int, side: int) -> tuple[int, int]:
    """(height, width) of the image on its canvas: at least a tile on one side, cut to whole pixels, never nothing."""
    target_height, target_width = min(max(height, side), most_height), min(max(width, side), most_width)
    by_height, by_width = target_height / height, target_width / width
    if by_width < by_height:
        return min(math.floor(height * by_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * by_height) or 1, target_width)
