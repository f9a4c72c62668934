"""transformers' model with weights that are read from the checkpoint when a module runs, and dropped when it has run.

    a model on the meta device ── hooks ──> tensors of the checkpoint's files, in one float type

So the whole model runs, in transformers' own code, in the memory of its largest tensor. `held` keeps a part while it is used often.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from flamingo_export.backends.host_memory import release
from flamingo_export.errors import ParityError
from flamingo_export.validate.expected.transformers.theirs import INSTALL, Theirs

if TYPE_CHECKING:
    from torch import Tensor, nn


class InDouble(TorchFunctionMode):
    """What is written as fp32 in code that runs is fp64.

    transformers' IDEFICS computes norms, softmax and rotary positions in fp32 whatever the model's type. A reference has to be more exact
    than what it judges, and it judges transformers' own fp32 too.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wider = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*(_wider(value) for value in args), **wider)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class StreamedModel:
    """`model` computes in `dtype`; its parameters are on the meta device but while they are used."""

    def __init__(self, settings: Mapping[str, Any], read: Callable[[str], Tensor], dtype: torch.dtype, theirs: Theirs) -> None:
        """settings: the checkpoint's config.json. read: a tensor in `dtype` by its published name, kept by nobody else.

        Raises ParityError if transformers has no such model, or one of other parts.
        """
        self.mode: Callable[[], contextlib.AbstractContextManager[Any]] = (
            InDouble if dtype == torch.float64 else contextlib.nullcontext
        )
        self._read, self.theirs = read, theirs
        self._held: set[nn.Module] = set()
        self._names: dict[nn.Module, str] = {}
        with self.mode():
            self.model = _empty(settings, dtype, theirs)
        for name, module in self.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                self._names[module] = f"{name}." if name else ""
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)
        for module in theirs.kept(self.model):
            self._fill(module)
            self._held.add(module)

    def tensor_names(self) -> set[str]:
        """Published names of every parameter, those that two modules share once."""
        names = {f"{prefix}{name}" for module, prefix in self._names.items() for name, _ in _own(module)}
        return {self.theirs.published(name, self.model.config) for name in names}

    @contextlib.contextmanager
    def held(self, part: nn.Module) -> Iterator[None]:
        """All weights of a part stay in memory for the length of a `with` block."""
        modules = [module for module in part.modules() if module in self._names]
        try:
            for module in modules:
                self._fill(module)
                self._held.add(module)
            yield
        finally:
            for module in modules:
                self._held.discard(module)
                self._drop(module)
            release()

    def _before(self, module: nn.Module, _: Any) -> None:
        if module not in self._held:
            self._fill(module)

    def _after(self, module: nn.Module, _: Any, __: Any) -> None:
        if module not in self._held:
            self._drop(module)

    def _fill(self, module: nn.Module) -> None:
        for name, empty in _own(module):
            published = self.theirs.published(f"{self._names[module]}{name}", self.model.config)
            found = self._read(published)
            if found.shape != empty.shape:
                raise ParityError(
                    f"{published} has shape {tuple(found.shape)} in the checkpoint, {tuple(empty.shape)} in transformers' model. "
                    "config.json and tensors are not of one model."
                )
            module._parameters[name] = torch.nn.Parameter(found, requires_grad=False)

    def _drop(self, module: nn.Module) -> None:
        for name, full in _own(module):
            module._parameters[name] = torch.nn.Parameter(torch.empty_like(full, device="meta"), requires_grad=False)


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _empty(settings: Mapping[str, Any], dtype: torch.dtype, theirs: Theirs) -> Any:
    config_class, model_class = theirs.classes()
    config = config_class.from_dict({**settings, **theirs.settings, "attn_implementation": "eager"})
    with torch.device("meta"):
        model = model_class(config).to(dtype).requires_grad_(False).eval()
    # Buffers are not part of checkpoints: what transformers' own loading does for them.
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            buffer = module._buffers[name]
            module._buffers[name] = torch.full(
                buffer.shape, torch.nan if buffer.is_floating_point() else -1, dtype=buffer.dtype
            )
        if empty:
            model._init_weights(module)
        unknown = [name for name in empty if not bool((module._buffers[name] >= 0).all())]
        if unknown:
            raise ParityError(
                f"transformers {importlib.metadata.version('transformers')} leaves {', '.join(unknown)} of {type(module).__name__} "
                f"unset. Install another version: {INSTALL}"
            )
    theirs.correct(model)
    return model
