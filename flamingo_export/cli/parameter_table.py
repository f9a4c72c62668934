"""Parameters of a model by component, beside what the paper says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from flamingo_reference.config import ModelConfig


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a component (or `total`), and the count the paper quotes, where it quotes one."""

    name: str
    parameters: int
    quoted: float | None


def components(config: ModelConfig) -> list[Component]:
    """Parameters per component, computed from the shapes, and their total."""
    from flamingo_reference.config import QUOTED_PARAMETERS, SIZES
    from flamingo_reference.names import parameter_counts

    counts = parameter_counts(config)
    counts["total"] = sum(counts.values())
    quoted = QUOTED_PARAMETERS.get(config.name, {}) if SIZES.get(config.name) == config else {}
    return [Component(name=name, parameters=count, quoted=quoted.get(name)) for name, count in counts.items()]
