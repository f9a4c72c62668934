"""transformers' IDEFICS with weights that are read from the checkpoint when a module runs, and dropped when it has run.

    IdeficsForVisionText2Text on the meta device ── hooks ──> tensors of the checkpoint's files, in one float type

So the whole model runs, in transformers' own code, in the memory of its largest tensor. `held` keeps a part while it is used often.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from flamingo_export.backends.memory import release
from flamingo_export.errors import ParityError, pip_install

if TYPE_CHECKING:
    from torch import Tensor, nn

INSTALL = pip_install("transformers")
LOWEST = "5.5"
"""The lowest version that the comparison was tried with; pyproject.toml asks for the same."""
_TIED = {
    "lm_head.weight": "model.embed_tokens.weight",
    "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
}


def idefics_classes() -> tuple[Any, Any]:
    """transformers' IdeficsConfig and IdeficsForVisionText2Text. Raises ParityError if it is missing, too old, or without them."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ParityError(f"transformers is not installed, so there is nothing of it to compare with: {INSTALL}") from error
    if Version(found) < Version(LOWEST):
        raise ParityError(f"transformers {found} is too old to compare with: {LOWEST} or later is needed: {INSTALL}")
    try:
        from transformers import IdeficsConfig, IdeficsForVisionText2Text
    except ImportError as error:
        raise ParityError(
            f"transformers {found} has no IdeficsForVisionText2Text (or cannot load it: {error}). Install one that has: {INSTALL}"
        ) from error
    return IdeficsConfig, IdeficsForVisionText2Text


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

    def __init__(self, settings: Mapping[str, Any], read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        """settings: the checkpoint's config.json. read: a tensor in `dtype` by its published name, kept by nobody else.

        Raises ParityError if transformers has no such model, or one of other parts.
        """
        self.mode: Callable[[], contextlib.AbstractContextManager[Any]] = (
            InDouble if dtype == torch.float64 else contextlib.nullcontext
        )
        self._read = read
        self._held: set[nn.Module] = set()
        self._names: dict[nn.Module, str] = {}
        with self.mode():
            self.model = _empty(settings, dtype)
        for name, module in self.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                self._names[module] = f"{name}." if name else ""
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def tensor_names(self) -> set[str]:
        """Published names of every parameter, those that two modules share once."""
        tied = _TIED if self.model.config.tie_word_embeddings else {}
        names = {f"{prefix}{name}" for module, prefix in self._names.items() for name, _ in _own(module)}
        return {tied.get(name, name) for name in names}

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
        tied = _TIED if self.model.config.tie_word_embeddings else {}
        for name, empty in _own(module):
            published = f"{self._names[module]}{name}"
            found = self._read(tied.get(published, published))
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


def _empty(settings: Mapping[str, Any], dtype: torch.dtype) -> Any:
    config_class, model_class = idefics_classes()
    # Gates come from the checkpoint; transformers 5.23 cannot draw scalar ones, which published files ask for.
    config = config_class.from_dict({**settings, "alpha_initializer": "zeros", "attn_implementation": "eager"})
    with torch.device("meta"):
        model = model_class(config).to(dtype).requires_grad_(False).eval()
    # Buffers are no part of checkpoints: what transformers' own loading does for them.
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
    return model
