"""Videos as frames."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime.videos import Video, load_video, sample_by_time, sample_frames


def solid(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), value, np.uint8))


def values(video: Video, default_frames: int = 8) -> list[int]:
    return [int(frame.mean().round()) for frame in load_video(video, default_frames=default_frames)]


def test_sampling_is_even_and_takes_both_ends() -> None:
    assert sample_frames(5, 8) == [0, 1, 2, 3, 4]
    assert sample_frames(8, 8) == list(range(8))
    assert sample_frames(15, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert sample_frames(9, 1) == [4]
    for available in range(1, 200, 7):
        for wanted in range(2, 31):
            indices = sample_frames(available, wanted)
            assert indices == sorted(set(indices))
            assert (indices[0], indices[-1]) == (0, available - 1)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animated_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    frames = [solid(10 * index) for index in range(20)]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert values(Video(source=path)) == [0, 30, 50, 80, 110, 140, 160, 190]
    assert values(Video(source=path, num_frames=30)) == [10 * index for index in range(20)]


def test_gif_frames_that_only_hold_what_changed(tmp_path: Path) -> None:
    """Pillow stores the difference to the frame before; each is shown whole."""
    scene = np.zeros((16, 16, 3), np.uint8)
    frames = []
    for index in range(4):
        scene[index * 4, :] = 250
        frames.append(Image.fromarray(scene.copy()))
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    loaded = list(load_video(Video(source=tmp_path / "clip.gif"), default_frames=8))
    for frame, expected in zip(loaded, frames, strict=True):
        assert (frame == np.asarray(expected)).all()


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    for index in range(12):
        solid(10 * index).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    assert values(Video(source=tmp_path, num_frames=12)) == [10 * index for index in range(12)]


def test_a_folder_opens_files_by_content_and_names_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index, name in enumerate(["0.jpg", "1.jfif", "2", "3.dat", "4.jpeg"]):
        solid(10 * index).save(tmp_path / name, format="JPEG", quality=100)
    assert values(Video(source=tmp_path)) == [0, 10, 20, 30, 40]
    assert not caplog.messages
    (tmp_path / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "Thumbs.db").write_text("")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.png")  # is not waited for
    assert values(Video(source=str(tmp_path))) == [0, 10, 20, 30, 40]
    assert caplog.messages == [
        f"{tmp_path}: 5 files are used as frames; left out, as they are not images that can be read: "
        "gone.jpg, IMG_1.heic, more, pipe.png, Thumbs.db"
    ]
    for index in range(3):
        (tmp_path / f"x{index}").write_text("")
    assert len(values(Video(source=tmp_path))) == 5
    assert caplog.messages[-1].endswith("gone.jpg, IMG_1.heic, more, pipe.png, Thumbs.db and 3 more")
    (tmp_path / "5.png").write_text("not an image, whatever its name says")
    with pytest.raises(ImageError, match=r"5\.png is not an image"):
        values(Video(source=tmp_path))


def test_bytes_and_file_objects(tmp_path: Path) -> None:
    path = tmp_path / "clip.gif"
    solid(10).save(path, save_all=True, append_images=[solid(20), solid(30)])
    with path.open("rb") as file:
        for source in (path.read_bytes(), bytearray(path.read_bytes()), file, file):
            assert values(Video(source=source)) == [10, 20, 30]
    stills = []
    for value in (40, 50):
        buffer = io.BytesIO()
        solid(value).save(buffer, "PNG")
        stills.append(buffer.getvalue())
    assert values(Video(source=stills)) == [40, 50]


def brute_force(durations: list[float], wanted: int) -> list[int]:
    """Walks along the clip in exact arithmetic."""
    shown = [Fraction(duration or 100) for duration in durations]
    first, last = shown[0] / 2, sum(shown) - shown[-1] / 2
    times = [sum(shown) / 2] if wanted == 1 else [first + (last - first) * Fraction(k, wanted - 1) for k in range(wanted)]
    return [next(i for i in range(len(shown)) if sum(shown[: i + 1]) > time) for time in times]


def test_sampling_by_time() -> None:
    assert sample_by_time([10_000] + [10] * 9, 4) == [0, 0, 0, 9]
    assert sample_by_time([10] * 9 + [10_000], 4) == [0, 9, 9, 9]
    assert sample_by_time([1000, 0, 0, 0], 3) == [0, 0, 3]  # 0 is shown for 100
    assert sample_by_time([1, 2, 3], 8) == [0, 1, 2]
    assert sample_by_time([1000, 100, 100], 1) == [0]
    rng = np.random.default_rng(2)
    for _ in range(60):
        durations = [float(value) for value in rng.integers(0, 50, rng.integers(2, 60)) * 10]
        wanted = int(rng.integers(1, 31))
        if len(durations) <= wanted or len({duration or 100 for duration in durations}) == 1:
            continue
        given = sample_by_time(durations, wanted)
        assert given == brute_force(durations, wanted)
        assert wanted == 1 or (given[0], given[-1]) == (0, len(durations) - 1)


def test_by_time_and_by_number_agree_where_all_frames_are_shown_nearly_as_long() -> None:
    for available in range(2, 60):
        for wanted in range(1, 31):
            assert sample_by_time([40] * available, wanted) == sample_frames(available, wanted)
            nearly = sample_by_time([40] * (available - 1) + [40.0001], wanted)
            assert all(abs(one - other) <= 1 for one, other in zip(nearly, sample_frames(available, wanted), strict=True))


def test_a_list_of_images_and_a_still_file(tmp_path: Path) -> None:
    solid(30).save(tmp_path / "a.png")
    assert values(Video(source=[tmp_path / "a.png", solid(40), np.full((4, 4, 3), 50, np.uint8)])) == [30, 40, 50]
    assert values(Video(source=tmp_path / "a.png")) == [30]


def test_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        list(load_video(Video(source=tmp_path / "none.gif"), default_frames=8))
    with pytest.raises(ImageError, match="holds no images"):
        list(load_video(Video(source=tmp_path), default_frames=8))
    with pytest.raises(ImageError, match="has no frames"):
        list(load_video(Video(source=[]), default_frames=8))
    for count in (0, 31):
        with pytest.raises(ImageError, match=f"{count} frames were asked for, expected 1 to 30"):
            list(load_video(Video(source=[solid(0)], num_frames=count), default_frames=8))
    with pytest.raises(ImageError, match="given as int"):
        list(load_video(Video(source=3), default_frames=8))  # type: ignore[arg-type]
    path = tmp_path / "clip.gif"
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for i in range(6)]
    noise[0].save(path, save_all=True, append_images=noise[1:])
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ImageError, match="damaged or truncated"):
        list(load_video(Video(source=path), default_frames=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": [3]}, r"\[3\] frames were asked for, expected 1 to 30"),
        ({"num_frames": 2.5}, "2.5 frames were asked for"),
        ({"fps": "3"}, "'3' frames per second were asked for"),
        ({"clip": 3}, "a clip is 3, expected two numbers of seconds"),
        ({"clip": (1,)}, r"a clip is \(1,\), expected two numbers"),
        ({"clip": (None, 2)}, "expected two numbers of seconds, START and END"),
    ],
)
def test_settings_of_another_kind(settings: dict[str, Any], message: str) -> None:
    """Found by fuzzing."""
    with pytest.raises(ImageError, match=message):
        list(load_video(Video(source=[solid(0)], **settings), default_frames=8))


def test_one_image_is_no_video() -> None:
    with pytest.raises(ImageError, match=r"array of shape \(80, 100, 3\)"):
        list(load_video(Video(source=np.zeros((80, 100, 3), np.uint8)), default_frames=8))  # type: ignore[arg-type]
