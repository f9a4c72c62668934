"""Media are known by their decoded pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flamingo_export.runtime.images import preprocess
from flamingo_export.runtime.media import RecentMedia, load_medium
from flamingo_export.runtime.request import Request
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


def test_an_image_that_was_shown_lately_is_not_prepared_again() -> None:
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    other = pixels[::-1].copy()
    recent = RecentMedia(most=2)
    first = load_medium(pixels, NANO, recent=recent)
    assert load_medium(Image.fromarray(pixels), NANO, recent=recent) is first
    assert load_medium(other, NANO, recent=recent) is not first
    alone = load_medium(other, NANO)
    assert (load_medium(other, NANO, recent=recent).pixels == alone.pixels).all()
    assert first.digest == load_medium(pixels, NANO).digest


@pytest.mark.parametrize(("most", "most_bytes"), [(2, 1 << 30), (9, 2 * 64 * 64 * 3 * 4)], ids=["media", "bytes"])
def test_what_was_shown_longest_ago_is_let_go(most: int, most_bytes: int) -> None:
    one, two, three = (np.full((8, 8, 3), value, np.uint8) for value in (1, 2, 3))
    recent = RecentMedia(most=most, most_bytes=most_bytes)
    first, second = load_medium(one, NANO, recent=recent), load_medium(two, NANO, recent=recent)
    assert load_medium(one, NANO, recent=recent) is first
    load_medium(three, NANO, recent=recent)
    assert load_medium(one, NANO, recent=recent) is first
    assert load_medium(two, NANO, recent=recent) is not second


def test_a_model_prepares_an_image_once_for_several_requests(load_tiny: Any, tiny_config: Any) -> None:
    model = load_tiny()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    ask = Request(prompt=[tiny_config.tokens.image, 5], media=[pixels])
    first, again = model.prepare(ask), model.prepare(ask)
    assert again.media[0] is first.media[0]
