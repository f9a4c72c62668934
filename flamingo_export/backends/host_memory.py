"""Freed memory back to the system, so that what was done with and what is yet to come are not in memory together."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release() -> None:
    """Gives back what was freed. glibc keeps freed blocks of up to 32 MB, which is most tensors, for its own later use; elsewhere a no-op."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, macOS, Windows
        return lambda _: None
    return trim
