"""Videos as frames: a video file, an animated image, a folder of images, or a sequence of images.

Frames are taken evenly over the whole length, first and last included, or by presentation time at a rate. The paper trains on 8 at 1 frame a
second and evaluates with 30 at 3 a second, its 8 learned time embeddings interpolated (flamingo_reference.time_weights); the default here is
as many as there are embeddings.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flamingo_export.errors import ImageError
from flamingo_export.runtime.images import ImageSource, Pixels, is_image_file, load_image, open_image, to_rgb

MAX_FRAMES = 30
MAX_FPS = 240
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})


VideoSource = str | os.PathLike[str] | Sequence[ImageSource]
"""A file, a folder of frames, or the frames."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video among the media of a request: a file, a folder of frames, or the frames themselves; `num_frames` are used at most.

    fps: frames a second to look at, by presentation time; where that gives more than `num_frames`, so many of them are taken evenly. None
    takes `num_frames` evenly.
    clip: seconds from the start of the video at which the part to look at begins and ends; None takes all of it.
    Both need times, which video files and animated images have.
    """

    source: VideoSource
    num_frames: int | None = None
    fps: float | None = None
    clip: tuple[float, float] | None = None


def load_video(video: Video, *, default_frames: int) -> Iterator[Pixels]:
    """The frames that the model sees, in order, each uint8 RGB [H, W, 3] and decoded when it is asked for.

    Raises ImageError if there are none, one cannot be read, or more than MAX_FRAMES are asked for.
    """
    wanted = default_frames if video.num_frames is None else video.num_frames
    if not 1 <= wanted <= MAX_FRAMES:
        raise ImageError(f"{wanted} frames were asked for, expected 1 to {MAX_FRAMES}")
    _check_times(video)
    source = video.source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_dir():
            yield from _frames_of_file(path, wanted, video)
            return
        source = _frame_files(path)
    elif not isinstance(source, Sequence | np.ndarray):
        raise ImageError(f"a video is given as {type(source).__name__}; give a file, a folder of frames or a list of images")
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise ImageError(f"a video is given as an array of shape {source.shape}; give one [T, H, W, 3], or a list of frames")
    if len(source) == 0:
        raise ImageError("a video has no frames")
    if video.fps is not None or video.clip is not None:
        raise ImageError(
            "frames that are given one by one have no times, so --fps and --clip cannot choose among them; give the frames you mean"
        )
    for index in sample_frames(len(source), wanted):
        yield load_image(source[index])


def sample_frames(available: int, wanted: int) -> list[int]:
    """Indices of `wanted` frames spread evenly from the first to the last of `available`; all of them if there are no more.

    One frame is taken from the middle.
    """
    if available <= wanted:
        return list(range(available))
    if wanted == 1:
        return [available // 2]
    return [round(index * (available - 1) / (wanted - 1)) for index in range(wanted)]


def chosen_times(first: float, last: float, end: float, wanted: int, video: Video) -> list[float]:
    """Times in seconds at which a video is looked at, ascending.

    first, last: when its first and last frame are shown; end: when the last one has been shown, all counted from the video's start.
    Raises ImageError if the clip lies outside of it.
    """
    start, stop = video.clip if video.clip is not None else (first, end)
    if start >= end:
        raise ImageError(f"the clip begins at {start:g} s, the video ends at {end:g} s")
    start, stop = max(start, first), min(stop, end)
    if video.fps is None:
        until = last if video.clip is None else min(last, stop)
        if wanted == 1:
            return [(start + until) / 2]
        return [start + index * (until - start) / (wanted - 1) for index in range(wanted)]
    # A hundred thousandth of a frame is forgiven: times are rounded to the container's ticks.
    count = max(1, math.ceil((stop - start) * video.fps - 1e-5))
    return [start + index / video.fps for index in sample_frames(count, wanted)]


def shown_at(times: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """Index of the frame on show at each of the wanted times, each frame once; times: when each begins to be shown, ascending."""
    begins = np.asarray(times) - 1e-4  # containers round times to a tick, at most a millisecond
    indices = np.maximum(np.searchsorted(begins, np.asarray(wanted), side="right") - 1, 0)
    return list(dict.fromkeys(indices.tolist()))


def _check_times(video: Video) -> None:
    if video.fps is not None and not 0 < video.fps <= MAX_FPS:
        raise ImageError(f"{video.fps:g} frames a second were asked for, expected more than 0 and at most {MAX_FPS}")
    if video.clip is not None and not 0 <= video.clip[0] < video.clip[1] < math.inf:
        raise ImageError(
            f"a clip from {video.clip[0]:g} to {video.clip[1]:g} seconds was asked for, expected START-END with START before END"
        )


def _frames_of_file(path: Path, wanted: int, video: Video) -> Iterator[Pixels]:
    if not is_image_file(path):
        from flamingo_export.runtime.video_files import frames_of_video

        yield from frames_of_video(path, wanted, video)
        return
    with open_image(path) as image:
        count = getattr(image, "n_frames", 1)
        indices = sample_frames(count, wanted)
        if video.fps is not None or video.clip is not None:
            begins, end = _animation_times(image, count)
            indices = shown_at(begins, chosen_times(0.0, begins[-1], end, wanted, video))
        for index in indices:
            image.seek(index)
            yield to_rgb(image, f"frame {index} of {path}")


def _animation_times(image: Image.Image, count: int) -> tuple[list[float], float]:
    """When each frame of an animated image begins to be shown, and when the last one ends, in seconds."""
    begins, now = [], 0.0
    for index in range(count):
        image.seek(index)
        begins.append(now)
        now += float(image.info.get("duration", 0) or 0) / 1000
    if now == 0:
        raise ImageError(
            "the animation does not say how long its frames are shown, so --fps and --clip cannot choose among them"
        )
    return begins, now


def _frame_files(folder: Path) -> list[Path]:
    """The folder's images in natural order: frame2 before frame10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise ImageError(f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))}), so it cannot be used as a video")
    return sorted(files, key=_natural_key)


def _natural_key(path: Path) -> list[tuple[int, int | str]]:
    pieces = re.split(r"(\d+)", path.name.lower())
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]
