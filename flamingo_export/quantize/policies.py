"""Policies by name, and from a user's file: TOML, rules of its own after those of the preset that it extends.

extends = "int4"
name = "int4, first layer in 8 bits"

[[rules]]
weights = "decoder/layer.0/*"
format = "int8"
block = 128
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from flamingo_export.errors import BuildError
from flamingo_export.precision import SMALLEST_BLOCK, Policy, Rule
from flamingo_export.specs import towers_of
from flamingo_reference.config import ModelConfig

POLICIES = ("fp8", "int8", "int4")
_LARGEST_BLOCK = 1024


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str | None = None
    extends: str | None = None
    rules: tuple[Rule, ...] = ()
    attention: Literal["storage", "fp8"] | None = None
    media: Literal["storage", "fp8"] | None = None


def preset(name: str) -> Policy:
    """One of POLICIES. Raises BuildError for another name."""
    if name not in POLICIES:
        raise BuildError(
            f"{name!r} is not a policy; there are {', '.join(POLICIES)}, or a file of your own (docs/precision.md)"
        )
    return msgspec.toml.decode(preset_text(name), type=Policy)


_IN_BLOCKS = tuple(
    Rule(weights=f"{tower}/*", format="int8", block=128, reason=f"{why}; 4 bits would save nothing that is felt")
    for tower, why in (("text_tower", "products of the usual kind, once a text"), ("image_tower", "one product, once an image"))
)
_IN_FP8 = tuple(
    Rule(weights=f"{tower}/*", format="fp8", reason=why)
    for tower, why in (("text_tower", "products of the usual kind, once a text"), ("image_tower", "one product, once an image"))
)


def for_model(policy: Policy, config: ModelConfig) -> Policy:
    """The policy as a model gets it: the presets hold for the towers of a contrastive encoder as well, where there are any. A policy of a user's
    own says itself what it quantises."""
    if config.contrastive is None or policy.name not in POLICIES or policy != preset(policy.name):
        return policy
    towers = _IN_FP8 if policy.name == "fp8" else _IN_BLOCKS
    return msgspec.structs.replace(policy, rules=(*policy.rules, *(rule for rule in towers if _is_for(rule, config))))


def _is_for(rule: Rule, config: ModelConfig) -> bool:
    """Whether the model has the tower that a rule is for."""
    return rule.weights.split("/")[0] in towers_of(config)


def preset_text(name: str) -> str:
    """The file of a preset, with the reasons of its rules: what a user copies to change it."""
    return files(__package__).joinpath("presets", f"{name}.toml").read_text("utf-8")


def read_policy(path: Path) -> Policy:
    """A user's policy. Raises BuildError if the file cannot be read or says what no policy can."""
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise BuildError(f"the policy {path} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # the last two: numbers too long, tables too deep
        raise BuildError(f"{path} is not a policy: {error}. See docs/precision.md, or start from a preset.") from error
    base = preset(found.extends) if found.extends is not None else Policy(name=path.stem)
    policy = Policy(
        name=found.name or path.stem,
        rules=(*base.rules, *found.rules),
        attention=found.attention or base.attention,
        media=found.media or base.media,
    )
    if policy == Policy(name=policy.name):
        raise BuildError(
            f'{path} quantises nothing: it has no rules and extends no preset. Add extends = "fp8", or rules of its own (docs/precision.md).'
        )
    faults = [
        f"rule {rule.weights!r} has block {rule.block}, expected a power of two from {SMALLEST_BLOCK} to {_LARGEST_BLOCK}"
        for rule in found.rules
        if rule.format in ("int8", "int4") and not _is_block(rule.block)
    ]
    faults += [f"rule {rule.weights!r} has a block, which {rule.format} has not" for rule in found.rules if _idle_block(rule)]
    if faults:
        raise BuildError(f"{path}: {'; '.join(faults)}")
    return policy


def policy_text(
    policy: Policy,
    added: Sequence[Rule] = (),
    *,
    attention: Literal["storage", "fp8"] | None = None,
    media: Literal["storage", "fp8"] | None = None,
) -> str:
    """A file that `read_policy` reads as this policy with rules added after its own, and attention and media as said if they are.

    Extends the preset where the policy is one, else spells all out.
    """
    lines: list[str] = []
    rules = list(added)
    if policy.name in POLICIES and policy == preset(policy.name):
        lines.append(f"extends = {_quoted(policy.name)}")
    else:
        rules = [*policy.rules, *added]
        attention, media = attention or policy.attention, media or policy.media
    lines += [f"{key} = {_quoted(value)}" for key, value in (("attention", attention), ("media", media)) if value is not None]
    for rule in rules:
        lines += ["", "[[rules]]", f"weights = {_quoted(rule.weights)}", f"format = {_quoted(rule.format)}"]
        lines += [f"block = {rule.block}"] if rule.block else []
        lines += [f"reason = {_quoted(rule.reason)}"] if rule.reason else []
    return "\n".join(lines) + "\n"


def check_policy(policy: Policy, matrices: Sequence[str]) -> None:
    """Raises BuildError naming every rule that matches none of a model's matrices. Those of presets may: not every model has all parts."""
    known = {*_IN_BLOCKS, *_IN_FP8, *(rule for name in POLICIES for rule in preset(name).rules)}
    idle = [rule for rule in policy.unmatched(matrices) if rule not in known]
    if idle:
        import difflib

        shown = []
        for rule in idle:
            near = difflib.get_close_matches(rule.weights, matrices, n=2, cutoff=0.0)
            shown.append(f"{rule.weights!r} (there are {', '.join(near)})")
        raise BuildError(f"rules of policy {policy.name!r} match no matrix of this model: {'; '.join(shown)}")


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes are among TOML's."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


def _is_block(block: int) -> bool:
    return SMALLEST_BLOCK <= block <= _LARGEST_BLOCK and block & (block - 1) == 0


def _idle_block(rule: Rule) -> bool:
    return rule.block != 0 and rule.format not in ("int8", "int4")
