"""LoRA adapters in PEFT's file format, merged into the weights while these are read: W + scale * B A.

Hu et al. 2021 (arXiv 2106.09685); scale is alpha / r, with rank stabilisation alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
What changes more than W is refused: DoRA, trained biases, replicated layers and the like.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flamingo_reference.checkpoints.accounting import NearestName
from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.tensors import FLOATS, AnyArray, CheckpointError, FileReader, Shape, TensorReader

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# The base's tensor `NAME.weight` is changed by NAME + one of these pairs.
_PARTS = {
    ".lora_A.weight": ("down", False),
    ".lora_B.weight": ("up", False),
    ".lora_embedding_A": ("down", True),
    ".lora_embedding_B": ("up", True),
}
# Settings that change what is computed in a way that is no W + scale * B A; the values that leave it alone.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "megatron_config": (None,),
}


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the merge needs of adapter_config.json; other keys describe training."""

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None


class _Update(msgspec.Struct, frozen=True):
    """down [r, in] and up [out, r] by their names in the adapter's file; transposed: the delta is added as [in, out]."""

    down: str
    up: str
    scale: float
    transposed: bool


class LoraReader:
    """A checkpoint's tensors with an adapter merged in. What the adapter changes is computed in fp32 and given as fp32."""

    def __init__(self, base: TensorReader, adapter: Path, plain_name: Callable[[str], str] = str) -> None:
        """adapter: folder with adapter_config.json and adapter_model.safetensors. plain_name: what a tensor is called without what depends on
        the model that it was trained or saved in: the adapter's names and the base's are compared by it.

        Raises CheckpointError naming settings that cannot be merged, and all tensors of the adapter that have no counterpart in the base, lack
        their other half or are misshapen.
        """
        self._base, self._config = base, adapter / CONFIG
        settings = _settings(self._config)
        self._adapter: FileReader = open_tensors(adapter, WEIGHTS)
        self._updates, self._replaced = _plan(settings, self._adapter, base, adapter, plain_name)

    @property
    def files(self) -> list[Path]:
        """The adapter's files: all that merging depends on."""
        return [self._config, *self._adapter.files]

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the adapter changes."""
        return [*self._updates, *self._replaced]

    def names(self) -> list[str]:
        """All tensor names: the base's."""
        return self._base.names()

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of a tensor."""
        if name in self._updates:
            return np.dtype(np.float32)
        return self._adapter.dtype(self._replaced[name]) if name in self._replaced else self._base.dtype(name)

    def read(self, name: str) -> AnyArray:
        """A tensor, merged where the adapter changes it."""
        if name in self._replaced:
            return self._adapter.read(self._replaced[name])
        weight = self._base.read(name)
        update = self._updates.get(name)
        if update is None:
            return weight
        down, up = (self._adapter.read(part).astype(np.float32) for part in (update.down, update.up))
        delta: AnyArray = up @ down
        delta *= np.float32(update.scale)
        merged: AnyArray = delta.T if update.transposed else delta
        merged += weight  # in place: a large matrix is not held a third time
        return merged


def _settings(path: Path) -> _Settings:
    raw = read_json(path)
    faults = [f"{key} is {raw[key]!r}" for key, plain in _REFUSED.items() if key in raw and raw[key] not in plain]
    if faults:
        raise CheckpointError(
            f"{path}: {'; '.join(faults)}: this is no low-rank update of weights alone. Merge it with PEFT (merge_and_unload) and build from "
            "the result."
        )
    try:
        settings = msgspec.convert(raw, _Settings)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is no LoRA configuration: {error}.") from error
    if settings.peft_type.upper() != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {settings.peft_type!r}, expected 'LORA'. Merge it with PEFT and build from the result."
        )
    for name, rank in {"r": settings.r, **(settings.rank_pattern or {})}.items():
        if rank < 1:
            raise CheckpointError(f"{path}: the rank {name} is {rank}, expected at least 1.")
    return settings


def _plan(
    settings: _Settings, adapter: FileReader, base: TensorReader, folder: Path, plain_name: Callable[[str], str]
) -> tuple[dict[str, _Update], dict[str, str]]:
    """Updates by the base's tensor, and the adapter's tensors that replace one of the base whole."""
    shapes = {name: base.shape(name) for name in base.names()}
    nearest = NearestName(shapes)
    by_plain_name: dict[str, list[str]] = {}
    for name in shapes:
        by_plain_name.setdefault(plain_name(name), []).append(name)

    def of_base(name: str) -> str:
        """The base's name of a tensor. Of several that are plainly called so, the first part's is in use: it was trained further."""
        return by_plain_name.get(plain_name(name), [name])[0]

    halves: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    replaced: dict[str, str] = {}
    faults: list[str] = []
    for name in adapter.names():
        module = name.removeprefix(_PREFIX)
        if adapter.dtype(name) not in FLOATS:
            faults.append(f"{name} has element type {adapter.dtype(name)}, expected a float")
        suffix = next((suffix for suffix in _PARTS if module.endswith(suffix)), None)
        if suffix is not None:
            target = of_base(f"{module.removesuffix(suffix)}.weight")
            half, embedding = _PARTS[suffix]
            halves.setdefault(target, {})[half] = name
            embeddings |= {target} if embedding else set()
        elif _saved_whole(module, settings) and shapes.get(of_base(module)) == adapter.shape(name):
            replaced[of_base(module)] = name
            continue
        else:
            if _saved_whole(module, settings):
                found = f"has shape {shapes[of_base(module)]}" if of_base(module) in shapes else "does not have it"
                faults.append(f"{name} {adapter.shape(name)} replaces {module}, and the base {found}")
            else:
                faults.append(f"{name} is no half of an update (lora_A, lora_B) and not in modules_to_save")
            continue
        if target not in shapes:
            near = nearest.find(target)
            faults.append(f"{name} changes {target}, which the base does not have" + (f" (nearest: {near})" if near else ""))
    updates: dict[str, _Update] = {}
    for target, parts in halves.items():
        if target in shapes:
            update = _update(target, parts, settings, adapter, shapes[target], embedding=target in embeddings)
            if isinstance(update, str):
                faults.append(update)
            else:
                updates[target] = update
    if not adapter.names():
        faults.append("it holds no tensors")
    if faults:
        raise CheckpointError(f"{folder} does not fit the checkpoint: {'; '.join(faults)}. Give the base it was trained on.")
    return updates, replaced


def _update(
    target: str, parts: Mapping[str, str], settings: _Settings, adapter: FileReader, shape: Shape, *, embedding: bool
) -> _Update | str:
    """The update of a tensor, or what is wrong with it."""
    if len(parts) < 2:
        (found,) = parts.values()
        return f"{found} has no other half"
    module = target.removesuffix(".weight")
    rank = int(_by_pattern(settings.rank_pattern, module, settings.r))
    transposed = settings.fan_in_fan_out or embedding
    rows, columns = (shape[::-1] if transposed else shape) if len(shape) == 2 else (0, 0)
    up, down = adapter.shape(parts["up"]), adapter.shape(parts["down"])
    if (up, down) != ((rows, rank), (rank, columns)):
        wanted = f"{(rows, rank)} and {(rank, columns)}" if len(shape) == 2 else "an update of a matrix"
        return f"{parts['up']} {up} and {parts['down']} {down} for {target} {shape}, expected {wanted}"
    alpha = _by_pattern(settings.alpha_pattern, module, settings.lora_alpha)
    scale = alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
    return _Update(parts["down"], parts["up"], scale, transposed)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name or the end of it after a dot, as PEFT reads them.

    Patterns are regular expressions in PEFT; here they are taken by their text where it is plain, so that an adapter cannot bring an expression
    that takes forever.
    """
    for pattern, value in (patterns or {}).items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if re.search(r"[^\w.]", plain):
            raise CheckpointError(f"{CONFIG}: the pattern {pattern!r} is a regular expression; expected names of modules.")
        if module == plain or (module.endswith(f".{plain}") and not pattern.startswith("^")):
            return value
    return default


def _saved_whole(name: str, settings: _Settings) -> bool:
    """Whether a tensor belongs to one of modules_to_save, which PEFT trains whole and saves beside the updates."""
    module = name.rsplit(".", 1)[0]
    return any(module == saved or module.endswith(f".{saved}") for saved in settings.modules_to_save or ())
