"""A Progress for tests."""

from __future__ import annotations

from collections.abc import Sequence

from flamingo_export.progress import Phase


class Recorder:
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.notes: list[str] = []
        self._stage = ""

    def stage(self, name: str, total: int, unit: str = "items") -> None:
        self._stage, self.stages[name], self.done[name] = name, total, 0

    def advance(self, amount: int) -> None:
        self.done[self._stage] += amount

    def within(self, phases: Sequence[Phase]) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)
