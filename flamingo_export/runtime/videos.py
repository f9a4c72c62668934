"""Videos as frames: a video file, an animated image, a folder of images, or a sequence of images.

Frames are taken evenly over the whole length, first and last included, or by presentation time at a rate. Evenly is by time where the file
says how long each frame is shown, and by number where all are shown equally long. The paper trains on 8 at 1 frame per second and
evaluates with 30 at 3 a second, its 8 learned time embeddings interpolated (flamingo_reference.time_weights); the default here is as
many as there are embeddings.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, cast

import numpy as np

from flamingo_export.errors import ImageError
from flamingo_export.runtime.animations import check_frames, open_animation
from flamingo_export.runtime.image_files import FORMATS, EncodedSource, is_encoded, is_image, name_of, open_source, translated
from flamingo_export.runtime.images import ImageSource, Pixels, load_image

MAX_FRAMES = 30
MAX_FPS = 240
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
"""Files in a folder of frames that are meant as frames, so that a damaged one is an error."""
_UNTIMED = 100.0
"""Milliseconds that a frame is shown for which the file says 0 or nothing: what browsers do."""
_NAMED = 5
_log = logging.getLogger(__name__)


VideoSource = EncodedSource | Sequence[ImageSource]
"""A video or animated file (a path, its bytes, a file object), a folder of frames, or the frames."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video among the media of a request: a file, a folder of frames, or the frames themselves; `num_frames` are used at most.

    fps: frames per second to look at, by presentation time; where that gives more than `num_frames`, so many of them are taken evenly. None
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
    if not (isinstance(wanted, int | np.integer) and 1 <= wanted <= MAX_FRAMES):
        raise ImageError(f"{_shown(wanted)} frames were asked for, expected 1 to {MAX_FRAMES}")
    _check_times(video)
    source = video.source
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        source = _frame_files(Path(source))
    if is_encoded(source):
        yield from _frames_of_file(source, wanted, video)
        return
    if not isinstance(source, Sequence | np.ndarray):
        raise ImageError(f"a video is given as {type(source).__name__}; give a file, a folder of frames or a list of images")
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise ImageError(f"a video is given as an array of shape {source.shape}; give one [T, H, W, 3], or a list of frames")
    if len(source) == 0:
        raise ImageError("a video has no frames")
    if video.fps is not None or video.clip is not None:
        raise ImageError(
            "frames that are given one by one have no times, so --fps and --clip cannot choose among them; give the frames you mean"
        )
    frames = cast("Sequence[ImageSource]", source)
    for index in sample_frames(len(frames), wanted):
        yield load_image(frames[index])


def sample_frames(available: int, wanted: int) -> list[int]:
    """Indices of `wanted` frames spread evenly from the first to the last of `available`; all of them if there are no more.

    One frame is taken from the middle.
    """
    if available <= wanted:
        return list(range(available))
    if wanted == 1:
        return [available // 2]
    return [round(index * (available - 1) / (wanted - 1)) for index in range(wanted)]


def sample_by_time(durations: Sequence[float], wanted: int) -> list[int]:
    """Indices of the frames that are shown at `wanted` times, evenly from the middle of the first frame to the middle of the last.

    durations: how long each frame is shown, in any unit; 0 counts as 100. A frame that is shown long is taken several times.
    Where all are shown equally long, or there are no more than are wanted, it is as sample_frames.
    """
    shown = [duration or _UNTIMED for duration in durations]
    if len(set(shown)) == 1 or len(shown) <= wanted:
        return sample_frames(len(shown), wanted)
    ends = list(accumulate(shown))
    first, last = shown[0] / 2, ends[-1] - shown[-1] / 2
    times = [ends[-1] / 2] if wanted == 1 else [first + (last - first) * index / (wanted - 1) for index in range(wanted)]
    return [bisect_right(ends, time) for time in times]


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
    fps, clip = video.fps, video.clip
    if fps is not None and not (_is_number(fps) and 0 < fps <= MAX_FPS):
        raise ImageError(f"{_shown(fps)} frames per second were asked for, expected more than 0 and at most {MAX_FPS}")
    if clip is None:
        return
    if not (isinstance(clip, Sequence) and len(clip) == 2 and all(map(_is_number, clip))):
        raise ImageError(f"a clip is {_shown(clip)}, expected two numbers of seconds, START and END")
    if not 0 <= clip[0] < clip[1] < math.inf:
        raise ImageError(
            f"a clip from {clip[0]:g} to {clip[1]:g} seconds was asked for, expected START-END with START before END"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else repr(value)[:80]


def _frames_of_file(source: EncodedSource, wanted: int, video: Video) -> Iterator[Pixels]:
    name = name_of(source)
    with open_source(source) as file:
        if is_image(file):
            yield from _frames_of_image(file, name, wanted, video)
            return
        from flamingo_export.runtime.video_files import frames_of_video

        if isinstance(source, str | os.PathLike) and os.path.isfile(source):
            yield from frames_of_video(Path(source), wanted, video)
            return
        with NamedTemporaryFile(prefix="flamingo-export-") as copy:  # it is read more than once, and by path
            shutil.copyfileobj(file, copy)
            copy.flush()
            try:
                yield from frames_of_video(Path(copy.name), wanted, video)
            except ImageError as error:
                raise ImageError(str(error).replace(copy.name, name)) from error


def _frames_of_image(file: IO[bytes], name: str, wanted: int, video: Video) -> Iterator[Pixels]:
    with translated(name):
        animation = open_animation(file, name)
    if animation.cut:
        raise ImageError(
            f"{name} is damaged or truncated: it ends after frame {len(animation.durations)} without the mark that ends an animation. "
            "Get the whole file, or save the frames that are there into a folder."
        )
    indices = sample_by_time(animation.durations, wanted)
    if video.fps is not None or video.clip is not None:
        if not any(animation.durations):
            raise ImageError(
                "the animation does not say how long its frames are shown, so --fps and --clip cannot choose among them"
            )
        begins = [0.0, *(end / 1000 for end in accumulate(duration or _UNTIMED for duration in animation.durations))]
        indices = shown_at(begins[:-1], chosen_times(0.0, begins[-2], begins[-1], wanted, video))
    check_frames(animation.size, max(indices) + 1, name)
    for index in indices:
        with translated(name):  # not while the caller has the frame
            frame = animation.frame(index)
        yield frame


def _frame_files(folder: Path) -> list[Path]:
    """The folder's images in natural order: frame2 before frame10. What is left out is logged by name; hidden files are not frames."""
    try:
        entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural_key)
    except OSError as error:
        raise ImageError(f"{folder} cannot be read: {error.strerror}") from error
    frames = [path for path in entries if path.is_file() and (path.suffix.lower() in _SUFFIXES or _is_image_file(path))]
    if not frames:
        raise ImageError(f"{folder} holds no images (known: {', '.join(FORMATS)}), so it cannot be used as a video")
    kept = set(frames)
    if left_out := [path.name for path in entries if path not in kept]:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        _log.warning(
            "%s: %s used as frames; left out, as they are not images that can be read: %s%s",
            folder,
            "1 file is" if len(frames) == 1 else f"{len(frames)} files are",
            ", ".join(left_out[:_NAMED]),
            more,
        )
    return frames


def _is_image_file(path: Path) -> bool:
    """Whether it is an image by what is in it, whatever its name."""
    try:
        with open_source(path) as file:
            return is_image(file)
    except ImageError:
        return False


def _natural_key(path: Path) -> list[tuple[int, int | str]]:
    pieces = re.split(r"(\d+)", path.name.lower())
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]
