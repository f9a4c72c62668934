"""Images as tiles: equal to transformers' PIL processor of Mllama to the last bit."""

import io

import numpy as np
import pytest
from PIL import Image

from flamingo_export.runtime.images import load_image
from flamingo_export.runtime.tiles import Tiles, arrangements_of, tiles_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 28
ARRANGEMENTS = arrangements_of(4)


@pytest.fixture(scope="module")
def processor():
    pil = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    return pil.MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD, max_image_tiles=4)


def tiled(image, side: int = SIDE) -> Tiles:
    return tiles_of(load_image(image), side, ARRANGEMENTS, MEAN, STD)


def assert_equal(tiles: Tiles, found) -> None:
    np.testing.assert_array_equal(tiles.pixels, found["pixel_values"][0, 0])
    assert tiles.pixels.dtype == np.float32
    assert tiles.aspect_ratio_id == found["aspect_ratio_ids"][0, 0]
    assert tiles.num_tiles == found["num_tiles"][0][0] == int(found["aspect_ratio_mask"][0, 0].sum())


def picture(rng: np.random.Generator, width: int, height: int, mode: str) -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "LA": 2, "L": 1, "1": 1, "CMYK": 4, "P": 3}[mode]
    values = rng.integers(0, 256, (height, width, channels), np.uint8)
    if mode == "1":
        return Image.fromarray(values[..., 0], "L").convert("1")
    if mode == "P":
        return Image.fromarray(values, "RGB").quantize(64)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


def sizes(rng: np.random.Generator) -> list[tuple[int, int]]:
    """200 sizes: every arrangement's own, one pixel beside it, lines of pixels, and others from tiny to five tiles wide.

    Not 1 or 3 pixels high: transformers takes such an array for one with its channels first.
    """
    edges = [(c * SIDE + dc, r * SIDE + dr) for r, c in ARRANGEMENTS for dc in (-1, 0, 1) for dr in (-1, 0, 1)]
    thin = [(1, 400), (400, 2), (2, 500), (700, 5), (1, 2), (2, 2), (3, 70), (141, 2)]
    others = [(int(w), int(h)) for w, h in zip(rng.integers(1, 150, 200), rng.integers(4, 150, 200), strict=True)]
    return (edges + thin + others)[:200]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "CMYK", "P"])
def test_pixels_equal_transformers_to_the_last_bit(processor, mode):
    rng = np.random.default_rng(17)
    seen = set()
    for width, height in sizes(rng):
        image = picture(rng, width, height, mode)
        tiles = tiled(image)
        assert_equal(tiles, processor(image, return_tensors="np"))
        seen.add(tiles.arrangement)
    assert seen == set(ARRANGEMENTS)


@pytest.mark.parametrize("side", [448, 560])
def test_pixels_equal_transformers_at_the_published_sides(side):
    pil = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    processor = pil.MllamaImageProcessorPil(
        size={"height": side, "width": side}, image_mean=MEAN, image_std=STD, max_image_tiles=4
    )
    image = picture(np.random.default_rng(3), 1301, 911, "RGB")
    assert_equal(tiled(image, side), processor(image, return_tensors="np"))


def test_arrangements_are_numbered_as_published():
    from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

    for most in (1, 2, 4, 6):
        assert arrangements_of(most) == get_all_supported_aspect_ratios(most)


def test_fewer_arrangements_are_chosen_from_alone():
    wide = np.zeros((SIDE, 4 * SIDE, 3), np.uint8)
    tiles = tiles_of(wide, SIDE, [(1, 1), (2, 1)], MEAN, STD)
    assert tiles.arrangement == (1, 1)
    assert tiles.pixels.shape == (2, 3, SIDE, SIDE)


def test_tiles_lie_row_by_row_and_padding_is_black_before_normalising():
    image = np.full((2 * SIDE, 2 * SIDE, 3), 255, np.uint8)
    image[SIDE:, :SIDE] = 51
    tiles = tiles_of(image, SIDE, ARRANGEMENTS, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert tiles.arrangement == (2, 2)
    assert [float(tile.max()) for tile in tiles.pixels] == [1.0, 1.0, np.float32(0.2), 1.0]
    low = tiles_of(np.full((4, SIDE, 3), 255, np.uint8), SIDE, ARRANGEMENTS, MEAN, STD)
    black = (np.zeros(3, np.float32) - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    np.testing.assert_array_equal(low.pixels[0, :, 4:], np.broadcast_to(black[:, None, None], (3, SIDE - 4, SIDE)))
    assert not low.pixels[1:].any()


def test_an_image_of_16_bits_is_scaled_as_our_loader_does():
    """Pillow's own conversion, which transformers takes, cuts 16 bits at 255."""
    values = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    expected = np.repeat(((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(tiled(Image.fromarray(values)).pixels, tiled(expected).pixels)


def test_a_turned_image_is_shown_upright():
    image = picture(np.random.default_rng(5), 60, 20, "RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = tiled(file.getvalue())
    assert turned.arrangement == tiled(image.transpose(Image.Transpose.ROTATE_270)).arrangement == (3, 1)
    np.testing.assert_array_equal(turned.pixels, tiled(image.transpose(Image.Transpose.ROTATE_270)).pixels)


def test_a_transparent_palette_is_over_white():
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, SIDE, SIDE // 2))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    expected = np.full((SIDE, SIDE, 3), 255, np.uint8)
    expected[: SIDE // 2] = (0, 0, 255)
    np.testing.assert_array_equal(tiled(file.getvalue()).pixels, tiled(expected).pixels)
