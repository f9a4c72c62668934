"""Weights of a live PyTorch model, which must be the standard one: a graph is built from the config, not from the model's code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from flamingo_export.bundle.manifest import SourceRecord
from flamingo_export.errors import UnsupportedModel
from flamingo_export.sources.base import combined_digest, tensor_digest, towers_digest
from flamingo_reference.arrays import Array
from flamingo_reference.config import OwnVisionConfig
from flamingo_reference.input_format import PAPER, InputFormat
from flamingo_reference.names import expected_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from flamingo_reference.model import Flamingo

_SHOWN_FAULTS = 40
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class LiveSource:
    """A `flamingo_reference.model.Flamingo` in memory, exactly as the builder knows it."""

    golden = None
    notes: tuple[str, ...] = ()
    digested = False  # once is enough: see identity

    def __init__(self, model: Flamingo, tokenizer: Path | None = None, inputs: InputFormat = PAPER) -> None:
        """Raises UnsupportedModel naming every module, hook, forward, parameter or buffer that is not the standard model's. A vision encoder
        that the config says is the user's own may be any module."""
        refuse_unknown(model)
        self.model, self.config, self.tokenizer, self.inputs = model, model.config, tokenizer, inputs
        text = model.config.contrastive.text if model.config.contrastive is not None else None
        shared = text is not None and text.vocab_size == model.config.language_model.vocab_size
        self.text_tokenizer = tokenizer if shared else None
        self._tensors: dict[str, Tensor] = {
            name: tensor for name, tensor in model.named_parameters(remove_duplicate=False) if not _own_vision(model, name)
        }

    @property
    def own_vision_encoder(self) -> Any:
        """The module to be traced where the vision encoder is not ours, else None."""
        return self.model.vision_encoder if isinstance(self.config.vision, OwnVisionConfig) else None

    @property
    def digest(self) -> str:
        """Of the model's tensors, those of an own vision encoder among them."""
        return combined_digest(self._digests)

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        """Nothing less tells whether a model in memory is the one that an interrupted build was of."""
        tensors = {f"vision_encoder.{name}": tensor for name, tensor in self._own_tensors().items()} | self._tensors
        with ThreadPoolExecutor(2) as pool:
            digests = pool.map(lambda tensor: tensor_digest(_on_host(tensor)), tensors.values())
            return dict(zip(tensors, digests, strict=True))

    def _own_tensors(self) -> dict[str, Tensor]:
        module = self.own_vision_encoder
        return {} if module is None else dict(module.state_dict())

    @property
    def identity(self) -> str:
        """Names the model by its numbers."""
        return f"live {self.digest} {towers_digest(self._digests) or ''}".strip()

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Array:
        """A tensor's numbers on the host; on a CPU they share the model's memory."""
        return _on_host(self._tensors[name])

    def record(self, digests: Mapping[str, str]) -> SourceRecord:
        """The digest of all tensors names the model."""
        return SourceRecord(kind="live", sha256=self.digest, towers_sha256=towers_digest(self._digests))


def _on_host(tensor: Tensor) -> Array:
    import ml_dtypes
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def _own_vision(model: Flamingo, name: str) -> bool:
    """Whether a module or tensor belongs to a vision encoder that is the user's own."""
    return isinstance(model.config.vision, OwnVisionConfig) and (name == "vision_encoder" or name.startswith("vision_encoder."))


def refuse_unknown(model: Any) -> None:
    """Raises UnsupportedModel unless `model` is the standard Flamingo, module by module.

    Whatever changes what a module computes without changing the config must be refused: subclasses, forwards set on an instance or
    put in a class's place, hooks (global ones too), parametrizations, other settings, tensors that are missing, too many or not numbers.
    """
    import torch

    from flamingo_reference.model import Flamingo

    if type(model) is not Flamingo:
        raise UnsupportedModel(
            f"the model is a {type(model).__module__}.{type(model).__qualname__}, expected flamingo_reference.model.Flamingo itself. "
            "Copy its weights into one: Flamingo(config).load_state_dict(...)"
        )
    with torch.device("meta"):
        standard = Flamingo(model.config)
    faults = [*_module_faults(model, standard), *_global_hooks(), *_tensor_faults(model)]
    if faults:
        rest = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        raise UnsupportedModel(
            f"the model is not the standard Flamingo: {'; '.join(faults[:_SHOWN_FAULTS])}{rest}. "
            "Undo these changes, or bake them into the weights of a standard model."
        )


def _module_faults(model: Flamingo, standard: Flamingo) -> Iterator[str]:
    expected = dict(standard.named_modules(remove_duplicate=False))
    found = {name: module for name, module in model.named_modules(remove_duplicate=False) if not _own_vision(model, name)}
    if isinstance(model.config.vision, OwnVisionConfig):
        encoder = expected.pop("vision_encoder")
        if type(model.vision_encoder) is type(encoder):
            yield "its vision encoder is your own by its config, and not set: model.vision_encoder = MODULE"
    for name in expected:
        if name not in found:
            yield f"module {name} is missing"
    for name, module in found.items():
        label = name or "the model"
        if name not in expected:
            yield f"module {name} ({type(module).__qualname__}) is not known"
            continue
        if type(module) is not type(expected[name]):
            yield f"{label} is a {type(module).__qualname__}, expected {type(expected[name]).__qualname__}"
            continue
        # A function in vars() hides the method of that name in the class.
        for key in vars(module):
            if callable(getattr(type(module), key, None)):
                yield f"{label} has its own {key}"
        yield from _replaced_forward(label, module)
        for hooks in _HOOKS:
            if getattr(module, f"_{hooks}"):
                yield f"{label} has {hooks.replace('_', ' ')}"
        yield from _changed_settings(label, module, expected[name])


def _replaced_forward(label: str, module: Any) -> Iterator[str]:
    """A forward that was put in a class's place keeps the name of where it was written."""
    for base in type(module).__mro__:
        if "forward" in vars(base):
            forward = vars(base)["forward"]
            where = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
            # nn.Module's own stand-in, of classes without a forward such as ModuleList, is named otherwise.
            named = where == (base.__module__, f"{base.__qualname__}.forward") and not hasattr(forward, "__wrapped__")
            # functools.wraps copies names, but not where the code was written.
            code = getattr(forward, "__code__", None)
            written = getattr(sys.modules.get(base.__module__), "__file__", None)
            if not (named and code is not None and code.co_filename == written) and base.__qualname__ != "Module":
                yield f"{label}: the forward of {base.__qualname__} was replaced by {where[0]}.{where[1]}"
            return


def _global_hooks() -> Iterator[str]:
    from torch.nn.modules import module

    for hooks in _HOOKS:
        if getattr(module, f"_global_{hooks}"):
            yield f"torch has global {hooks.replace('_', ' ')}"


def _tensor_faults(model: Flamingo) -> Iterator[str]:
    import torch

    wanted = expected_tensors(model.config)
    tensors = {name: tensor for name, tensor in model.named_parameters(remove_duplicate=False) if not _own_vision(model, name)}
    for name in wanted:
        if name not in tensors:
            yield f"parameter {name} is missing"
    for name, tensor in tensors.items():
        if name not in wanted:
            yield f"parameter {name} is not known"
        elif tuple(tensor.shape) != wanted[name]:
            yield f"parameter {name} has shape {tuple(tensor.shape)}, expected {wanted[name]}"
        elif tensor.is_meta:
            yield f"parameter {name} is on the meta device and has no numbers"
        elif tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            yield f"parameter {name} is {tensor.dtype}, expected a float of 16 to 64 bits"
        elif type(tensor) is not torch.nn.Parameter or tensor.layout != torch.strided:
            yield f"parameter {name} is a {type(tensor).__qualname__} of layout {tensor.layout}, expected a dense Parameter"
    for name, _ in model.named_buffers(remove_duplicate=False):
        if not _own_vision(model, name):
            yield f"buffer {name} is not known"


def _changed_settings(label: str, module: Any, standard: Any) -> Iterator[str]:
    """Plain attributes (eps, strides, sizes) that differ from those the config gives."""
    plain = (int, float, str, bool, tuple, msgspec.Struct)
    for key, value in vars(standard).items():
        if isinstance(value, plain) and key != "training" and getattr(module, key, None) != value:
            yield f"{label}.{key} is {getattr(module, key, None)!r}, the config gives {value!r}"
