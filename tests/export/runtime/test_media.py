"""Media are known by their decoded pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flamingo_export.runtime.images import preprocess
from flamingo_export.runtime.media import load_medium
from flamingo_export.runtime.videos import Video
from flamingo_reference.config import NANO


def test_the_same_pixels_are_the_same_medium_whatever_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.bmp")
    media = [load_medium(source, NANO) for source in (pixels, tmp_path / "a.png", tmp_path / "b.bmp", Video(source=[pixels]))]
    assert len({medium.digest for medium in media}) == 1
    assert (media[0].pixels == preprocess(pixels, NANO)).all()
    assert media[0].pixels.shape == (1, 3, 64, 64)


def test_other_pixels_sizes_and_orders_are_other_media() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    other = pixels.copy()
    other[0, 0] = 1
    sources: list[Any] = [pixels, other, pixels.reshape(4, 16), Video(source=[pixels, other]), Video(source=[other, pixels])]
    assert len({load_medium(source, NANO).digest for source in sources}) == len(sources)


def test_frames_are_stacked_in_order() -> None:
    frames = [np.full((4, 4, 3), value, np.uint8) for value in (0, 100, 200)]
    medium = load_medium(Video(source=frames), NANO)
    assert medium.pixels.shape == (3, 3, 64, 64)
    assert medium.pixels.mean((1, 2, 3)).argsort().tolist() == [0, 1, 2]
