"""The card that engines are for, and the limits that its memory leaves: cache slots and requests side by side."""

from __future__ import annotations

import re

import msgspec

from flamingo_export.backends.placement import Cuts, place
from flamingo_export.bundle.manifest import BRANCH_MEDIA, BRANCHES, ShapeLimits, default_limits
from flamingo_export.errors import BuildError
from flamingo_export.estimates import ENGINE_RATIO
from flamingo_export.precision import Precision
from flamingo_export.weights import WeightIndex
from flamingo_reference.config import ModelConfig

CARDS = {
    "L4": 24e9,
    "RTX 4090": 24e9,
    "L40S": 48e9,
    "A100": 80e9,
    "H100": 80e9,
    "Jetson AGX Thor": 128e9,
    "H200": 141e9,
    "B200": 180e9,
}
"""Bytes of memory, by the vendor's data sheets. Thor shares its own with the host."""
USABLE = 0.92
"""What of a card's memory is left to engines, their caches and bank, and intermediate results: the rest is CUDA's."""
MOST_ROWS = 64
"""Requests side by side that engines are built for unless more are asked for."""
_LEAST_LENGTH = 512
_CHUNK = 256
"""Positions of a prefill call where a length is given; smaller caches take an eighth of their length."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """So many GPUs of a kind, each of `memory` bytes."""

    name: str
    memory: int
    count: int = 1

    @property
    def room(self) -> list[int]:
        """Bytes for engines, caches and bank of each."""
        return [int(USABLE * self.memory)] * self.count


def read_card(text: str) -> Card:
    """`H200`, `rtx4090`, `48GB`, or several: `2xH100`. Raises BuildError."""
    found = re.fullmatch(r"(?:([1-9][0-9]?) *x *)?(.+)", text.strip(), re.ASCII | re.IGNORECASE)
    if found is not None:
        count, name = int(found[1] or 1), found[2]
        size = re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]+)?) *GB", name, re.ASCII | re.IGNORECASE)
        if size is not None and float(size[1]) > 0:
            return Card(name=f"a card of {size[1]} GB", memory=int(float(size[1]) * 1e9), count=count)
        for known, memory in CARDS.items():
            if _plain(name) in (_plain(known), _plain(known).removeprefix("rtx"), _plain(known).removeprefix("jetsonagx")):
                return Card(name=known, memory=int(memory), count=count)
    raise BuildError(f"{text[:40]!r} is not a card. Name one of {', '.join(CARDS)}, or its memory: 48GB; several as 2xH100.")


def limits_of_length(length: int) -> ShapeLimits:
    """Those of a cache of so many slots."""
    eighth = max(1, length // 8)
    return ShapeLimits(max_length=length, chunk=min(_CHUNK, eighth), branches=min(BRANCHES, eighth), branch_media=BRANCH_MEDIA)


def chosen_limits(
    config: ModelConfig,
    precision: Precision,
    *,
    length: int | None,
    batch: int | None,
    parts: int,
    card: Card | None,
) -> tuple[ShapeLimits, str | None]:
    """Limits, and what a user should know about them.

    length, batch: those that were asked for. What was not follows from the card, where engines are built for one that is known: the model's own
    length, halved until a request fits, and as many requests as fit beside, 64 at most.
    """
    limits = limits_of_length(length) if length is not None else default_limits(config)
    if batch is not None:
        limits = msgspec.structs.replace(limits, batch=batch)
    if card is None or (length is not None and batch is not None):
        return limits, None
    where = card.name if card.count == 1 else f"{card.count} x {card.name}"
    tried = limits
    while True:
        needed = cuts(config, precision, tried).in_parts(parts)
        found = place(needed, card.room, batch or MOST_ROWS)
        if found is not None and found.rows >= (batch or 1):
            rows = batch or 1 << (found.rows.bit_length() - 1)
            asked = f"{rows} requests" if rows > 1 else "1 request"
            said = (
                f"engines take {asked} of {tried.max_length} cache slots, as {where} ({card.memory / 1e9:.0f} GB) holds: "
                "--max-batch and --max-length choose otherwise"
            )
            return msgspec.structs.replace(tried, batch=rows), said
        if length is not None or tried.max_length // 2 < _LEAST_LENGTH:
            return limits, f"engines of this model do not fit on {where}: --plan says how many cards and parts it takes"
        half = tried.max_length // 2
        tried = msgspec.structs.replace(tried, max_length=half, chunk=min(tried.chunk, max(1, half // 8)))


def cuts(config: ModelConfig, precision: Precision, limits: ShapeLimits) -> Cuts:
    """What engines of a bundle that is yet to be built would keep on GPUs."""
    return Cuts(config, precision, limits, WeightIndex.planned(config, precision).sizes(), ratio=ENGINE_RATIO, planned=True)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
