"""Ctrl-C and SIGTERM end a command alike, whenever they come: work that is under way is left so that it can be resumed, one line is printed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
"""128 and the signal's number, as shells have it."""


class Interrupts:
    """Which signal came. An exception after one is what it led to: an extension that is interrupted while it loads raises ImportError."""

    def __init__(self) -> None:
        self.received: int | None = None

    def outcome(self) -> tuple[int, str]:
        """Exit code, and the word for it."""
        return (EXIT_TERMINATED, "terminated") if self.received == signal.SIGTERM else (EXIT_INTERRUPTED, "interrupted")

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        raise KeyboardInterrupt


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Turns both signals into KeyboardInterrupt, where nothing else was set to take care of them."""
    interrupts = Interrupts()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == usual:
                before[number] = signal.signal(number, interrupts._raise)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
