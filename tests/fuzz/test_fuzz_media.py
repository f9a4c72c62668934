"""Images, animations and frames that are not what they should be."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flamingo_export.runtime.images import load_image, preprocess
from flamingo_export.runtime.videos import Video, load_video
from flamingo_reference.config import NANO

from mutations import STRANGE, fuzz, mutated, mutated_png  # isort: skip

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (17, 23, 4), dtype=np.uint8))
FRAMES = [Image.fromarray(RNG.integers(0, 256, (9, 11, 3), dtype=np.uint8)) for _ in range(4)]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "text"
    return exif


STILL: dict[str, bytes] = {
    "png": encoded(PHOTO, "PNG", exif=with_exif()),
    "png palette": encoded(PHOTO.convert("RGB").quantize(16), "PNG", transparency=3),
    "png 16 bits": encoded(Image.fromarray(RNG.integers(0, 2**16, (9, 9), dtype=np.uint16)), "PNG"),
    "png gray": encoded(PHOTO.convert("L"), "PNG", transparency=3),
    "jpeg": encoded(PHOTO.convert("RGB"), "JPEG", exif=with_exif()),
    "jpeg cmyk": encoded(PHOTO.convert("CMYK"), "JPEG", progressive=True),
    "mpo": encoded(PHOTO.convert("RGB"), "MPO", save_all=True, append_images=[PHOTO.convert("RGB")]),
    "gif": encoded(PHOTO.convert("RGB"), "GIF"),
    "webp": encoded(PHOTO, "WEBP", exif=with_exif()),
    "bmp": encoded(PHOTO.convert("RGB"), "BMP"),
    "tiff": encoded(PHOTO, "TIFF"),
    "tiff deflate": encoded(
        PHOTO.convert("RGB").crop((0, 0, 4, 3)), "TIFF", compression="tiff_adobe_deflate", exif=with_exif()
    ),
    "tiff 16 bits": encoded(Image.fromarray(RNG.integers(0, 2**16, (9, 9), dtype=np.uint16)), "TIFF", tiffinfo={262: 0}),
    "ppm": encoded(PHOTO.convert("RGB"), "PPM"),
    "pgm 16 bits": encoded(Image.fromarray(RNG.integers(0, 2**16, (9, 9), dtype=np.uint16)), "PPM"),
    "avif": encoded(PHOTO, "AVIF"),
}
ANIMATED: dict[str, bytes] = {
    kind: encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **options)  # type: ignore[arg-type]
    for kind, options in {
        "GIF": {"duration": [10, 0, 500, 70], "disposal": [1, 2, 3, 1]},
        "PNG": {"duration": [10, 20, 500, 70], "disposal": [0, 1, 2, 0], "blend": 1},
        "WEBP": {"duration": [10, 20, 500, 70], "lossless": True},
        "AVIF": {"duration": [10, 20, 500, 70]},
        "TIFF": {},
    }.items()
}
COUNTS = {"avif": 40, "AVIF": 40}


def looked_at(source: bytes) -> None:
    pixels = load_image(source)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    for fit in ("pad", "crop", "stretch"):
        assert np.isfinite(preprocess(pixels, NANO, fit)).all()


@pytest.mark.parametrize("kind", STILL)
def test_images(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    def case(rng: random.Random) -> None:
        change = mutated_png if kind.startswith("png") and rng.random() < 0.6 else mutated
        looked_at(change(STILL[kind], rng))

    fuzz(f"image {kind}", COUNTS.get(kind, 100), case)
    assert kind == "avif" or capfd.readouterr() == ("", "")  # dav1d prints in older wheels of Pillow


@pytest.mark.parametrize("kind", ANIMATED)
def test_animations(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    def case(rng: random.Random) -> None:
        change = mutated_png if kind == "PNG" and rng.random() < 0.7 else mutated
        settings: dict[str, Any] = {}
        if rng.random() < 0.2:
            settings = {"fps": rng.choice((0.1, 3, 100.0)), "clip": rng.choice((None, (0, 0.1), (0.3, 9)))}
        video = Video(source=change(ANIMATED[kind], rng), num_frames=rng.choice((1, 3, 8, 30)), **settings)
        frames = list(load_video(video, default_frames=8))
        assert 1 <= len(frames) <= 30
        assert len({frame.shape for frame in frames}) == 1 or kind == "TIFF"

    fuzz(f"animation {kind}", COUNTS.get(kind, 150), case)
    assert kind == "AVIF" or capfd.readouterr() == ("", "")


def test_what_is_given_as_an_image() -> None:
    def case(rng: random.Random) -> None:
        shape = tuple(rng.choice((0, 1, 3, 4, 5)) for _ in range(rng.randrange(5)))
        array = np.zeros(shape, rng.choice((np.uint8, np.uint8, np.int8, np.float32, np.bool_, np.object_)))
        given = rng.choice((array, Image.new(rng.choice(("1", "L", "LA", "I", "F", "P", "RGB", "CMYK")), (3, 2)), *STRANGE))
        load_image(given)

    fuzz("given as an image", 300, case)


def test_what_is_given_as_a_video() -> None:
    def case(rng: random.Random) -> None:
        shape = tuple(rng.choice((0, 1, 3, 4)) for _ in range(rng.randrange(6)))
        given: dict[str, Any] = {"source": rng.choice((ANIMATED["GIF"], [PHOTO] * 3))}
        strange = {
            "source": (np.zeros(shape, np.uint8), [np.zeros(shape, np.uint8)] * 2, [rng.choice(STRANGE)], *STRANGE),
            "num_frames": (3, np.int64(2), *STRANGE),
            "fps": (3, np.float32(2), *STRANGE),
            "clip": ((0, 1), (rng.choice(STRANGE), 1), (0, rng.choice(STRANGE)), *STRANGE),
        }
        for name in rng.sample(sorted(strange), rng.choice((1, 1, 2))):
            given[name] = rng.choice(strange[name])
        list(load_video(Video(**given), default_frames=8))

    fuzz("given as a video", 300, case)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx")])
def test_video_files(suffix: str, codec: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av", reason="video files need the extra `video`")
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * index, np.uint8), "rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated(whole, rng))
        settings: dict[str, Any] = {"fps": 5.0, "clip": rng.choice((None, (0.2, 0.7)))} if rng.random() < 0.3 else {}
        frames = list(load_video(Video(source=path, **settings), default_frames=4))
        assert 1 <= len(frames) <= 4

    fuzz(f"video {suffix}", 40, case)
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_frames(tmp_path: Path) -> None:
    def case(rng: random.Random) -> None:
        for index in range(3):
            data = rng.choice([*STILL.values(), b"", b"text"])
            (tmp_path / f"{index}{rng.choice(('', '.png', '.dat'))}").write_bytes(
                mutated(data, rng) if rng.random() < 0.3 else data
            )
        try:
            list(load_video(Video(source=tmp_path), default_frames=8))
        finally:
            for path in tmp_path.iterdir():
                path.unlink()

    fuzz("folder", 40, case)
