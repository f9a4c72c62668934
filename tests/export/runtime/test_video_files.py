"""Video files: which frames are chosen, and what is made of them. The files are written here by PyAV's encoders."""

from __future__ import annotations

import os
import struct
import threading
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="video files need the extra `video`")

from flamingo_export.errors import ImageError  # noqa: E402
from flamingo_export.runtime import video_files  # noqa: E402
from flamingo_export.runtime.media import load_medium  # noqa: E402
from flamingo_export.runtime.videos import Video, load_video  # noqa: E402

RATE, FRAMES = 25, 50


def write(
    path: Path,
    *,
    codec: str = "libx264",
    frames: int = FRAMES,
    pts: list[int] | None = None,
    aspect: Fraction | None = None,
    rotation: int = 0,
    gop: int = 12,
    options: dict[str, str] | None = None,
) -> Path:
    """A video whose red channel tells the frame's number (times 5) and whose left half is green."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[..., 0] = 5 * number
            picture[:, :32, 1] = 200
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(video: Video, default: int = 8) -> list[int]:
    """Which frames were shown, by their red channel, to within one."""
    return [round(float(np.median(frame[..., 0])) / 5) for frame in load_video(video, default_frames=default)]


def near(found: list[int], wanted: list[int]) -> bool:
    return len(found) == len(wanted) and all(abs(one - two) <= 1 for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mkv", "mpeg4")],
)
def test_containers(tmp_path: Path, name: str, codec: str) -> None:
    path = write(tmp_path / name, codec=codec)
    assert near(numbers(Video(source=path)), [0, 7, 14, 21, 28, 35, 42, 49])
    assert near(numbers(Video(source=path, fps=3, num_frames=30)), [0, 8, 16, 25, 33, 41])
    assert near(numbers(Video(source=path, fps=1)), [0, 25])
    assert near(numbers(Video(source=path, clip=(1.0, 1.5), fps=4)), [25, 31])
    assert near(numbers(Video(source=path, num_frames=1)), [24])


def test_bytes_file_objects_and_pipes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(path.read_bytes(),))
    writer.start()
    with path.open("rb") as file:
        for source in (path.read_bytes(), file, file, tmp_path / "pipe"):
            assert near(numbers(Video(source=source, fps=1)), [0, 25])
    writer.join()
    with pytest.raises(ImageError, match="the image given is neither an image nor a video that can be read"):
        numbers(Video(source=b"ftyp" * 100))


def test_by_time_where_the_rate_varies(tmp_path: Path) -> None:
    times = [0, 40, 80, 120, 160, 1000, 1900, 1940, 1980]  # milliseconds
    path = write(tmp_path / "a.mkv", frames=len(times), pts=times, codec="mpeg4")
    # At 0.5 s the fifth frame is on show, at 1 and 1.5 s the sixth, which is shown once; the video ends at 2.02 s.
    assert near(numbers(Video(source=path, fps=2)), [0, 4, 5, 8])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.ts", "libx264", {}), ("a.h264", "libx264", {}), ("a.flv", "flv", {}), ("live.mkv", "mpeg4", {"live": "1"})],
)
def test_without_durations_or_a_start_at_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, codec: str, options: dict[str, str]
) -> None:
    path = write(tmp_path / name, codec=codec, options=options)
    assert near(numbers(Video(source=path)), [0, 7, 14, 21, 28, 35, 42, 49])
    assert near(numbers(Video(source=path, fps=5, num_frames=30)), list(range(0, 50, 5)))
    assert near(numbers(Video(source=path, clip=(1.2, 2.0), num_frames=2)), [30, 49])
    assert not caplog.records


def test_more_than_fit_are_spread_evenly(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    assert near(numbers(Video(source=path, fps=25, num_frames=3)), [0, 24, 49])


def test_keyframes_are_jumped_to(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", gop=5)
    assert near(numbers(Video(source=path, num_frames=3)), [0, 24, 49])
    assert near(numbers(Video(source=path, clip=(1.6, 2.0), num_frames=2)), [40, 49])


def test_only_the_frames_that_are_shown_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 frames three become RGB and stay in memory; those decoded on the way to them are let go."""
    kept: list[Any] = []
    convert = video_files._rgb

    def counted(frame: Any) -> Any:
        kept.append(frame.pts)
        return convert(frame)

    monkeypatch.setattr(video_files, "_rgb", counted)
    assert near(numbers(Video(source=write(tmp_path / "a.mp4"), num_frames=3)), [0, 24, 49])
    assert len(kept) == 3


def test_pixels_that_are_not_square_and_rotation(tmp_path: Path) -> None:
    wide = write(tmp_path / "wide.mkv", aspect=Fraction(2, 1), codec="mpeg4")
    assert next(load_video(Video(source=wide), default_frames=1)).shape == (48, 128, 3)
    turned = write(tmp_path / "turned.mp4", rotation=90)
    frame = next(load_video(Video(source=turned), default_frames=1))
    assert frame.shape == (64, 48, 3)
    green = frame[..., 1].mean(axis=1)
    assert green[32:].mean() > 150 > 50 > green[:32].mean()  # turned counter-clockwise, the left half is below


def corners(rows: Any) -> list[list[int]]:
    """The corners of a picture [H, W], each as one of 0 to 3 by its gray."""
    return [[round(float(rows[y][x]) / 80) for x in (4, -5)] for y in (4, -5)]


ONE = 1 << 16
EIGHT = {
    "as it is": ((ONE, 0, 0, ONE), [[0, 1], [2, 3]]),
    "a quarter": ((0, ONE, -ONE, 0), [[2, 0], [3, 1]]),
    "a half": ((-ONE, 0, 0, -ONE), [[3, 2], [1, 0]]),
    "three quarters": ((0, -ONE, ONE, 0), [[1, 3], [0, 2]]),
    "mirrored": ((-ONE, 0, 0, ONE), [[1, 0], [3, 2]]),
    "upside down": ((ONE, 0, 0, -ONE), [[2, 3], [0, 1]]),
    "about one diagonal": ((0, ONE, ONE, 0), [[0, 2], [1, 3]]),
    "about the other": ((0, -ONE, -ONE, 0), [[3, 1], [2, 0]]),
}
"""What is at x, y is shown at ax + cy, bx + dy: by which the pictures' corners are worked out. ISO/IEC 14496-12, section 6.2.2."""


@pytest.mark.parametrize(("matrix", "wanted"), EIGHT.values(), ids=list(EIGHT))
def test_turned_and_mirrored_as_the_matrix_of_the_track_says(
    tmp_path: Path, matrix: tuple[int, int, int, int], wanted: list[list[int]]
) -> None:
    path = tmp_path / "a.mp4"
    gray = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 24, 0), 32, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(gray[..., None], 3, 2), "rgb24")))
        container.mux(stream.encode())
    a, b, c, d = matrix
    data = path.read_bytes()
    at = data.index(struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    path.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :])
    frame = next(load_video(Video(source=path), default_frames=1))
    assert frame.shape == ((64, 48, 3) if b else (48, 64, 3))
    assert corners(frame[..., 0]) == wanted


@pytest.mark.parametrize("angle", [0, 90, -90, 180])
def test_an_angle_where_the_matrix_is_beside_data_that_pyav_does_not_know(angle: int) -> None:
    class Unknown:
        def get(self, name: str) -> None:
            raise ValueError("40 is not a valid Type")

    class Frame:
        side_data, rotation = Unknown(), angle

    picture = np.arange(6, dtype=np.uint8).reshape(2, 3)[..., None]
    found = video_files._displayed(picture, *video_files._display_matrix(Frame()))
    np.testing.assert_array_equal(found, np.rot90(picture, angle // 90))


def edited(path: Path, first: int, count: int) -> Path:
    """The file with an edit list that shows `count` frames from `first` on, as cutting without encoding writes it. ISO/IEC 14496-12, 8.6.6."""
    data = bytearray(path.read_bytes())
    movie = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    media = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    at = data.index(b"elst") + 12
    _, start = struct.unpack_from(">Ii", data, at)
    struct.pack_into(">Ii", data, at, count * movie // RATE, start + first * media // RATE)
    path.write_bytes(data)
    return path


def test_an_edit_list_that_begins_between_keyframes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Packets before and after the part that it shows are in the file, and are no frames: times count from where it begins."""
    path = edited(write(tmp_path / "cut.mp4"), 18, 20)
    assert near(numbers(Video(source=path, num_frames=20)), list(range(18, 38)))
    assert near(numbers(Video(source=path, num_frames=3)), [18, 28, 37])
    assert near(numbers(Video(source=path, clip=(0.2, 0.4), fps=25.0)), [23, 24, 25, 26, 27])
    assert near(numbers(Video(source=path, clip=(0.4, 9.0), num_frames=2)), [28, 37])
    assert not caplog.records


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("number", "kr", "kb"),
    [(5, 0.299, 0.114), (1, 0.2126, 0.0722), (9, 0.2627, 0.0593), (7, 0.212, 0.087), (4, 0.30, 0.11)],
    ids=["BT.601", "BT.709", "BT.2020", "SMPTE 240M", "FCC"],
)
def test_rgb_is_that_of_the_matrix(tmp_path: Path, number: int, kr: float, kb: float, full: bool) -> None:
    """Within 2 levels of the matrix in fp64, on planes that a lossless codec gives back to the bit. Numbers: ITU-T H.273, table 4."""
    from av.video.reformatter import ColorRange

    path = tmp_path / "a.mkv"
    rng = np.random.default_rng(0)
    low, high = (0, 255) if full else (16, 235)
    luma = rng.integers(low, high + 1, (48, 64), dtype=np.uint8)
    chroma = rng.integers(90, 166, (2, 24, 32), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = number
        stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        planes = np.concatenate([luma.reshape(-1), chroma.reshape(-1)]).reshape(72, 64)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode())
    found = next(load_video(Video(source=path), default_frames=1)).astype(np.float64)
    y = (luma.astype(np.float64) - (0 if full else 16)) / (255 if full else 219)
    cb, cr = ((np.repeat(np.repeat(plane, 2, 0), 2, 1).astype(np.float64) - 128) / (255 if full else 224) for plane in chroma)
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    wanted = np.clip(np.stack([red, green, blue], axis=-1), 0, 1) * 255
    assert np.abs(found - wanted).max() <= 2


def test_a_broken_tail_is_used_up_to_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.mkv", codec="mpeg4", gop=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    found = numbers(Video(source=path, num_frames=4))
    assert len(found) == 4
    assert found[0] <= 1
    assert 20 <= found[-1] <= 40
    middle = bytearray(whole)
    middle[len(whole) * 2 // 3 :] = bytes(len(whole) - len(whole) * 2 // 3)
    path.write_bytes(middle)
    assert len(numbers(Video(source=path, num_frames=4))) == 4


def test_a_codec_that_is_not_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(
        ImageError, match=r"no decoder for its video\. Get the whole file if it was cut off, or convert it: ffmpeg"
    ):
        next(load_video(Video(source=path), default_frames=1))


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    noise = tmp_path / "a.mp4"
    noise.write_bytes(b"ftyp" * 100)
    with pytest.raises(ImageError, match="neither an image nor a video"):
        load_medium_of(noise)
    sound = tmp_path / "a.avi"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match=r"holds no video \(audio only\)"):
        load_medium_of(sound)
    playlist = tmp_path / "a.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1,\n{write(tmp_path / 'b.mp4')}\n#EXT-X-ENDLIST\n")
    with pytest.raises(ImageError, match="neither an image nor a video"):
        load_medium_of(playlist)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    with pytest.raises(ImageError):
        load_medium_of(tmp_path / "a.wav")


def load_medium_of(path: Path) -> None:
    from flamingo_reference.config import SIZES

    load_medium(Video(source=path), SIZES["nano"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": 0.0}, "frames per second"),
        ({"fps": float("nan")}, "frames per second"),
        ({"clip": (2.0, 1.0)}, "START-END"),
        ({"clip": (5.0, 6.0)}, "the video ends at 2 s"),
    ],
)
def test_times_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.mkv", codec="mpeg4")
    with pytest.raises(ImageError, match=message):
        list(load_video(Video(source=path, **settings), default_frames=8))


def test_animations_have_times_and_folders_have_none(tmp_path: Path) -> None:
    from PIL import Image

    frames = [Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)) for number in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    seen = [int(frame[0, 0, 0]) // 20 for frame in load_video(Video(source=tmp_path / "a.gif", fps=5), default_frames=8)]
    assert seen == [0, 2, 4, 6, 8]
    frames[0].save(tmp_path / "frame1.png")
    os.remove(tmp_path / "a.gif")
    with pytest.raises(ImageError, match="have no times"):
        list(load_video(Video(source=tmp_path, fps=5), default_frames=8))


def test_what_a_decoder_still_held_is_dropped_where_frames_are_jumped_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sixteen threads the decoder has read to the end of ten frames before it gives the first: the other nine are held. After the jump
    to the second keyframe decoding begins there, and nothing of what was held comes out."""
    path = write(tmp_path / "a.mp4", frames=10, gop=5)
    opened = video_files._opened

    @contextmanager
    def with_threads(each: Path) -> Iterator[tuple[Any, Any]]:
        with opened(each) as (container, stream):
            stream.thread_type, stream.codec_context.thread_count = "FRAME", 16
            yield container, stream

    monkeypatch.setattr(video_files, "_opened", with_threads)
    timing = video_files._timing(path)
    at = timing.pts.index(timing.keys[1])
    assert at > 2
    first, last = timing.pts[0], timing.pts[at + 1]
    frames, seen = video_files._decoded(path, [first, last], timing)
    assert near([round(float(np.median(frame[..., 0])) / 5) for frame in frames], [0, at + 1])
    assert seen == [first, timing.pts[at], last]
