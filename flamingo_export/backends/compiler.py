"""What a backend offers that compiles engines into a bundle; builds know it by this protocol only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from flamingo_export.backends.base import Backend
from flamingo_export.bundle.manifest import EngineRecord, GraphRecord, Manifest, ShapeLimits
from flamingo_export.precision import Policy
from flamingo_export.progress import Progress
from flamingo_reference.config import ModelConfig

Finished = Callable[[str, str], EngineRecord | None]
"""(path of an engine in the bundle, digest of all that it depends on) -> the record of one that an interrupted build has finished."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What compiling an engine will take of the host, in bytes and seconds of one core."""

    weight_bytes: int
    memory: int
    seconds: float


class Ready(Protocol):
    """What a compiler's `prepare` found, for its `compile`."""

    @property
    def target(self) -> str:
        """The GPU that engines are built for, `sm89`."""


class Compiler(Backend, Protocol):
    """A backend that compiles each graph of a bundle into an engine, for one target."""

    def fits(self, manifest: Manifest, gpus: Sequence[int] = (0,)) -> bool:
        """Whether a bundle has an engine of each graph that can be run here, for each GPU of these numbers."""

    def card_memory(self) -> int | None:
        """Bytes of the card that engines are built for, where it is this machine's."""

    def check_limits(self, limits: ShapeLimits) -> None:
        """Raises BuildError if no engine can have these limits."""

    def check_policy(self, policy: Policy, target: str | None) -> None:
        """Raises BuildError, naming the nearest policy, if engines for the target (None: not known yet) cannot follow this one."""

    def estimate(self, weight_bytes: int) -> Estimate:
        """What compiling a graph that reads so many bytes of weights will take."""

    def check_memory(self, config: ModelConfig, graph: GraphRecord, sizes: Mapping[str, int]) -> Estimate:
        """The same of a graph. sizes: bytes of each of the bundle's weights. Raises BuildError if this machine has too little memory."""

    def prepare(self) -> Ready:
        """Finds all that can be missing before work begins: library, GPU or target, plugin. Raises BackendError saying what is."""

    def compile(
        self, prepared: Any, bundle: Path, manifest: Manifest, graph: GraphRecord, *, progress: Progress, finished: Finished
    ) -> EngineRecord:
        """Compiles a graph into the bundle; an engine that `finished` knows is not built again.

        prepared: what `prepare` returned. Raises BuildError if the graph is refused or memory is short.
        """
