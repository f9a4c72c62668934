"""Finding the images and videos that annotations name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flamingo_export.evaluation.task import Item
from flamingo_export.runtime.videos import Video

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif", "")
"""What a video may be called, in the order in which they are tried; without a suffix it is a folder of frames."""


def image_in(folders: Sequence[Path], name: str) -> Path:
    """The image of that name in the first of the folders that holds it; where none does, where it was expected first."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    return folders[0] / name


def video_in(folders: Sequence[Path], stem: str) -> Path:
    """The video with that stem, in whichever of the known formats it lies there; else where an mp4 file was expected."""
    for folder in folders:
        for suffix in VIDEO_SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.exists():
                return path
    return folders[0] / f"{stem}.mp4"


def missing_file(item: Item) -> Path | None:
    """The file or folder that the item's medium is, if it does not exist or is a file of 0 bytes, which a download leaves that never began;
    None for media that are there or held in memory."""
    medium = item.medium.source if isinstance(item.medium, Video) else item.medium
    if isinstance(medium, str | Path):
        path = Path(medium)
        try:
            found = path.stat()
            return path if found.st_size == 0 and path.is_file() else None
        except (OSError, ValueError):
            return path
    return None
