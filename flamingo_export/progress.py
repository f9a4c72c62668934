"""How long work tells what it is doing. The command line draws bars; a program passes its own or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Unit = Literal["bytes", "items"]


class Phase(NamedTuple):
    """Something under way inside of a stage, `done` of `steps` steps of it."""

    name: str
    done: int
    steps: int


class Progress(Protocol):
    """Receives stages one after the other; each call is cheap and may come from the thread that runs the build."""

    def stage(self, name: str, total: int, unit: Unit = "items") -> None:
        """A new stage of `total` units begins; the one before it is over."""

    def advance(self, amount: int) -> None:
        """`amount` more units of the current stage are done."""

    def within(self, phases: Sequence[Phase]) -> None:
        """What is under way inside of the current stage, the outermost first; called whenever it may have changed."""

    def note(self, text: str) -> None:
        """Something that the user should read, one sentence."""


class _Silent:
    def stage(self, name: str, total: int, unit: Unit = "items") -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def within(self, phases: Sequence[Phase]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


SILENT: Progress = _Silent()
"""Tells nothing."""
