"""Progress of long work on stderr: bars on a terminal, a line a stage in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from flamingo_export.cli.output import remarks

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from flamingo_export.progress import Unit


class Reporter(Protocol):
    """What `flamingo_export.progress.Progress` asks for."""

    def stage(self, name: str, total: int, unit: Unit = "items") -> None: ...

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None: ...


@contextmanager
def reported() -> Iterator[Reporter]:
    """A reporter for the length of some work."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[size]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=remarks()) as bars:
        yield _Bars(bars)


class _Lines:
    def stage(self, name: str, total: int, unit: Unit = "items") -> None:
        from flamingo_export.cli.output import human_bytes

        size = f" ({human_bytes(total)})" if unit == "bytes" else f" ({total})" if total > 1 else ""
        print(f"{name}{size}", file=sys.stderr, flush=True)

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, name: str, total: int, unit: Unit = "items") -> None:
        from flamingo_export.cli.output import human_bytes

        self.finish()
        self._task = self._bars.add_task(name, total=max(total, 1), size=human_bytes(total) if unit == "bytes" else "")

    def advance(self, amount: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, amount)

    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", style="yellow", markup=False)

    def finish(self) -> None:
        """The current stage is over, whatever was counted of it."""
        if self._task is not None:
            total = self._bars.tasks[-1].total
            self._bars.update(self._task, completed=total)
