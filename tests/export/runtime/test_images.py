"""Reading and preparing images: every kind of file that a user may have."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from flamingo_export.errors import ImageError
from flamingo_export.runtime.images import MAX_PIXELS, load_image, preprocess
from flamingo_export.runtime.videos import Video, load_video
from flamingo_reference.config import NANO, SIZES

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
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


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_alpha_of_each_kind_is_over_white(mode: str) -> None:
    """Half of gray 100 over white, whether colours are stored multiplied by alpha or not."""
    image = Image.new("RGBA", (1, 1), (100, 100, 100, 128))
    if mode == "PA":
        image = Image.new("L", (1, 1), 100).convert("P").convert("PA")
        image.putalpha(128)
    elif mode in ("LA", "La"):
        image = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 128)))
    image = image if image.mode == mode else image.convert(mode)
    assert np.abs(load_image(image).astype(float) - (100 * 128 + 255 * 127) / 255).max() <= 1


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    path = save(tmp_path / "turned.png", Image.fromarray(PHOTO), exif=exif)
    assert (load_image(path) == np.rot90(PHOTO, -1)).all()


def test_a_pillow_image_that_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(path)
    with Image.open(path) as opened:
        pass
    with pytest.raises(ImageError, match=r"closed before it was decoded. Call its load\(\)"):
        load_image(opened)
    with path.open("rb") as file:
        behind = Image.open(file)
    with pytest.raises(ImageError, match="closed before it was decoded"):
        load_image(behind)
    with Image.open(path) as opened:
        opened.load()
    assert load_image(opened).tolist() == [[[1, 2, 3]] * 3] * 2


def test_animated_files_are_refused_with_the_way_out(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 100, 200)]
    for name in ("clip.gif", "clip.png", "clip.webp"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match=r"clip\.\w+ has 3 frames. Pass it as a video: --video"):
            load_image(path)
        with pytest.raises(ImageError, match=r"the image given has 3 frames. Pass it as a video \(or save"):
            load_image(path.read_bytes())
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
    with pytest.raises(ImageError, match="/dev/zero is a device, expected a file or a pipe"):
        load_image("/dev/zero")
    with pytest.raises(ImageError, match="File name too long"):
        load_image(tmp_path / ("x" * 300))
    script = tmp_path / "a.eps"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(ImageError, match="is not an image"):
        load_image(script)
    with pytest.raises(ImageError, match="floating point"):
        load_image(Image.fromarray(np.zeros((4, 4), np.float32)))


# Where images come from.


def as_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).save(buffer, "PNG")
    return buffer.getvalue()


def test_bytes_and_file_objects(tmp_path: Path) -> None:
    data = as_png()
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert (load_image(source) == PHOTO).all()
    path = tmp_path / "a.png"
    path.write_bytes(b"before it" + data)
    with path.open("rb") as file:
        file.seek(9)
        for _ in range(2):  # put back to where it stood, so a request can be run twice
            assert (load_image(file) == PHOTO).all()
    with pytest.raises(ImageError, match=r"cannot be read: .* operation on closed file"):
        load_image(file)
    with path.open(encoding="latin-1") as text, pytest.raises(ImageError, match=r"gives text when it is read.*'rb'"):
        load_image(text)  # type: ignore[arg-type]
    for empty in (b"", io.BytesIO()):
        with pytest.raises(ImageError, match="the image given is empty: it has no bytes"):
            load_image(empty)
    with pytest.raises(ImageError, match="the image given is not an image that can be read"):
        load_image(b"hello")
    cut = io.BytesIO(data[:-30])
    cut.name = "a.png"
    with pytest.raises(ImageError, match=r"a\.png is damaged or truncated"):
        load_image(cut)


def test_a_named_pipe_and_what_has_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for data in (as_png(), b""):
        writer = threading.Thread(target=pipe.write_bytes, args=(data,))
        writer.start()
        if data:
            assert (load_image(pipe) == PHOTO).all()
        else:
            with pytest.raises(ImageError, match="pipe is empty"):
                load_image(pipe)
        writer.join()
    monkeypatch.setattr("flamingo_export.runtime.image_files.MAX_STREAM_BYTES", 3 << 20)
    with open("/dev/zero", "rb") as endless, pytest.raises(ImageError, match="/dev/zero has more than 3 MiB"):
        load_image(endless)


@pytest.mark.parametrize(
    ("given", "named", "advice"),
    [
        ("https://example.org/a.png?b=//c", "https://example.org/a.png?b=//c is a URL", "Download the file first"),
        (Path("https://example.org/a.png"), "https://example.org/a.png is a URL", "Download the file first"),
        (Path("/data/tasks") / "https://example.org/a.png", "https://example.org/a.png is a URL", "Download the file first"),
        (Path("s3://bucket/a.png"), "s3://bucket/a.png is a URL", "Download the file first"),
        ("file:///home/a.png", "file:///home/a.png is a URL", "Give the path itself"),
        (Path("file:///home/a.png"), "file:///home/a.png is a URL", "Give the path itself"),
        ("data:image/png;base64," + "A" * 1000, "data:image/png;base64,AAAAAAAAAAAAAAAAAA... is a data URL", "take the bytes"),
    ],
)
def test_urls_are_not_fetched(given: str | Path, named: str, advice: str) -> None:
    for call in (load_image, lambda source: next(load_video(Video(source=source), default_frames=8))):
        with pytest.raises(ImageError) as caught:
            call(given)
        assert str(caught.value).startswith(f"{named}, and URLs are not fetched. ")
        assert advice in str(caught.value)


def test_a_file_whose_path_looks_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    save(tmp_path / "http:" / "a.png", Image.fromarray(PHOTO))
    assert (load_image("http://a.png") == PHOTO).all()


# What the formats define, and Pillow leaves out or does otherwise. Right values are worked out by hand.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], before: bytes = b"", interlaced: int = 0) -> bytes:
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlaced)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def key(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(8, 1, 1, 0, [b"\x55"], key(1)), [0, 255] * 4),
        (png(8, 1, 1, 0, [b"\x55"], key(0)), [255, 255] * 4),
        (png(4, 1, 2, 0, [bytes([0b00011011])], key(1)), [0, 255, 170, 255]),
        (png(2, 1, 4, 0, [b"\x12"], key(1)), [255, 34]),
        (png(2, 1, 4, 0, [b"\x12"], key(17)), [255, 34]),  # only the lower bits count
        (png(2, 1, 8, 0, [b"\x11\x12"], key(17)), [255, 18]),
        (png(2, 1, 16, 0, [struct.pack(">2H", 1000, 1001)], key(1000)), [255, 4]),
        (png(2, 1, 16, 0, [struct.pack(">2H", 1000, 60000)], key(4)), [4, 233]),
        (png(2, 1, 8, 2, [bytes([10, 20, 30, 10, 20, 31])], key(10, 20, 30)), [[255, 255, 255], [10, 20, 31]]),
        (png(1, 1, 8, 2, [bytes([10, 20, 30])], key(0x10A, 20, 30)), [255]),  # only the lower bits count
        (
            # Equal but for the lowest byte of one colour.
            png(2, 1, 16, 2, [struct.pack(">6H", 0x1000, 0x2000, 0x3001, 0x1000, 0x2000, 0x3002)], key(0x1000, 0x2000, 0x3001)),
            [[255, 255, 255], [0x10, 0x20, 0x30]],
        ),
        (
            png(1, 2, 16, 2, [struct.pack(">3H", 9, 9, 9), struct.pack(">3H", 9, 9, 8)], key(9, 9, 8), interlaced=1),
            [[0, 0, 0], [255, 255, 255]],
        ),
        (
            png(2, 1, 8, 3, [b"\0\1"], chunk(b"PLTE", bytes([200, 0, 0, 0, 0, 100])) + chunk(b"tRNS", b"\xff\x80")),
            [[200, 0, 0], [127, 127, 177]],
        ),
        (png(2, 1, 16, 4, [struct.pack(">4H", 0, 0xFFFF, 0, 0)]), [0, 255]),
    ],
    ids=lambda value: None,
)
def test_transparency_of_each_kind_of_png(data: bytes, expected: list[Any]) -> None:
    given = load_image(data)
    right = np.array([pixel if isinstance(pixel, list) else [pixel] * 3 for pixel in expected])
    assert given.reshape(-1, 3).tolist() == right.tolist()
    with Image.open(io.BytesIO(data)) as opened:  # a Pillow image that is not decoded yet
        assert (load_image(opened) == given).all()


def test_transparency_of_16_bits_in_a_pillow_image_that_is_decoded() -> None:
    """Gray keeps its 16 bits. Of colours 8 are left, by which the transparent one cannot be told from its neighbours."""
    data = png(3, 1, 16, 0, [struct.pack(">3H", 1000, 1001, 60000)], key(1000))
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        for given in (opened, opened.copy(), opened.crop((0, 0, 3, 1))):
            assert load_image(given)[0, :, 0].tolist() == load_image(data)[0, :, 0].tolist() == [255, 4, 233]
    with Image.open(io.BytesIO(png(1, 1, 16, 2, [struct.pack(">3H", 4097, 0, 0)], key(4096, 0, 0)))) as opened:
        opened.load()
        for given in (opened, opened.copy()):
            with pytest.raises(ImageError, match=r"is decoded to 8 bits a colour, .* Give the file"):
                load_image(given)
    with Image.open(io.BytesIO(png(2, 1, 8, 2, [bytes([10, 20, 30, 10, 20, 31])], key(10, 20, 30)))) as opened:
        assert load_image(opened.copy()).tolist() == [[[255, 255, 255], [10, 20, 31]]]


def tiff(
    values: bytes, width: int, height: int, *, bits: int, photometric: int, big_endian: bool = False, signed: bool = False
) -> bytes:
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(values)}
    tags |= {339: 2} if signed else {}
    order = ">" if big_endian else "<"
    start = struct.pack(f"{order}2sHI", b"MM" if big_endian else b"II", 42, 8 + len(values))
    rows = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    return start + values + struct.pack(f"{order}H", len(tags)) + rows + struct.pack(f"{order}I", 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(struct.pack("<3H", 0, 0x8080, 0xFFFF), 3, 1, bits=16, photometric=1), [0, 128, 255]),
        (tiff(struct.pack(">3H", 0, 0x8080, 0xFFFF), 3, 1, bits=16, photometric=1, big_endian=True), [0, 128, 255]),
        (tiff(struct.pack("<3H", 0, 0x8080, 0xFFFF), 3, 1, bits=16, photometric=0), [255, 127, 0]),
        (tiff(bytes([0, 128, 255]), 3, 1, bits=8, photometric=0), [255, 127, 0]),
        (tiff(bytes([0x0F]), 2, 1, bits=4, photometric=0), [255, 0]),
        (tiff(bytes([0b01000000]), 2, 1, bits=1, photometric=0), [255, 0]),
        (tiff(bytes([0xFF, 0xF8, 0x00]), 2, 1, bits=12, photometric=1), [255, 128]),  # 4095 and 2048 of 4095
    ],
    ids=["16", "16 big-endian", "16 white is zero", "8 white is zero", "4 white is zero", "1 white is zero", "12"],
)
def test_gray_tiffs(data: bytes, expected: list[int]) -> None:
    assert load_image(data)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize(("values", "bits"), [(struct.pack("<2b", -5, 5), 8), (struct.pack("<2h", 1, 5), 16)])
def test_a_tiff_of_signed_integers_is_refused(values: bytes, bits: int) -> None:
    """Pillow takes 251 for -5 in 8 bits."""
    with pytest.raises(ImageError, match="holds integers with a sign"):
        load_image(tiff(values, 2, 1, bits=bits, photometric=1, signed=True))


def test_white_is_zero_compressed(tmp_path: Path) -> None:
    values = np.array([[0, 0xFFFF]], np.uint16)
    path = save(tmp_path / "a.tif", Image.fromarray(values), compression="tiff_adobe_deflate", tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0  # type: ignore[attr-defined]
    assert load_image(path)[0].tolist() == [[255] * 3, [0] * 3]


def test_colour_profiles_are_not_applied(tmp_path: Path) -> None:
    """As the pipelines do not that the models were trained with; docs/prompts.md says so."""
    with_profile = save(
        tmp_path / "a.png",
        Image.fromarray(PHOTO),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes(),
    )
    with Image.open(with_profile) as image:
        assert image.info["icc_profile"]
    assert (load_image(with_profile) == PHOTO).all()


def test_pillows_warnings_reach_nobody(recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]) -> None:
    data = tiff(bytes(4), 2, 2, bits=8, photometric=1)
    broken = data[: -4 - 12] + struct.pack("<HHII", 700, 2, 1000, 1 << 20) + data[-4:]  # a tag whose value lies beyond the file
    for image in (broken, png(2, 1, 8, 0, [b"\0\0"], chunk(b"acTL", bytes(8)))):
        with contextlib.suppress(ImageError):
            load_image(image)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="larger than file|Truncated"):  # Pillow does warn
        Image.open(io.BytesIO(broken)).load()


def test_what_libtiff_finds_wrong_reaches_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It prints on the process's stderr, past Python. Found by fuzzing."""
    path = save(tmp_path / "a.tif", Image.fromarray(PHOTO), compression="tiff_adobe_deflate")
    whole = bytearray(path.read_bytes())
    whole[whole.index(zlib.compress(PHOTO.tobytes())[:2]) + 20] ^= 255
    with pytest.raises(ImageError, match="the image given is damaged or truncated"):
        load_image(bytes(whole))
    assert capfd.readouterr() == ("", "")


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
    config = SIZES["3b"]
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
