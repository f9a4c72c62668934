"""TensorRT's nested phases, and Ctrl-C that stops a build at once.

The build runs in a thread of its own: the interpreter handles signals in the calling thread only, which would be deep inside of TensorRT
until the end. A phase's share of the bar is its parent's step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

from flamingo_export.progress import Phase, Progress

UNITS = 1000
_POLL_SECONDS = 0.2
T = TypeVar("T")


class Phases:
    """The phases under way, and how much of the whole is done."""

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._root: str | None = None
        self._reported = 0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` steps begins inside of one of the parent's."""
        with self._lock:
            self._open[name] = _Phase(parent, max(steps, 1))
            if self._root is None and parent is None:
                self._root = name

    def step(self, name: str, index: int) -> None:
        """Step `index`, from 0, of a phase is done."""
        with self._lock:
            if name in self._open:
                phase = self._open[name]
                phase.done = min(max(phase.done, index + 1), phase.steps)

    def finish(self, name: str) -> None:
        """A phase is over, however many of its steps were counted."""
        with self._lock:
            if name in self._open and name != self._root:
                del self._open[name]
            elif name == self._root:
                self._open[name].done = self._open[name].steps

    def units(self) -> int:
        """Units of UNITS done since the last call."""
        with self._lock:
            total = int(UNITS * self._fraction(self._root)) if self._root is not None else 0
            fresh = max(0, total - self._reported)
            self._reported += fresh
            return fresh

    def under_way(self) -> tuple[Phase, ...]:
        """Phases that are not over, the outermost first; the root, of which `units` tells, is left out."""
        with self._lock:
            return tuple(Phase(name, phase.done, phase.steps) for name, phase in self._open.items() if name != self._root)

    def _fraction(self, name: str | None) -> float:
        if name is None:
            return 0.0
        phase = self._open[name]
        inner = max((self._fraction(child) for child, other in self._open.items() if other.parent == name), default=0.0)
        return min(1.0, (phase.done + inner) / phase.steps)


class _Phase:
    def __init__(self, parent: str | None, steps: int) -> None:
        self.parent, self.steps, self.done = parent, steps, 0


def monitor(trt: ModuleType, phases: Phases, cancelled: threading.Event) -> Any:
    """TensorRT's progress monitor: fills `phases`, and stops the build once `cancelled` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, parent, steps)

        def step_complete(self, name: str, index: int) -> bool:
            phases.step(name, index)
            return not cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

    return Monitor()


def watched(work: Callable[[], T], phases: Phases, cancelled: threading.Event, progress: Progress) -> T:
    """Runs `work` in a thread and tells of its phases. An exception of the calling thread (Ctrl-C) sets `cancelled`, waits for the end
    of the work and goes on its way."""
    results: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def run() -> None:
        try:
            results.put((True, work()))
        except BaseException as error:
            results.put((False, error))

    thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
    thread.start()
    try:
        while True:
            try:
                done, value = results.get(timeout=_POLL_SECONDS)
                break
            except Empty:
                progress.advance(phases.units())
                progress.within(phases.under_way())
    except BaseException:
        cancelled.set()
        thread.join()
        raise
    thread.join()
    if not done:
        raise value
    result: T = value
    return result
