"""Videos as frames: an animated image, a folder of images, or a sequence of images.

Frames are taken evenly over the whole length, first and last included. The paper trains on 8 and evaluates with 30, its 8 learned time
embeddings interpolated (flamingo_reference.time_weights); the default here is as many as there are embeddings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flamingo_export.errors import ImageError
from flamingo_export.runtime.images import ImageSource, Pixels, load_image, open_image, to_rgb

MAX_FRAMES = 30
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})


VideoSource = str | os.PathLike[str] | Sequence[ImageSource]
"""A file, a folder of frames, or the frames."""


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
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_dir():
            yield from _frames_of_file(path, wanted)
            return
        source = _frame_files(path)
    elif not isinstance(source, Sequence | np.ndarray):
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


def _frames_of_file(path: Path, wanted: int) -> Iterator[Pixels]:
    with open_image(path) as image:
        for index in sample_frames(getattr(image, "n_frames", 1), wanted):
            image.seek(index)
            yield to_rgb(image, f"frame {index} of {path}")


def _frame_files(folder: Path) -> list[Path]:
    """The folder's images in natural order: frame2 before frame10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise ImageError(f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))}), so it cannot be used as a video")
    return sorted(files, key=_natural_key)


def _natural_key(path: Path) -> list[tuple[int, int | str]]:
    pieces = re.split(r"(\d+)", path.name.lower())
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]
