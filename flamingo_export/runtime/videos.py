"""Videos as frames: an animated image, a folder of images, or a sequence of images.

Frames are taken evenly over the whole length, first and last included: by time where the file says how long each is shown, and by
number where all are shown equally long. The paper trains on 8 and evaluates with 30, its 8 learned time embeddings interpolated
(flamingo_reference.time_weights); the default here is as many as there are embeddings.
"""

from __future__ import annotations

import logging
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from flamingo_export.errors import ImageError
from flamingo_export.runtime.animations import open_animation
from flamingo_export.runtime.image_files import (
    FORMATS,
    EncodedSource,
    is_encoded,
    name_of,
    open_source,
    opened_by_pillow,
    translated,
)
from flamingo_export.runtime.images import ImageSource, Pixels, load_image

MAX_FRAMES = 30
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
"""Files in a folder of frames that are meant as frames, so that a damaged one is an error."""
_UNTIMED = 100.0
"""Milliseconds that a frame is shown for which the file says 0 or nothing: what browsers do."""
_NAMED = 5
_log = logging.getLogger(__name__)


VideoSource = EncodedSource | Sequence[ImageSource]
"""An animated file (a path, its bytes, a file object), a folder of frames, or the frames."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video among the media of a request: a file, a folder of frames, or the frames themselves; `num_frames` are used at most."""

    source: VideoSource
    num_frames: int | None = None


def load_video(video: Video, *, default_frames: int) -> Iterator[Pixels]:
    """The frames that the model sees, in order, each uint8 RGB [H, W, 3] and decoded when it is asked for.

    Raises ImageError if there are none, one cannot be read, or more than MAX_FRAMES are asked for.
    """
    wanted = default_frames if video.num_frames is None else video.num_frames
    if not 1 <= wanted <= MAX_FRAMES:
        raise ImageError(f"{wanted} frames were asked for, expected 1 to {MAX_FRAMES}")
    source = video.source
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        source = _frame_files(Path(source))
    if is_encoded(source):
        yield from _frames_of_file(source, wanted)
        return
    if not isinstance(source, Sequence | np.ndarray):
        raise ImageError(f"a video is given as {type(source).__name__}; give a file, a folder of frames or a list of images")
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise ImageError(f"a video is given as an array of shape {source.shape}; give one [T, H, W, 3], or a list of frames")
    if len(source) == 0:
        raise ImageError("a video has no frames")
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


def _frames_of_file(source: EncodedSource, wanted: int) -> Iterator[Pixels]:
    name = name_of(source)
    with open_source(source) as file:
        with translated(name):
            animation = open_animation(file, name)
        if animation.cut:
            raise ImageError(
                f"{name} is damaged or truncated: it ends after frame {len(animation.durations)} without the mark that ends an animation. "
                "Get the whole file, or save the frames that are there into a folder."
            )
        for index in sample_by_time(animation.durations, wanted):
            with translated(name):  # not while the caller has the frame
                frame = animation.frame(index)
            yield frame


def _frame_files(folder: Path) -> list[Path]:
    """The folder's images in natural order: frame2 before frame10. What is left out is logged by name; hidden files are not frames."""
    try:
        entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=_natural_key)
    except OSError as error:
        raise ImageError(f"{folder} cannot be read: {error.strerror}") from error
    frames = [path for path in entries if path.is_file() and (path.suffix.lower() in _SUFFIXES or _is_image(path))]
    if not frames:
        raise ImageError(f"{folder} holds no images (known: {', '.join(FORMATS)}), so it cannot be used as a video")
    kept = set(frames)
    if left_out := [path.name for path in entries if path not in kept]:
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        _log.warning(
            "%s: %d files are used as frames; left out, as they are not images that can be read: %s%s",
            folder,
            len(frames),
            ", ".join(left_out[:_NAMED]),
            more,
        )
    return frames


def _is_image(path: Path) -> bool:
    """Whether it is an image by what is in it, whatever its name."""
    try:
        with open_source(path) as file, translated(str(path)), opened_by_pillow(file):
            return True
    except ImageError:
        return False


def _natural_key(path: Path) -> list[tuple[int, int | str]]:
    pieces = re.split(r"(\d+)", path.name.lower())
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]
