"""How a run is done: everything that its predictions depend on, beside the model and the data."""

from __future__ import annotations

import msgspec

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.selection import Select
from flamingo_export.evaluation.task import Task
from flamingo_export.runtime.videos import MAX_FPS, MAX_FRAMES

MAX_SHOTS = 64
MAX_ENSEMBLE = 24
DEFAULT_SHOTS = (0, 4, 8, 16, 32)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """shots: numbers of examples, each a point of the curve. select: how they are chosen. ensemble: orders of them that are averaged over.

    zero_shot: what stands before a query with 0 shots: two texts, as the paper has it, or nothing. limit: items asked, drawn by the seed;
    None for all. beams, max_new_tokens: of open tasks (None: the task's). unit: items that run together, and are finished together.
    """

    shots: tuple[int, ...] = DEFAULT_SHOTS
    select: Select = "random"
    ensemble: int = 1
    zero_shot: str = "texts"
    limit: int | None = None
    seed: int = 0
    beams: int = 3
    max_new_tokens: int | None = None
    unit: int = 32
    fps: float | None = None
    num_frames: int | None = None

    def check(self, task: Task) -> None:
        """Raises EvaluationError naming each invalid setting."""
        faults = []
        if not self.shots or len(set(self.shots)) < len(self.shots) or any(not 0 <= each <= MAX_SHOTS for each in self.shots):
            faults.append(f"shots are {list(self.shots)}, expected different numbers from 0 to {MAX_SHOTS}")
        if not 1 <= self.ensemble <= MAX_ENSEMBLE:
            faults.append(f"ensemble is {self.ensemble}, expected 1 to {MAX_ENSEMBLE}")
        if self.select not in ("random", "rices", "shared", "listed"):
            faults.append(f"select is {self.select!r}, expected random, rices, shared or listed")
        if self.zero_shot not in ("texts", "nothing"):
            faults.append(f"zero_shot is {self.zero_shot!r}, expected texts or nothing")
        for name, value in (
            ("limit", self.limit),
            ("beams", self.beams),
            ("max_new_tokens", self.max_new_tokens),
            ("unit", self.unit),
            ("num_frames", self.num_frames),
        ):
            if value is not None and value < 1:
                faults.append(f"{name} is {value}, expected at least 1")
        if self.num_frames is not None and self.num_frames > MAX_FRAMES:
            faults.append(f"num_frames is {self.num_frames}, expected at most {MAX_FRAMES}")
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            faults.append(f"fps is {self.fps}, expected more than 0 and at most {MAX_FPS}")
        if self.seed < 0:
            faults.append(f"seed is {self.seed}, expected 0 or more")
        if faults:
            raise EvaluationError("; ".join(faults))

    def new_tokens(self, task: Task) -> int:
        """Tokens generated at most."""
        return self.max_new_tokens or task.max_new_tokens

    def needs_examples(self) -> bool:
        """Whether examples are shown or their texts are."""
        return any(self.shots) or (0 in self.shots and self.zero_shot == "texts")
