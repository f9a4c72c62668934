"""What lies in a file's place when a download went wrong: a Git LFS pointer, a web page."""

from __future__ import annotations

from pathlib import Path

from flamingo_reference.checkpoints.files.tensors import CheckpointError

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGE = (b"<!doctype html", b"<html")
_READ = 512  # bytes


def refuse_stand_in(path: Path) -> None:
    """Raises CheckpointError if a file holds a Git LFS pointer or an HTML page. Nothing is said of a file that cannot be read."""
    found = stand_in(path)
    if found is not None:
        raise CheckpointError(f"{path} is {found}")


def stand_in(path: Path) -> str | None:
    """What lies in a file's place and what to do, as sentences that go on from "It is"; None where nothing does, or it cannot be read."""
    try:
        with path.open("rb") as file:
            begin = file.read(_READ)
    except OSError:
        return None
    if begin.startswith(_LFS):
        return (
            "a Git LFS pointer, a few lines that stand for the file: the file itself was not fetched. Run `git lfs pull` in its "
            "folder, or download it with `hf download`."
        )
    if begin.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGE):
        return (
            "an HTML page, as a site sends it in place of a file when access is denied or the address is that of a page. "
            "Download the file itself; a gated model needs an account that may read it."
        )
    return None
