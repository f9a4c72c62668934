"""The paper's ablations (Flamingo, arXiv 2204.14198, table 3 and appendix) that are not choices here: what a config calls them, and why they are
refused.

Choices are cross-attention before every k-th layer (`cross_attention.every`, `offset`) and no tanh gate (`cross_attention.gate`): people hold
checkpoints of these. No torch import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

REFUSED: Mapping[tuple[str, str], Mapping[str, str]] = MappingProxyType(
    {
        ("cross_attention", "attends"): {
            "all": "attention to all previous images: a token's media are the one before it, so that a step reads the keys of one medium "
            "and a bank row is shared by requests; the paper lost 7.2 points with it, and no checkpoint of it is known",
        },
        ("resampler", "kind"): {
            "transformer": "a Transformer in the resampler's place: media would have as many keys as frames have positions, not a "
            "fixed number of latents, which is what sizes the media bank",
            "mlp": "an MLP in the resampler's place: media would have as many keys as frames have positions, not a fixed number of latents, "
            "which is what sizes the media bank",
        },
        ("cross_attention", "kind"): {
            "vanilla": "vanilla cross-attention: it stands inside of the language model's own layers, whose weights are then trained, so the "
            "frozen language model is another one",
            "grafting": "grafting: cross-attention and self-attention layers trained in turn on top of the frozen ones; the decoder's layers "
            "would be of two kinds, and no checkpoint of it is known",
        },
    }
)
"""Part and field of a config, and what each refused value stands for."""


def refused(raw: Any) -> Iterator[str]:
    """What a config.json of ours, as decoded, asks for and is refused, each with its reason."""
    if not isinstance(raw, Mapping):
        return
    for (part, field), values in REFUSED.items():
        inner = raw.get(part)
        value = inner.get(field) if isinstance(inner, Mapping) else None
        if isinstance(value, str) and value.lower() in values:
            yield f"{part}.{field} is {value!r}, which is not supported: {values[value.lower()]}"
