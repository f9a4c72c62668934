"""Options that go together, written once: a verb takes the group as one parameter, the command line shows its options where it stands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from flamingo_export.cli import common_options
from flamingo_export.cli.common_options import (
    BackendName,
    Clip,
    Device,
    Fallback,
    Fp8,
    Fps,
    Frames,
    Images,
    Int4,
    Int8,
    Loras,
    OtherLanguageModel,
    OtherTokenizer,
    OtherVision,
    PolicyFile,
    Threads,
    Videos,
)

if TYPE_CHECKING:
    import typer

    from flamingo_export.precision import Policy
    from flamingo_export.runtime.contrastive import ContrastiveEncoder
    from flamingo_export.runtime.media import MediumSource
    from flamingo_export.runtime.model import Model
    from flamingo_export.sources.choice import CheckpointFolder, Source


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What lies beside a checkpoint that does not have everything."""

    language_model: OtherLanguageModel = None
    vision: OtherVision = None
    loras: Loras = None
    tokenizer: OtherTokenizer = None

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))

    def files(self, checkpoint: Path) -> CheckpointFolder:
        """The checkpoint with these."""
        return common_options.checkpoint_files(checkpoint, self.language_model, self.vision, self.loras, self.tokenizer)

    def source(self, size: str | None, checkpoint: Path | None, seed: int | None) -> Source:
        """The weights that --size or --checkpoint and these name. Raises typer.BadParameter where they exclude each other."""
        return common_options.chosen_source(
            size,
            checkpoint,
            seed=seed,
            language_model=self.language_model,
            vision=self.vision,
            loras=self.loras,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """To how many bits."""

    fp8: Fp8 = False
    int8: Int8 = False
    int4: Int4 = False
    policy: PolicyFile = None

    def chosen(self) -> Policy | None:
        """The policy that was asked for. Raises typer.BadParameter for more than one."""
        return common_options.chosen_policy({"fp8": self.fp8, "int8": self.int8, "int4": self.int4}, self.policy)


@dataclass(frozen=True, kw_only=True)
class Running:
    """What runs the graphs, and where."""

    backend: BackendName = "auto"
    fallback: Fallback = None
    device: Device = "cpu"
    threads: Threads = 0

    def opened(self, bundle: Path, *, rows: int | None = None) -> AbstractContextManager[Model]:
        """The bundle's model, with a spinner while it loads. rows: requests that run at once, None: as `load` chooses."""
        return common_options.opened(bundle, self.backend, self.device, self.threads, self.fallback, rows)

    def opened_encoder(self, bundle: Path) -> AbstractContextManager[ContrastiveEncoder]:
        """The bundle's contrastive encoder."""
        return common_options.opened_encoder(bundle, self.backend, self.device, self.threads, self.fallback)


@dataclass(frozen=True, kw_only=True)
class VideoCut:
    """Which frames of a video are looked at."""

    frames: Frames = None
    fps: Fps = None
    clip: Clip = None

    def media(self, ctx: typer.Context, images: Images, videos: Videos) -> list[MediumSource]:
        """Images and videos in the order of the command line. Raises typer.BadParameter."""
        return common_options.media_as_typed(ctx, images, videos, self.frames, self.fps, self.clip)


def with_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose parameters of dataclass types are shown, and given, as the options that these are made of."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    shown = list(_shown(inspect.signature(verb), hints, groups))

    @functools.wraps(verb)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        verb(**given)

    del called.__wrapped__  # or its signature would be read
    called.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown} | {"return": None}
    return called


def _shown(signature: inspect.Signature, hints: dict[str, Any], groups: dict[str, Any]) -> Iterator[inspect.Parameter]:
    for name, parameter in signature.parameters.items():
        if name not in groups:
            yield parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        of_group = get_type_hints(groups[name], include_extras=True)
        for each in fields(groups[name]):
            yield inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=of_group[each.name]
            )
