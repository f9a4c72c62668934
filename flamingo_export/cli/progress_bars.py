"""Progress of long work on stderr: bars on a terminal; in a log a line a stage, and one a minute while it lasts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flamingo_export.cli.output import remarks

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from flamingo_export.progress import Phase, Progress, Unit


_TOLD_SECONDS = 60


@contextmanager
def reported() -> Iterator[Progress]:
    """A reporter for the length of some work."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[size]}"),
    )
    with RichProgress(*columns, TimeRemainingColumn(), console=remarks()) as bars:
        yield _Bars(bars)


def _pace(done: int, seconds: float, unit: Unit) -> str:
    """How much of a stage was done a second."""
    from flamingo_export.cli.output import human_bytes

    rate = done / max(seconds, 1e-9)
    return f"{human_bytes(rate) if unit == 'bytes' else f'{rate:.1f}'} a second"


def _left(done: int, total: int, seconds: float) -> str:
    """How long the rest of a stage takes at the pace so far; nothing where none is left, or nothing was done yet."""
    from flamingo_export.cli.output import human_seconds

    return f", {human_seconds((total - done) * seconds / done)} left" if 0 < done < total else ""


class _Lines:
    def __init__(self) -> None:
        self._name, self._total, self._done = "", 1, 0
        self._unit: Unit = "items"
        self._began = self._told = time.monotonic()

    def stage(self, name: str, total: int, unit: Unit = "items") -> None:
        from flamingo_export.cli.output import human_bytes

        size = f" ({human_bytes(total)})" if unit == "bytes" else f" ({total})" if total > 1 else ""
        print(f"{name}{size}", file=sys.stderr, flush=True)
        self._name, self._total, self._done, self._unit = name, max(total, 1), 0, unit
        self._began = self._told = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._told >= _TOLD_SECONDS:
            pace = _pace(self._done, now - self._began, self._unit)
            left = _left(self._done, self._total, now - self._began)
            print(f"{self._name}: {100 * self._done // self._total} %, {pace}{left}", file=sys.stderr, flush=True)
            self._told = now

    def within(self, phases: Sequence[Phase]) -> None:
        pass

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._total, self._done = 1, 0
        self._unit: Unit = "items"
        self._began = 0.0
        self._inner: dict[str, TaskID] = {}

    def stage(self, name: str, total: int, unit: Unit = "items") -> None:
        from flamingo_export.cli.output import human_bytes

        self.finish()
        self._total, self._done, self._unit, self._began = max(total, 1), 0, unit, time.monotonic()
        self._task = self._bars.add_task(name, total=self._total, size=human_bytes(total) if unit == "bytes" else "")

    def advance(self, amount: int) -> None:
        if self._task is None:
            return
        self._done += amount
        self._bars.advance(self._task, amount)
        if self._unit == "items":
            self._bars.update(self._task, size=_pace(self._done, time.monotonic() - self._began, self._unit))

    def within(self, phases: Sequence[Phase]) -> None:
        """A bar below the stage's for each phase, as long as it lasts."""
        from rich.markup import escape

        for name in self._inner.keys() - {phase.name for phase in phases}:
            self._bars.remove_task(self._inner.pop(name))
        for depth, phase in enumerate(phases, start=1):
            if phase.name not in self._inner:
                shown = f"{'  ' * depth}{escape(phase.name)}"
                self._inner[phase.name] = self._bars.add_task(shown, total=phase.steps, size="")
            self._bars.update(self._inner[phase.name], completed=phase.done)

    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", style="yellow", markup=False)

    def finish(self) -> None:
        """The current stage is over, whatever was counted of it."""
        if self._task is not None:
            self.within(())
            self._bars.update(self._task, completed=self._total)
