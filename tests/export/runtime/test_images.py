"""Reading and preparing images: every kind of file that a user may have."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime.images import MAX_PIXELS, load_image, preprocess
from flamingo_reference.config import NANO, PRESETS

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_sources_of_one_picture_give_the_same_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(PHOTO))
    for source in (path, str(path), Image.fromarray(PHOTO), PHOTO):
        pixels = load_image(source)
        assert pixels.dtype == np.uint8
        assert (pixels == PHOTO).all()
    opened = Image.open(path)
    assert (load_image(opened) == PHOTO).all()


def test_what_is_loaded_is_a_copy() -> None:
    mine = PHOTO.copy()
    loaded = load_image(mine)
    mine[:] = 0
    assert (loaded == PHOTO).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "YCbCr", "HSV", "LAB"])
def test_other_modes_look_as_pillow_shows_them(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(PHOTO).convert("RGB").convert("L" if mode == "LA" else mode)
    if mode == "LA":
        image.putalpha(255)
    pixels = load_image(image)
    assert pixels.shape == (12, 20, 3)
    assert (pixels == np.asarray(image.convert("RGB"))).all()


def test_cmyk_jpeg(tmp_path: Path) -> None:
    colour = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    pixels = load_image(save(tmp_path / "cmyk.jpg", colour, quality=95))
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - [254, 0, 0]).max() < 8


def test_16_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 0x8000, 0xFFFF]], np.uint16)
    for suffix in ("png", "tif"):
        path = save(tmp_path / f"deep.{suffix}", Image.fromarray(values))
        assert load_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(ImageError, match="integers from 0 to 70000"):
        load_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_16_bit_colour(tmp_path: Path) -> None:
    """Pillow cannot write one, so it is put together by hand."""
    row = b"\0" + struct.pack(">6H", 0xFFFF, 0x8080, 0, 0x0101, 0x7F7F, 0xFFFF)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    assert load_image(path).tolist() == [[[255, 128, 0], [1, 127, 255]]]


def test_transparency_is_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    expected = [[[200, 0, 0], [255, 255, 255]]]
    assert load_image(save(tmp_path / "a.png", image)).tolist() == expected
    assert load_image(np.asarray(image)).tolist() == expected
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert load_image(save(tmp_path / "p.png", palette, transparency=1)).tolist() == expected


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    path = save(tmp_path / "turned.png", Image.fromarray(PHOTO), exif=exif)
    assert (load_image(path) == np.rot90(PHOTO, -1)).all()


def test_animated_files_are_refused_with_the_way_out(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 100, 200)]
    for name in ("clip.gif", "clip.png", "clip.webp"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match=r"clip\.\w+ has 3 frames. Pass it as a video: --video"):
            load_image(path)
    still = save(tmp_path / "still.gif", frames[1])
    assert (load_image(still) == 100).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    whole = path.read_bytes()
    for share in (0.2, 0.7):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ImageError, match=rf"a\.{suffix} is (damaged or truncated|not an image)"):
            load_image(path)


def test_damaged_in_the_middle_is_an_image_error_or_an_image(tmp_path: Path) -> None:
    """Whatever bytes there are: an image or an ImageError, never another exception."""
    for suffix in ("png", "jpg", "gif", "webp", "tif", "ppm"):
        path = save(tmp_path / f"a.{suffix}", Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)))
        whole = bytearray(path.read_bytes())
        for _ in range(40):
            damaged = whole.copy()
            for _ in range(3):
                damaged[int(RNG.integers(len(damaged)))] = int(RNG.integers(256))
            path.write_bytes(damaged)
            with contextlib.suppress(ImageError):
                assert load_image(path).ndim == 3


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for width, height in ((30_000, 30_000), (8001, 8000), (10_000, 10_000)):
        assert width * height > MAX_PIXELS
        header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
        with pytest.raises(ImageError, match="Scale it down first"):
            load_image(path)
    assert not recwarn.list


def test_a_png_whose_text_explodes_is_refused(tmp_path: Path) -> None:
    data = b"key\0\0" + zlib.compress(b"0" * 80_000_000)
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).save(buffer, "PNG")
    whole = buffer.getvalue()
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    path = tmp_path / "text.png"
    path.write_bytes(whole[:33] + chunk + whole[33:])
    with pytest.raises(ImageError, match=r"text\.png"):
        load_image(path)


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png does not exist"):
        load_image(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("hello")
    with pytest.raises(ImageError, match=r"text\.png is not an image that can be read \(known: PNG, JPEG"):
        load_image(text)
    text.write_bytes(b"")
    with pytest.raises(ImageError, match="is not an image"):
        load_image(text)
    with pytest.raises(ImageError, match=r"is a folder\. To use its images as the frames of a video"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    for endless in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match="is a pipe or a device, expected a file"):
            load_image(endless)
    with pytest.raises(ImageError, match="File name too long"):
        load_image(tmp_path / ("x" * 300))
    script = tmp_path / "a.eps"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(ImageError, match="is not an image"):
        load_image(script)
    with pytest.raises(ImageError, match="floating point"):
        load_image(Image.fromarray(np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32, expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((1, 3, 4, 4), np.uint8), r"shape \(1, 3, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "is empty"),
        (3.5, "given as float"),
    ],
)
def test_arrays_that_are_no_images(array: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 128), (200, 50), (7, 3), (1, 1000)])
def test_aspect_is_kept_and_padding_is_exactly_the_mean(height: int, width: int) -> None:
    config = PRESETS["3b"]
    side = config.vision.image_size
    square = preprocess(np.full((height, width, 3), 255, np.uint8), config)
    assert square.shape == (3, side, side)
    assert square.dtype == np.float32
    filled = (square != 0).all(axis=0)
    rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    scale = side / max(height, width)
    assert (len(rows), len(columns)) == (max(1, round(height * scale)), max(1, round(width * scale)))
    # centred, to a pixel
    assert abs((rows[0] + rows[-1]) - (side - 1)) <= 1
    assert abs((columns[0] + columns[-1]) - (side - 1)) <= 1
    # white, normalised by hand
    expected = (1 - np.array(config.pixel_mean)) / np.array(config.pixel_std)
    np.testing.assert_allclose(square[:, filled].mean(1, dtype=np.float64), expected, rtol=1e-5)
    assert (square[:, ~filled] == 0).all()


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    pixels = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = (pixels.astype(np.float64).transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(preprocess(pixels, NANO), expected, atol=1e-6)
