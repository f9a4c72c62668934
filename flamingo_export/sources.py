"""Where a build's weights come from: a checkpoint folder, a live PyTorch model, or seeded random numbers."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from flamingo_export.errors import CheckpointError, UnsupportedModel
from flamingo_export.manifest import SourceRecord
from flamingo_reference.checkpoints import native
from flamingo_reference.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from flamingo_reference.model import Flamingo

Array = npt.NDArray[Any]


class WeightSource(Protocol):
    """A model's tensors under the names of `flamingo_reference.checkpoints.native.expected_tensors`."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def identity(self) -> str:
        """Changes whenever the tensors do: an interrupted build goes on only where it is the same."""

    @property
    def tokenizer(self) -> Path | None:
        """The model's tokenizer.json."""

    @property
    def golden(self) -> Path | None:
        """Folder of golden values recorded for these weights."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Array:
        """A tensor's numbers, in its own type (float64, float32, float16 or bfloat16)."""

    def record(self, sha256: str) -> SourceRecord:
        """What the manifest says of the source; sha256 is the digest of all tensors (`combined_digest`)."""


def combined_digest(digests: dict[str, str]) -> str:
    """One digest of all tensors, from the SHA-256 of each."""
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(f"{name} {digests[name]}\n".encode())
    return total.hexdigest()


class RandomSource:
    """Seeded random weights in the sizes of a config: for measuring, not for captions.

    Each tensor has a generator of its own, seeded by (seed, name), so the order of reading does not matter. Scales keep activations sane;
    gates and NFNet's skip gains are drawn, so that no part of the model is silent.
    """

    tokenizer = None
    golden = None

    def __init__(self, config: ModelConfig, seed: int) -> None:
        config.validate()
        self.config, self.seed = config, seed
        self._shapes = native.expected_tensors(config)
        self.identity = f"random {seed} {hashlib.sha256(msgspec.json.encode(config)).hexdigest()}"

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str) -> Array:
        """Draws a tensor: float32."""
        shape = self._shapes[name]
        random = np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(name.encode())]))
        values = random.standard_normal(shape, dtype=np.float32)
        offset, scale = _offset_and_scale(name, shape)
        values = np.multiply(values, np.float32(scale), out=values if shape else None)
        return np.asarray(values + np.float32(offset) if offset else values)

    def record(self, sha256: str) -> SourceRecord:
        """Kind and seed say all; the digest is kept too."""
        return SourceRecord(kind="random", seed=self.seed, sha256=sha256)


def _offset_and_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    last = name.rsplit(".", 1)[-1]
    if last == "gain" or (last == "weight" and len(shape) == 1):
        return 1.0, 0.1
    if last in ("attention_gate", "ffw_gate", "skip_gain"):
        return 0.0, 0.5
    if last in ("bias", "content_bias", "position_bias"):
        return 0.0, 0.1
    if last in ("latents", "time_embeddings"):
        return 0.0, 1.0
    if name.startswith("vision_encoder"):
        return 0.0, 1.0 / float(np.sqrt(np.prod(shape[1:])))
    return 0.0, 1.0 / float(np.sqrt(shape[-1]))


class CheckpointSource:
    """A checkpoint folder in our own format."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if config or tensors are missing, do not fit each other or are cut short."""
        try:
            self.config, self._reader = native.load_native(folder)
        except (native.CheckpointError, ConfigError) as error:
            raise CheckpointError(str(error)) from error
        stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
        marks = [[str(folder.resolve()), name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        self.identity = f"checkpoint {hashlib.sha256(msgspec.json.encode([marks, self.config])).hexdigest()}"
        tokenizer, golden = folder / "tokenizer" / "tokenizer.json", folder / "golden"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.golden = golden if golden.is_dir() else None

    def names(self) -> list[str]:
        """All tensor names."""
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._reader.shape(name)

    def read(self, name: str) -> Array:
        """A tensor, mapped from its file."""
        return self._reader.read(name)

    def record(self, sha256: str) -> SourceRecord:
        """The digest of all tensors names the checkpoint."""
        return SourceRecord(kind="checkpoint", sha256=sha256)


class LiveSource:
    """A `flamingo_reference.model.Flamingo` in memory, exactly as the builder knows it."""

    golden = None

    def __init__(self, model: Flamingo, tokenizer: Path | None = None) -> None:
        """Raises UnsupportedModel naming every module, hook, forward, parameter or buffer that is not the standard model's."""
        refuse_unknown(model)
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self._tensors = dict(model.state_dict())
        digests = {name: tensor_digest(self.read(name)) for name in self._tensors}
        self.identity = f"live {combined_digest(digests)}"

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Array:
        """A tensor's numbers on the host; on a CPU they share the model's memory."""
        import ml_dtypes
        import torch

        tensor = self._tensors[name].detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return np.asarray(tensor.numpy())

    def record(self, sha256: str) -> SourceRecord:
        """The digest of all tensors names the model."""
        return SourceRecord(kind="live", sha256=sha256)


def tensor_digest(array: Array) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    contiguous = np.asarray(array, order="C")
    return hashlib.sha256(contiguous.reshape(-1).view(np.uint8)).hexdigest()


def refuse_unknown(model: Flamingo) -> None:
    """Raises UnsupportedModel unless `model` is the standard Flamingo, module by module.

    A graph is built from the config, so anything that changes what a module computes without changing the config must be refused:
    subclasses, forwards set on an instance, hooks (also global ones), parametrizations, tensors that are missing or too many.
    """
    import torch
    from torch.nn.modules import module as torch_module

    from flamingo_reference.model import Flamingo

    faults: list[str] = []
    if type(model) is not Flamingo:
        raise UnsupportedModel(
            f"the model is a {type(model).__module__}.{type(model).__qualname__}, expected flamingo_reference.model.Flamingo itself. "
            "Copy its weights into one: Flamingo(config).load_state_dict(...)"
        )
    with torch.device("meta"):
        standard = Flamingo(model.config)
    expected = dict(standard.named_modules())
    found = dict(model.named_modules())
    faults += [f"module {name} is missing" for name in expected if name not in found]
    for name, module in found.items():
        label = name or "the model"
        if name not in expected:
            faults.append(f"module {name} ({type(module).__name__}) is not known")
            continue
        if type(module) is not type(expected[name]):
            faults.append(f"{label} is a {type(module).__qualname__}, expected {type(expected[name]).__qualname__}")
        faults += [f"{label} has its own {key}" for key in vars(module) if callable(getattr(type(module), key, None))]
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if getattr(module, hooks):
                faults.append(f"{label} has {hooks.strip('_').replace('_', ' ')}")
        faults += _changed_settings(label, module, expected[name])
    for hooks in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"):
        if getattr(torch_module, hooks):
            faults.append(f"torch has {hooks.strip('_').replace('_', ' ')}")
    tensors, wanted = model.state_dict(), native.expected_tensors(model.config)
    faults += [f"tensor {name} is missing" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            faults.append(f"tensor {name} is not known")
        elif tuple(tensor.shape) != wanted[name]:
            faults.append(f"tensor {name} has shape {tuple(tensor.shape)}, expected {wanted[name]}")
        elif tensor.is_meta:
            faults.append(f"tensor {name} is on the meta device and has no numbers")
    faults += [f"buffer {name} is not known" for name, _ in model.named_buffers()]
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise UnsupportedModel(
            f"the model is not the standard Flamingo: {shown}. Undo these changes, or bake them into the weights."
        )


def _changed_settings(label: str, module: Any, standard: Any) -> list[str]:
    """Plain attributes (eps, strides, sizes) that differ from those the config gives."""
    plain = (int, float, str, bool, tuple, msgspec.Struct)
    skipped = {"training"}
    return [
        f"{label}.{key} is {getattr(module, key, None)!r}, the config gives {value!r}"
        for key, value in vars(standard).items()
        if isinstance(value, plain) and key not in skipped and getattr(module, key, None) != value
    ]
