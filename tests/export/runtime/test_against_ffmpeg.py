"""Decoded frames beside those of the `ffmpeg` program, which is not the library that decodes here: planes to the bit, RGB within 2 levels of the
matrix in fp64 on ffmpeg's own planes. Debian's package does: apt-get install ffmpeg."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="video files need the extra `video`")

from flamingo_export.runtime import video_files  # noqa: E402
from flamingo_export.runtime.videos import Video, load_video  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed: apt-get install ffmpeg")
RATE, FRAMES, WIDTH, HEIGHT = 25, 12, 98, 62  # neither side a multiple of a block
MATRICES = {"ITU601": (0.299, 0.114), "ITU709": (0.2126, 0.0722)}


def write(path: Path, codec: str, *, matrix: str = "ITU601", full: bool = False, kind: str = "yuv420p") -> Path:
    """Moving noise on a ramp, so that every level comes, with losses of the codec."""
    from av.video.reformatter import ColorRange, Colorspace

    rng = np.random.default_rng(0)
    low, high = (0, 255) if full else (16, 235)
    ramp = np.linspace(low, high, WIDTH)[None] + rng.normal(0, 12, (HEIGHT, WIDTH))
    down, across = (2 if "420" in kind else 1), (1 if "444" in kind else 2)
    chroma = rng.normal(128, 45, (2, HEIGHT // down // 4 + 1, WIDTH // across // 4 + 1)).repeat(4, 1).repeat(4, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, kind
        stream.codec_context.colorspace = getattr(Colorspace, matrix)
        stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        stream.codec_context.gop_size = 5
        for number in range(FRAMES):
            frame = av.VideoFrame(WIDTH, HEIGHT, kind)
            pictures = [np.roll(ramp, 3 * number, 1), *(np.roll(plane, number, 0) for plane in chroma)]
            for plane, picture in zip(frame.planes, pictures, strict=True):
                values = np.zeros((plane.height, plane.line_size), np.uint8)
                values[:, : plane.width] = np.clip(picture[: plane.height, : plane.width], low, high).astype(np.uint8)
                plane.update(values)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def ffmpegs_planes(path: Path, kind: str) -> list[list[np.ndarray]]:
    """Planes of all frames as ffmpeg decodes them, not converted."""
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-nostdin",
        "-i",
        str(path),
        "-fps_mode",
        "passthrough",
        "-f",
        "rawvideo",
        "-pix_fmt",
        kind,
        "-",
    ]
    data = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)
    down, across = (2 if "420" in kind else 1), (1 if "444" in kind else 2)
    small = (HEIGHT // down, WIDTH // across)
    sizes = [HEIGHT * WIDTH, small[0] * small[1], small[0] * small[1]]
    frames = data.reshape(-1, sum(sizes))
    assert len(frames) == FRAMES
    shapes = [(HEIGHT, WIDTH), small, small]
    return [
        [part.reshape(shape) for part, shape in zip(np.split(frame, np.cumsum(sizes)[:-1]), shapes, strict=True)]
        for frame in frames
    ]


def decoded(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """Planes and RGB of all frames as they are decoded and converted here."""
    planes: list[list[np.ndarray]] = []
    convert = video_files._rgb

    def listening(frame: Any) -> np.ndarray:
        planes.append(
            [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width].copy() for p in frame.planes[:3]]
        )
        return convert(frame)

    monkeypatch.setattr(video_files, "_rgb", listening)
    rgb = list(load_video(Video(source=path, num_frames=FRAMES), default_frames=FRAMES))
    assert len(planes) == len(rgb) == FRAMES
    return planes, rgb


def matrix_fp64(planes: list[np.ndarray], matrix: str, *, full: bool) -> np.ndarray:
    """ITU-R BT.601 and BT.709, chroma repeated, 0 to 255."""
    kr, kb = MATRICES[matrix]
    luma, cb, cr = (
        np.repeat(np.repeat(plane, HEIGHT // plane.shape[0], 0), WIDTH // plane.shape[1], 1).astype(np.float64)
        for plane in planes
    )
    y = luma / 255 if full else (luma - 16) / 219
    cb, cr = ((plane - 128) / (255 if full else 224) for plane in (cb, cr))
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue], axis=-1), 0, 1) * 255


@pytest.mark.parametrize(
    ("name", "codec", "kind"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "libx264", "yuv444p"),
        ("b.mp4", "libx264", "yuv422p"),
        ("c.mp4", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mkv", "ffv1", "yuv420p"),
    ],
)
def test_planes_are_ffmpegs_to_the_bit(
    tmp_path: Path, name: str, codec: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / name, codec, kind=kind)
    wanted = ffmpegs_planes(path, kind)
    found, _ = decoded(path, monkeypatch)
    for mine, theirs in zip(found, wanted, strict=True):
        for plane, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(plane, other)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_rgb_is_within_2_levels_of_the_matrix(tmp_path: Path, matrix: str, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", "libx264", matrix=matrix, full=full)
    _, rgb = decoded(path, monkeypatch)
    # ffmpeg calls planes of the full range by another name; asked for the plain one it would narrow them.
    worst = max(
        float(np.abs(picture.astype(np.float64) - matrix_fp64(planes, matrix, full=full)).max())
        for picture, planes in zip(rgb, ffmpegs_planes(path, "yuvj420p" if full else "yuv420p"), strict=True)
    )
    assert worst <= 2
