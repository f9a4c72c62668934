"""LoRA adapters in PEFT's file format, merged into the weights while these are read: W + scale * B A.

Hu et al. 2021 (arXiv 2106.09685); scale is alpha / r, with rank stabilisation alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
What changes more than W is refused: DoRA, trained biases, replicated layers and the like.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flamingo_reference.arrays import Array, Shape
from flamingo_reference.checkpoints.accounting import NearestName
from flamingo_reference.checkpoints.files.folder import open_tensors
from flamingo_reference.checkpoints.files.json_file import read_json
from flamingo_reference.checkpoints.files.tensors import (
    FLOATS,
    CheckpointError,
    FileReader,
    TensorReader,
    refuse_emptied,
)

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""What PEFT puts before every name."""
# The base's tensor `NAME.weight` is changed by NAME + one of these pairs.
_PARTS = {
    ".lora_A.weight": ("down", False),
    ".lora_B.weight": ("up", False),
    ".lora_embedding_A": ("down", True),
    ".lora_embedding_B": ("up", True),
}
# What PEFT wraps a module in while it trains: its own tensors within an embedding with LoRA, a copy that is trained whole.
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.")
# Settings that change what is computed in a way that is not W + scale * B A; the values that leave it as it is.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
}
_KEPT_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights with which training begins at the base's own weights."""


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the merge needs of adapter_config.json; other keys describe training. fan_in_fan_out is not needed: PEFT sets it to false for
    torch's linear layers, and the matrices of every family are theirs."""

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    ensure_weight_tying: bool | None = False
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
    """A checkpoint's tensors with an adapter merged in. What the adapter updates is computed in fp32 and given as fp32."""

    def __init__(
        self,
        base: TensorReader,
        adapter: Path,
        plain_name: Callable[[str], str] = str,
        *,
        vocabulary: Collection[str] = (),
        second_names: Collection[str] = (),
    ) -> None:
        """
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        plain_name: what a tensor is called without what depends on the model that it was trained or saved in. The adapter's names and the
        base's are compared by it.
        vocabulary: the base's names of embedding and output, of which PEFT saves whole copies beside the updates.
        second_names: the base's names that are not in use; the adapter's never stand for them.

        Raises CheckpointError naming settings that cannot be merged, and all tensors of the adapter that have no counterpart in the base, lack
        their other half or are misshapen.
        """
        self._base, self._config = base, adapter / CONFIG
        _name_those_within(adapter)
        settings = _adapter_settings(self._config)
        self._adapter: FileReader = open_tensors(adapter, WEIGHTS).plainly_named()
        refuse_emptied(self._adapter, adapter)
        plan = _Plan(settings, self._adapter, base, plain_name, vocabulary, second_names)
        self._updates, self._replaced = plan.merged(adapter)
        self.notes = tuple(f"{self._config}: {note}" for note in plan.unmatched())
        """What a user should know of the adapter."""
        self.keeps_tied = bool(settings.ensure_weight_tying)
        """Whether an embedding and an output that are one matrix were trained as one."""

    @property
    def files(self) -> list[Path]:
        """The adapter's files: all that merging depends on."""
        return [self._config, *self._adapter.files]

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the adapter changes."""
        return list(dict.fromkeys([*self._updates, *self._replaced]))

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

    def read(self, name: str) -> Array:
        """A tensor, merged where the adapter changes it."""
        weight = self._adapter.read(self._replaced[name]) if name in self._replaced else self._base.read(name)
        update = self._updates.get(name)
        if update is None:
            return weight
        down, up = (self._adapter.read(part).astype(np.float32) for part in (update.down, update.up))
        with np.errstate(over="ignore", invalid="ignore"):  # the build finds what is not finite, and names it
            delta: Array = up @ down
            delta *= np.float32(update.scale)
            merged: Array = delta.T if update.transposed else delta
            merged += weight  # in place: a large matrix is not held a third time
        return merged


def _name_those_within(adapter: Path) -> None:
    """Raises CheckpointError for a folder without an adapter that has folders of adapters: PEFT saves one that has a name in such."""
    if adapter.is_dir() and not (adapter / CONFIG).is_file():
        within = sorted(path.parent for path in adapter.glob(f"*/{CONFIG}"))[:20]
        if within:
            raise CheckpointError(
                f"{adapter} has no {CONFIG}, but {', '.join(map(str, within))} {'has' if len(within) == 1 else 'have'} one. Name the "
                "adapter that is meant."
            )


def _adapter_settings(path: Path) -> _Settings:
    raw = read_json(path)
    faults = [f"{key} is {raw[key]!r}" for key, plain in _REFUSED.items() if key in raw and raw[key] not in plain]
    if faults:
        raise CheckpointError(
            f"{path}: {'; '.join(faults)}: this is not only a low-rank update of weights. Merge it with PEFT (merge_and_unload) and build from "
            "the result."
        )
    start = raw.get("init_lora_weights")
    if isinstance(start, list | dict) or start not in _KEPT_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r:.80}. Such an adapter changed the base's weights before it was trained, so its update "
            "belongs to weights that the base's files do not hold. Convert it with PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion), which writes init_lora_weights true, or merge it with PEFT and build from the result."
        )
    try:
        settings = msgspec.convert(raw, _Settings)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is not a LoRA configuration: {error}.") from error
    if settings.peft_type.upper() != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {settings.peft_type!r}, expected 'LORA'. Merge it with PEFT and build from the result."
        )
    for name, rank in {"r": settings.r, **(settings.rank_pattern or {})}.items():
        if rank < 1:
            raise CheckpointError(f"{path}: the rank {name} is {rank}, expected at least 1.")
    return settings


class _Plan:
    """What an adapter's tensors do to those of the base."""

    def __init__(
        self,
        settings: _Settings,
        adapter: FileReader,
        base: TensorReader,
        plain_name: Callable[[str], str],
        vocabulary: Collection[str],
        second_names: Collection[str],
    ) -> None:
        self._settings, self._adapter, self._vocabulary = settings, adapter, vocabulary
        self._shapes = {name: base.shape(name) for name in base.names() if name not in second_names}
        self._nearest = NearestName(self._shapes)
        self._plain_name = plain_name
        self._by_plain_name: dict[str, list[str]] = {}
        for name in self._shapes:
            self._by_plain_name.setdefault(plain_name(name), []).append(name)
        self._matched: set[str] = set()

    def merged(self, folder: Path) -> tuple[dict[str, _Update], dict[str, str]]:
        """Updates by the base's tensor, and the adapter's tensors that replace one of the base whole. Raises CheckpointError."""
        halves: dict[str, dict[str, str]] = {}
        modules: dict[str, str] = {}
        replaced: dict[str, str] = {}
        faults: list[str] = []
        for name in self._adapter.names():
            own = name.removeprefix(PREFIX)
            if self._adapter.dtype(name) not in FLOATS:
                faults.append(f"{name} has element type {self._adapter.dtype(name)}, expected a float")
            suffix = next((suffix for suffix in _PARTS if own.endswith(suffix)), None)
            if suffix is None:
                fault = self._replace(name, own, replaced)
            else:
                module = own.removesuffix(suffix)
                target = self._of_base(f"{module}.weight")
                halves.setdefault(target, {})[_PARTS[suffix][0]] = name
                modules[target] = module
                fault = self._missing(name, target)
            faults += [fault] if fault else []
        updates: dict[str, _Update] = {}
        for target, parts in halves.items():
            if target in self._shapes:
                update = self._update(target, modules[target], parts)
                if isinstance(update, str):
                    faults.append(update)
                else:
                    updates[target] = update
        if not self._adapter.names():
            faults.append("it holds no tensors")
        if faults:
            raise CheckpointError(
                f"{folder} does not fit the checkpoint: {'; '.join(faults)}. Give the base it was trained on."
            )
        return updates, replaced

    def unmatched(self) -> list[str]:
        """Patterns that match no module that the adapter changes: PEFT passes over them, and so did training."""
        settings = self._settings
        patterns = {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}
        return [
            f"{kind} {pattern!r} matches no module that the adapter changes"
            for kind, named in patterns.items()
            for pattern in named or {}
            if f"{kind}.{pattern}" not in self._matched
        ]

    def _of_base(self, name: str) -> str:
        """The base's name of a tensor. Of several that are plainly called so, the first part's is in use: it was trained further."""
        return self._by_plain_name.get(self._plain_name(name), [name])[0]

    def _missing(self, name: str, target: str) -> str | None:
        if target in self._shapes:
            return None
        near = self._nearest.find(target)
        return f"{name} changes {target}, which the base does not have" + (f" (nearest: {near})" if near else "")

    def _replace(self, name: str, own: str, replaced: dict[str, str]) -> str | None:
        """Takes a tensor that is not a LoRA matrix in place of the base's. Returns what is wrong with it."""
        plain = _WRAPPED.sub(".", own)
        target = self._of_base(plain)
        whole = plain != own or target in self._vocabulary or _saved_whole(plain, self._settings)
        if not whole:
            return f"{name} is neither a LoRA matrix (lora_A, lora_B) nor in modules_to_save"
        shape = self._adapter.shape(name)
        if self._shapes.get(target) != shape:
            found = f"has shape {self._shapes[target]}" if target in self._shapes else "does not have it"
            return f"{name} {shape} replaces {plain}, and the base {found}"
        if target in replaced:
            return f"{name} and {replaced[target]} both replace {target}"
        replaced[target] = name
        return None

    def _update(self, target: str, module: str, parts: Mapping[str, str]) -> _Update | str:
        """The update of a tensor, or what is wrong with it. module: as it is called in the model that was trained."""
        if len(parts) < 2:
            (found,) = parts.values()
            return f"{found} has no other half"
        settings, shape = self._settings, self._shapes[target]
        rank = int(self._by_pattern("rank_pattern", settings.rank_pattern, module, settings.r))
        transposed = parts["up"].endswith(".lora_embedding_B")
        rows, columns = (shape[::-1] if transposed else shape) if len(shape) == 2 else (0, 0)
        up, down = self._adapter.shape(parts["up"]), self._adapter.shape(parts["down"])
        if (up, down) != ((rows, rank), (rank, columns)):
            wanted = f"{(rows, rank)} and {(rank, columns)}" if len(shape) == 2 else "an update of a matrix"
            return f"{parts['up']} {up} and {parts['down']} {down} for {target} {shape}, expected {wanted}"
        alpha = self._by_pattern("alpha_pattern", settings.alpha_pattern, module, settings.lora_alpha)
        scale = alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
        return _Update(parts["down"], parts["up"], scale, transposed)

    def _by_pattern(self, kind: str, patterns: Mapping[str, float] | None, module: str, default: float) -> float:
        """The value of the first pattern that matches the module's name or the end of it after a dot, as PEFT reads them.

        Patterns are regular expressions in PEFT. Here they are taken by their text where it is plain, so that an adapter cannot bring an
        expression that takes forever.
        """
        for pattern, value in (patterns or {}).items():
            plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if re.search(r"[^\w.]", plain):
                raise CheckpointError(f"{CONFIG}: the pattern {pattern!r} is a regular expression; expected names of modules.")
            if module == plain or (module.endswith(f".{plain}") and not pattern.startswith("^")):
                self._matched.add(f"{kind}.{pattern}")
                return value
        return default


def _saved_whole(name: str, settings: _Settings) -> bool:
    """Whether a tensor belongs to one of modules_to_save, or to a module within one: PEFT trains these whole and saves them beside the
    updates. It takes a module whose name ends with what is listed."""
    parts = name.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    return any(module.endswith(saved) for module in modules for saved in settings.modules_to_save or ())
