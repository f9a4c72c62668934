"""Animated images, frame by frame, beside a compositor in fp64 that follows the formats' definitions pixel by pixel.

The files are written here, since Pillow's writer knows few of the cases. The compositor was compared once with ffmpeg (PyAV 18.1) on the
files of test_frames_composed_as_the_formats_say: the same for GIF, within 1.3 gray levels for animated PNG, whose canvas ffmpeg rounds.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime import animations
from flamingo_export.runtime.images import load_image
from flamingo_export.runtime.videos import Video, load_video

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Frame:
    """pixels: RGBA [H, W, 4]. dispose: 0 keep, 1 clear, 2 restore. over: blended over what is there rather than in its place."""

    pixels: Bytes
    left: int = 0
    top: int = 0
    dispose: int = 0
    over: bool = False
    hundredths: int = 10


def composed(size: tuple[int, int], frames: list[Frame]) -> list[npt.NDArray[np.float64]]:
    """What is seen of each frame over white, 0..255, [H, W, 3]. Porter and Duff's over, on a canvas with alpha."""
    height, width = size
    canvas = np.zeros((height, width, 4))
    seen = []
    for frame in frames:
        before = canvas.copy()
        box = np.zeros((height, width), bool)
        for y, x in np.ndindex(frame.pixels.shape[:2]):
            row, column = y + frame.top, x + frame.left
            if row >= height or column >= width:
                continue
            box[row, column] = True
            source, target = frame.pixels[y, x] / 255, canvas[row, column]
            if not frame.over:
                canvas[row, column] = source
                continue
            alpha = source[3] + target[3] * (1 - source[3])
            colour = source[:3] * source[3] + target[:3] * target[3] * (1 - source[3])
            canvas[row, column, :3] = colour / alpha if alpha else 0
            canvas[row, column, 3] = alpha
        seen.append(255 * (canvas[..., :3] * canvas[..., 3:] + 1 - canvas[..., 3:]))
        if frame.dispose == 1:
            canvas[box] = 0
        elif frame.dispose == 2:
            canvas[box] = before[box]
    return seen


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed(pixels: Bytes) -> bytes:
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))


def apng_chunks(size: tuple[int, int], frames: list[Frame], default: Bytes | None = None) -> list[tuple[bytes, bytes]]:
    """default: an image that is not part of the animation. Pixels are cut into two chunks each, which readers have to join."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 6, 0, 0, 0)),
        (b"acTL", struct.pack(">II", len(frames), 0)),
    ]
    if default is not None:
        chunks.append((b"IDAT", packed(default)))
    number = 0
    for index, frame in enumerate(frames):
        height, width = frame.pixels.shape[:2]
        place = (width, height, frame.left, frame.top, frame.hundredths, 100, frame.dispose, frame.over)
        chunks.append((b"fcTL", struct.pack(">IIIIIHHBB", number, *place)))
        number += 1
        data = packed(frame.pixels)
        for piece in (data[:5], data[5:]):
            if index == 0 and default is None:
                chunks.append((b"IDAT", piece))
            else:
                chunks.append((b"fdAT", struct.pack(">I", number) + piece))
                number += 1
    return [*chunks, (b"IEND", b"")]


def joined(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def apng(size: tuple[int, int], frames: list[Frame], default: Bytes | None = None) -> bytes:
    return joined(apng_chunks(size, frames, default))


def gif(size: tuple[int, int], frames: list[Frame], *, end: bytes = b";", background: int | None = None) -> bytes:
    """Each frame with a palette of its own, up to 16 colours; those with alpha 0 are the transparent one."""
    data = b"GIF89a" + struct.pack("<HHBBB", size[1], size[0], 0x91 if background is not None else 0, background or 0, 0)
    if background is not None:
        data += bytes(range(12))
    for frame in frames:
        height, width = frame.pixels.shape[:2]
        opaque = frame.pixels[..., 3] > 0
        colours = np.unique(frame.pixels[opaque][:, :3].reshape(-1, 3), axis=0)
        assert len(colours) < 16
        numbers = np.full((height, width), 15)
        for index, colour in enumerate(colours):
            numbers[opaque & (frame.pixels[..., :3] == colour).all(axis=2)] = index
        dispose = {0: 1, 1: 2, 2: 3}[frame.dispose]
        data += b"!\xf9\4" + struct.pack("<BHBB", dispose << 2 | 1, frame.hundredths, 15, 0)
        data += b"," + struct.pack("<HHHHB", frame.left, frame.top, width, height, 0x83)
        data += np.vstack([colours, np.zeros((16 - len(colours), 3), int)]).astype(np.uint8).tobytes()
        data += b"\4" + lzw(numbers.reshape(-1).tolist())
    return data + end


def lzw(numbers: list[int]) -> bytes:
    """GIF's compression of 4-bit numbers, none of it used: the table is cleared before it would make codes longer."""
    bits = "".join(f"{code:05b}"[::-1] for number in numbers for code in (16, number)) + f"{17:05b}"[::-1]
    bits += "0" * (-len(bits) % 8)
    data = bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8))
    return b"".join(bytes([len(part)]) + part for part in (data[i : i + 255] for i in range(0, len(data), 255))) + b"\0"


def seen(data: bytes, frames: int = 30) -> list[Bytes]:
    return list(load_video(Video(source=data, num_frames=frames), default_frames=8))


def close(given: list[Bytes], right: list[npt.NDArray[np.float64]], steps: float = 1.01) -> None:
    """steps: gray levels. Each blending rounds to one, so a few of them may add up to a little more than a half."""
    assert len(given) == len(right)
    for index, (one, other) in enumerate(zip(given, right, strict=True)):
        assert np.abs(one - other).max() <= steps, index


def full(*rgba: int, size: tuple[int, int] = (3, 3)) -> Bytes:
    return np.full((*size, 4), rgba, np.uint8)


def random_frames(rng: np.random.Generator, size: tuple[int, int], *, gif: bool) -> list[Frame]:
    """A first frame of the canvas' size, then four at random places. gif: of few colours, opaque or not at all, always over."""
    frames = []
    for index in range(5):
        height, width = size if index == 0 else (int(rng.integers(1, size[0] + 1)), int(rng.integers(1, size[1] + 1)))
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[..., 3][rng.random((height, width)) < 0.3] = 0
        if gif:
            colours = rng.integers(0, 256, (6, 3), dtype=np.uint8)
            pixels[..., :3] = colours[rng.integers(0, 6, (height, width))]
            pixels[..., 3] = np.where(pixels[..., 3] > 0, 255, 0)
        else:
            pixels[..., 3][rng.random((height, width)) < 0.3] = 255
        frames.append(
            Frame(
                pixels,
                left=int(rng.integers(0, size[1] - width + 1)),
                top=int(rng.integers(0, size[0] - height + 1)),
                # A first frame with nothing before it to restore is cleared (APNG); GIF's restores an empty canvas, the same.
                dispose=int(rng.integers(0, 3)),
                over=gif or bool(rng.integers(0, 2)),
            )
        )
    return frames


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["apng", "gif"])
def test_frames_composed_as_the_formats_say(kind: str, seed: int) -> None:
    size = (5, 7)
    frames = random_frames(np.random.default_rng(seed), size, gif=kind == "gif")
    data = gif(size, frames) if kind == "gif" else apng(size, frames)
    close(seen(data), composed(size, frames))


def test_partial_alpha_over_an_opaque_frame() -> None:
    """Half of green over opaque red is opaque; the background does not shine through."""
    data = apng((3, 3), [Frame(full(255, 0, 0, 255)), Frame(full(0, 255, 0, 128), over=True)])
    assert [frame[1, 1].tolist() for frame in seen(data)] == [[255, 0, 0], [127, 128, 0]]


def test_a_default_image_is_no_frame() -> None:
    frames = [Frame(full(0, 255, 0, 255)), Frame(full(0, 0, 255, 255))]
    data = apng((3, 3), frames, default=full(255, 0, 0, 255))
    assert [frame[1, 1].tolist() for frame in seen(data)] == [[0, 255, 0], [0, 0, 255]]
    with pytest.raises(ImageError, match="has 2 frames"):
        load_image(data)
    alone = apng((3, 3), frames[:1], default=full(255, 0, 0, 255))
    assert load_image(alone)[1, 1].tolist() == [0, 255, 0]


def test_apng_in_16_bits_gray_and_with_a_transparent_value() -> None:
    """Frames take the file's depth, palette and tRNS: what holds for a still PNG holds for each."""
    rows = [struct.pack(">2H", value, 1000) for value in (0, 0xFFFF)]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)),
        (b"acTL", struct.pack(">II", 2, 0)),
        (b"tRNS", struct.pack(">H", 1000)),
        (b"fcTL", struct.pack(">IIIIIHHBB", 0, 2, 1, 0, 0, 1, 10, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + rows[0])),
        (b"fcTL", struct.pack(">IIIIIHHBB", 1, 2, 1, 0, 0, 1, 10, 0, 1)),
        (b"fdAT", struct.pack(">I", 2) + zlib.compress(b"\0" + rows[1])),
        (b"IEND", b""),
    ]
    assert [frame[0, :, 0].tolist() for frame in seen(joined(chunks))] == [[0, 255], [255, 255]]


def test_exif_orientation_of_an_apng() -> None:
    rng = np.random.default_rng(0)
    frames = [Frame(np.dstack([rng.integers(0, 256, (2, 3, 3)), np.full((2, 3), 255)]).astype(np.uint8)) for _ in range(2)]
    exif = Image.Exif()
    exif[0x0112] = 6
    chunks = apng_chunks((2, 3), frames)
    chunks.insert(1, (b"eXIf", exif.tobytes()[6:]))
    for given, frame in zip(seen(joined(chunks)), frames, strict=True):
        assert (given == np.rot90(frame.pixels[..., :3], -1)).all()


def test_a_gif_frame_beyond_the_canvas_is_cut_off_and_a_first_one_enlarges_it() -> None:
    red, blue = full(255, 0, 0, 255, size=(3, 3)), full(0, 0, 255, 255, size=(3, 3))
    for dispose in (0, 1, 2):
        frames = [Frame(red), Frame(blue, left=2, top=1, dispose=dispose), Frame(full(9, 9, 9, 255, size=(1, 1)), over=True)]
        given = seen(gif((3, 3), frames))
        assert {frame.shape for frame in given} == {(3, 3, 3)}
        close(given, composed((3, 3), frames), 1e-9)
    away = [Frame(red), Frame(blue, left=5, top=5, dispose=2), Frame(blue, left=1)]
    close(seen(gif((3, 3), away)), composed((3, 3), away), 1e-9)
    large = seen(gif((1, 1), [Frame(red), Frame(blue, left=1)]))
    close(large, composed((3, 3), [Frame(red), Frame(blue, left=1)]), 1e-9)


def test_what_some_gif_writers_do() -> None:
    """Disposal 4 where 3, restoring, is meant; zero bytes between blocks; a screen of no size. Browsers and Pillow take them so."""
    frames = [Frame(full(9, 9, 9, 255)), Frame(full(5, 5, 5, 255), dispose=2), Frame(full(7, 7, 7, 255, size=(1, 1)))]
    right, data = composed((3, 3), frames), gif((3, 3), frames)
    restoring = b"!\xf9\4" + bytes([3 << 2 | 1])
    assert data.count(restoring) == 1
    close(seen(data.replace(restoring, b"!\xf9\4" + bytes([4 << 2 | 1]))), right, 1e-9)
    close(seen(data.replace(b"!\xf9", b"\0\0!\xf9")), right, 1e-9)
    close(seen(data[:6] + bytes(4) + data[10:]), right, 1e-9)
    with pytest.raises(ImageError, match="there is no block of a GIF after 1 frames"):
        seen(data.replace(restoring, b"x" + restoring))


@pytest.mark.parametrize("interlaced", [False, True])
def test_gif_files_of_another_writer(interlaced: bool) -> None:
    """Pillow's own, with real compression, a shared palette and every number of colours."""
    rng = np.random.default_rng(4)
    for colours in (2, 5, 100, 256):
        values = rng.integers(0, colours, (40, 50), dtype=np.uint8)
        image = Image.fromarray(values).convert("P")
        palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        image.putpalette(palette.tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "GIF", interlace=interlaced, optimize=False)
        assert (load_image(buffer.getvalue()) == palette[values]).all()


def test_what_a_gif_does_not_paint_is_white() -> None:
    """Viewers show it transparent, whatever the background colour says."""
    small = Frame(full(10, 20, 30, 255, size=(1, 1)), left=1, top=1, dispose=1)
    data = gif((3, 3), [small, Frame(full(1, 2, 3, 0, size=(1, 1)))], background=2)
    first, second = seen(data)
    assert first[1, 1].tolist() == [10, 20, 30]
    assert (first.reshape(-1, 3) == 255).all(axis=1).sum() == 8
    assert (second == 255).all()
    assert (load_image(gif((3, 3), [small], background=2)) == first).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif", "tif"])
def test_an_animation_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    """Between its frames, where each that is left is whole, as well as within one."""
    frames = [Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)) for index in range(4)]
    path = tmp_path / f"clip.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    whole = path.read_bytes()
    assert len(seen(whole)) == 4
    # What follows the last frame may be missing in a format that does not need it: TIFF's directories may lie anywhere.
    for length in range(1, len(whole) - (0 if suffix != "tif" else 64), 3 if suffix in ("gif", "png") else 23):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"damaged or truncated|is not an image|is neither an image nor"):
            list(load_video(Video(source=path), default_frames=8))


def test_a_gif_without_its_end_says_where_it_ends() -> None:
    frames = [Frame(full(9, 9, 9, 255)), Frame(full(5, 5, 5, 255))]
    with pytest.raises(ImageError, match="ends after frame 2 without the mark that ends an animation"):
        seen(gif((3, 3), frames, end=b""))
    assert (load_image(gif((3, 3), frames[:1], end=b"")) == 9).all()  # a still image is whole without it


TWO = [Frame(full(9, 9, 9, 255)), Frame(full(5, 5, 5, 255), hundredths=20)]


def fctl(**changed: int) -> bytes:
    values = {"number": 1, "width": 3, "height": 3, "left": 0, "top": 0, "delay": 1, "scale": 10, "dispose": 0, "blend": 0}
    return struct.pack(">IIIIIHHBB", *(values | changed).values())


@pytest.mark.parametrize(
    ("place", "chunks", "message"),
    [
        (5, [(b"fcTL", fctl(left=1))], r"frame 1 of the image given has 3x3 pixels at 1, 0, which is not within the 3x3"),
        (5, [(b"fcTL", fctl(width=0))], "has 0x3 pixels"),
        (5, [(b"fcTL", fctl(width=2**31))], "not within the 3x3"),
        (5, [(b"fcTL", fctl(dispose=3))], "disposed of by rule 3"),
        (5, [(b"fcTL", fctl(blend=2))], "blended by rule 2"),
        (5, [(b"fcTL", fctl(number=2))], "chunk 1 of the animation is missing, 2 is in its place"),
        (5, [(b"fcTL", b"short")], "a fcTL chunk has 5 bytes"),
        (1, [(b"acTL", struct.pack(">II", 3, 0))], "the animation has 3 frames, 2 are in the file"),
        (1, [(b"acTL", struct.pack(">II", 1, 0))], "the animation has 1 frames, 2 are in the file"),
        (6, [], "chunk 2 of the animation is missing, 3 is in its place"),
    ],
)
def test_animated_pngs_that_break_the_rules(place: int, chunks: list[tuple[bytes, bytes]], message: str) -> None:
    broken = apng_chunks((3, 3), TWO)
    broken[place : place + 1] = chunks
    with pytest.raises(ImageError, match=message):
        seen(joined(broken))


def test_a_chunk_whose_checksum_is_wrong() -> None:
    data = bytearray(apng((3, 3), TWO))
    data[data.index(b"fcTL") + 24] ^= 1
    with pytest.raises(ImageError, match="the checksum of a fcTL chunk is wrong"):
        seen(bytes(data))


def test_an_animation_of_no_frames_is_its_default_image() -> None:
    chunks = apng_chunks((3, 3), [Frame(full(9, 9, 9, 255))])
    chunks[1] = (b"acTL", struct.pack(">II", 0, 0))
    assert (load_image(joined([entry for entry in chunks if entry[0] != b"fcTL"])) == 9).all()


@pytest.mark.parametrize("kind", ["apng", "gif"])
def test_a_canvas_that_is_too_large_is_refused_by_its_header(kind: str) -> None:
    data = (gif if kind == "gif" else apng)((60_000, 60_000), TWO)
    with pytest.raises(ImageError, match="60000x60000 pixels, more than the 64 million"):
        seen(data)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif"])
def test_an_animation_of_too_many_pixels_in_all_is_refused_before_they_are_decoded(
    suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gray_clip(suffix, [100] * 8)  # 8 frames of 8x8: 512 pixels
    monkeypatch.setattr(animations, "MAX_ANIMATION_PIXELS", 511)
    with pytest.raises(ImageError, match=r"8x8 pixels in each frame, and 8 frames.*save it as a video file"):
        seen(data, 4)
    monkeypatch.setattr(animations, "MAX_ANIMATION_PIXELS", 512)
    assert len(seen(data, 4)) == 4


def test_frames_behind_the_last_one_wanted_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animations, "MAX_ANIMATION_PIXELS", 3 * 64)
    clip = Video(source=gray_clip("webp", [100] * 8), num_frames=3, clip=(0.0, 0.25))
    assert [round(float(frame.mean()) / 20) for frame in load_video(clip, default_frames=3)] == [0, 1, 2]


# Time.


def gray_clip(suffix: str, durations: list[int]) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)) for index in range(len(durations))]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "avif" else {}
    frames[0].save(buffer, suffix, save_all=True, append_images=frames[1:], duration=durations, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif"])
def test_frames_are_taken_by_time_where_they_are_shown_for_different_times(suffix: str) -> None:
    durations = [1000, 100, 100, 100, 100, 100, 100, 400]
    data = gray_clip(suffix, durations)
    # From 0.5 s to 1.8 s: 0.5, 0.933, 1.367, 1.8; the frames begin at 0, 1, 1.1, ... 1.5, 1.6.
    numbers = [round(float(frame.mean()) / 20) for frame in seen(data, 4)]
    assert numbers == [0, 0, 4, 7]
    assert [round(float(frame.mean()) / 20) for frame in seen(data, 30)] == list(range(8))  # all, each once
    even = gray_clip(suffix, [100] * 8)
    assert [round(float(frame.mean()) / 20) for frame in seen(even, 4)] == [0, 2, 5, 7]


def test_delays_of_an_apng_in_parts_of_a_second() -> None:
    """Numerator and denominator; a denominator of 0 is 100."""
    chunks = apng_chunks((3, 3), [Frame(full(40 * index, 0, 0, 255)) for index in range(4)])
    parts = iter([(30, 0), (1, 2), (1, 10), (1, 10)])  # 300, 500, 100 and 100 ms
    for place, (kind, data) in enumerate(chunks):
        if kind == b"fcTL":
            chunks[place] = (kind, data[:20] + struct.pack(">HH", *next(parts)) + data[24:])
    # From 150 to 950 ms: 150, 550, 950.
    assert [int(frame[0, 0, 0]) // 40 for frame in seen(joined(chunks), 3)] == [0, 1, 3]


def test_the_same_clip_in_each_format_gives_the_same_frames() -> None:
    """WebP and AVIF come from other decoders than GIF and PNG."""
    durations = [30, 500, 30, 30, 200, 30, 30, 30, 30]
    clips = {
        suffix: [round(float(frame.mean()) / 20) for frame in seen(gray_clip(suffix, durations), 5)]
        for suffix in ("gif", "png", "webp", "avif")
    }
    assert len({tuple(numbers) for numbers in clips.values()}) == 1, clips
