"""What a stage of scripts/gpu_check is, how it can end, and which stages run in which order within a budget of seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class NoDevice(Exception):
    """The first CUDA call failed: no device, no driver, or one too old."""


class NotPossible(Exception):
    """This machine or card cannot do it, whatever the code: a tool that refuses the device, too little memory."""


class NoTime(Exception):
    """The budget ended while the stage ran."""


class Failed(Exception):
    """A stage found something wrong; `result` goes into the report."""

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


@dataclass
class Context:
    """What the stages share. `architecture`: the device's ("90"), or None without one. What follows `nvcc` is set by the stages that make it."""

    seed: int
    rounds: int
    architecture: str | None
    nvcc: str | None = None
    wheels: Path | None = None
    """Folder of unpacked wheels, for the processes that stages start."""
    seconds: float = float("inf")
    """That are left when a stage starts; processes that it starts end before."""
    kernels_file: Path | None = None
    kernels: Any = None
    plugin: Path | None = None
    through_plugin: Any = None
    ranges_through_plugin: Any = None


@dataclass(frozen=True)
class Stage:
    """missing(context): what is not installed, or None. run(context): its results; raises Failed, NotPossible, NoTime, or NoDevice.

    rehearse(context): in a dry run, what takes the place of both where the libraries are not at hand; ends in NoDevice.
    needs: stages that run before it. value: of knowing its outcome, next to the others'. seconds: what it takes on an H200's machine, as
    estimated until a run there has measured it.
    """

    name: str
    missing: Callable[[Context], str | None]
    run: Callable[[Context], Result]
    rehearse: Callable[[Context], Result] | None = None
    needs: tuple[str, ...] = ()
    value: float = 1.0
    seconds: float = 30.0


@dataclass
class Choice:
    """The stages that are wanted, one after the other: `next` says which comes now."""

    stages: Sequence[Stage]
    wanted: Sequence[str]
    """In the order in which they were asked for."""
    skipped: frozenset[str] = frozenset()
    measured: Mapping[str, float] = field(default_factory=dict)
    """Seconds that a stage took on this card before."""
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._by_name = {stage.name: stage for stage in self.stages}

    def cost(self, name: str) -> float:
        """Seconds that a stage takes."""
        return self.measured.get(name, self._by_name[name].seconds)

    def before(self, name: str) -> list[str]:
        """A stage after all that it needs and that has not run, in order."""
        found: list[str] = []
        for needed in self._by_name[name].needs:
            found += [each for each in self.before(needed) if each not in found]
        return [each for each in (*found, name) if each not in self.done and each not in self.skipped]

    def next(self, seconds: float | None) -> list[Stage]:
        """The stages to run now, what is needed first; empty where nothing is left, or nothing that fits.

        seconds: None runs all in the order asked for. Else, of the stages that can be done in that time with what they need, the one that is
        worth the most a second.
        """
        left = [name for name in self.wanted if name not in self.done and name not in self.skipped]
        if not left:
            return []
        if seconds is None:
            return [self._by_name[name] for name in self.before(left[0])]
        fitting = [name for name in left if self._cost_with_needs(name) <= seconds]
        if not fitting:
            return []
        best = max(fitting, key=lambda name: self._by_name[name].value / max(self._cost_with_needs(name), 0.1))
        return [self._by_name[name] for name in self.before(best)]

    def left_out(self) -> Iterator[Stage]:
        """Those that were wanted and have not run."""
        return (self._by_name[name] for name in self.wanted if name not in self.done and name not in self.skipped)

    def _cost_with_needs(self, name: str) -> float:
        return sum(self.cost(each) for each in self.before(name))
