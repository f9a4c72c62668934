"""Standard streams as the caller left them: closed ones, and those whose encoding has not every character."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper


@contextmanager
def usable() -> Iterator[None]:
    """Lets everything be printed for the length of a `with` block, and leaves the streams as they were.

    What is closed (`command 2>&-`) is the null device: printing to it fails nowhere, and no file that is opened later gets its number, into
    which libraries would write what they have to say. Characters that an encoding does not have are written as escapes. Names of files
    that are not UTF-8 come out of stdout byte for byte.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, so this one
    before = sys.stdout, sys.stderr
    changed = []
    try:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is None:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (closed below)
            elif isinstance(stream, TextIOWrapper) and stream.errors == "strict":
                names = name == "stdout" and codecs.lookup(stream.encoding).name == "utf-8"
                stream.reconfigure(errors="surrogateescape" if names else "backslashreplace")
                changed.append(stream)
        yield
    finally:
        for stream in changed:
            if not stream.closed:
                stream.reconfigure(errors="strict")
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is None:
                getattr(sys, name).close()
                setattr(sys, name, None)
