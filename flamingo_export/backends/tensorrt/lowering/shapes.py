"""Sizes that an engine is built for: one table of bounds a profile, in which a dimension has the same bounds wherever its name stands.

A profile is a use of the engine that TensorRT tunes for by itself. The names are those of `specs`: B requests, S positions, M media,
K logits, N media rows, F and T frames; of a text tower B texts of S tokens. C, the cache's capacity, is not a symbol: in-place cache updates
want it fixed.
"""

from __future__ import annotations

import msgspec

from flamingo_export.bundle.manifest import ShapeLimits
from flamingo_export.errors import BuildError
from flamingo_export.specs import TEXT_TOWER, SubgraphSpec, TensorSpec

CAPACITY = "C"
DECODE = "decode"
"""Profiles of decoding steps begin with it: `decode.8` is for up to 8 rows."""
SHARED = "shared"
"""`decode.shared` is for rows that several requests share."""
_TILES_OF_AN_IMAGE = 4
"""That kernels are chosen for, where positions see ranges of media."""


TEXTS = 64
"""Texts that a text tower takes at once."""


class Bounds(msgspec.Struct, frozen=True):
    """Smallest, most frequent and largest size of a dimension."""

    least: int
    usual: int
    most: int


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One use of an engine, and the bounds of every symbol in it."""

    name: str
    bounds: dict[str, Bounds]


def profiles(spec: SubgraphSpec, limits: ShapeLimits) -> tuple[Profile, ...]:
    """The uses of a subgraph, the first of them the one with the longest calls. Raises BuildError if the limits contradict each other."""
    check_limits(limits)
    rows, frames = limits.bank_rows, limits.frames
    if spec.aliases:  # the decoder, or a part of it
        batch, bank = Bounds(1, 1, limits.batch), Bounds(1, rows, rows)
        chunk, beams = limits.chunk, min(3, limits.beams)
        ranges = any(tensor.name == "first_media" for tensor in spec.inputs)
        tiles = min(limits.max_tiles, rows) if ranges else 1
        usual = min(_TILES_OF_AN_IMAGE, tiles)
        media = max(min(limits.chunk_media, chunk, rows), tiles)
        # A step's kernels are chosen for one number of rows: those of one request serve 64 badly, and the reverse.
        steps = {"S": Bounds(1, beams, limits.beams), "M": Bounds(1, usual, tiles), "K": Bounds(1, beams, limits.beams)}
        uses = {
            # K begins at 1: TensorRT for RTX 1.7 compiles a profile from 0 on, but that it runs an empty product was never seen.
            "prefill": {"B": batch, "S": Bounds(1, chunk, chunk), "M": Bounds(1, usual, media), "K": Bounds(1, 1, chunk)},
            # At least two rows: TensorRT for RTX 1.7 does not compile some attentions (grouped heads, a part of a head turned) in a profile
            # in which the batch can only be one, beside others in which it varies.
            **_shared(limits, batch, tiles),
            **{
                f"{DECODE}.{rows}": {"B": Bounds(1, rows, min(limits.batch, max(rows, 2))), **steps}
                for rows in reversed(decode_batches(limits.batch))
            },
        }
        uses = {name: {"N": bank, **bounds} for name, bounds in uses.items()}
    elif spec.name == "resampler":
        uses = {
            "videos": {
                "N": Bounds(1, 1, max(1, frames // 2)),
                "T": Bounds(1, min(8, limits.video_frames), limits.video_frames),
            },
            "images": {"N": Bounds(1, 1, frames), "T": Bounds(1, 1, 1)},
        }
    elif spec.name == TEXT_TOWER:
        longest = spec.longest["S"]
        # Most texts are captions or labels, far from the longest.
        uses = {"texts": {"B": Bounds(1, 1, TEXTS), "S": Bounds(1, min(16, longest), longest)}}
    else:
        symbol = "N" if spec.name == "media_kv" else "F"
        uses = {"encode": {symbol: Bounds(1, 1, frames)}}
    wanted = symbols(spec)
    return tuple(
        Profile(name=name, bounds={symbol: bounds[symbol] for symbol in sorted(wanted)}) for name, bounds in uses.items()
    )


def _shared(limits: ShapeLimits, batch: Bounds, tiles: int) -> dict[str, dict[str, Bounds]]:
    """The profile of steps in which several requests share a row, where there is one; it comes before those of the narrower steps."""
    if limits.branches == 1:
        return {}
    columns = Bounds(1, limits.branches, max(limits.branches, limits.beams))
    media = max(min(limits.branch_media * tiles, limits.bank_rows), tiles)
    return {f"{DECODE}.{SHARED}": {"B": batch, "S": columns, "M": Bounds(1, media, media), "K": columns}}


def decode_batches(most: int) -> tuple[int, ...]:
    """Rows of a step that kernels are chosen for: one, a small batch, the largest."""
    return (*(rows for rows in (1, 8) if rows < most), most)


def symbols(spec: SubgraphSpec) -> set[str]:
    """Names of the sizes that vary from call to call in an engine."""
    named = {dim for tensor in (*spec.inputs, *spec.outputs) for dim in tensor.shape if isinstance(dim, str)}
    return named - {CAPACITY}


def shape_of(tensor: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of a tensor when its symbols have these sizes."""
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)


def check_limits(limits: ShapeLimits) -> None:
    """Raises BuildError if no engine can have these limits."""
    faults = [f"{name} is {value}, expected at least 1" for name, value in msgspec.structs.asdict(limits).items() if value < 1]
    if limits.max_length <= max(limits.chunk, limits.beams):
        faults.append(f"max_length {limits.max_length} leaves no room beside a chunk of {limits.chunk} or {limits.beams} beams")
    if limits.max_length <= limits.branches and limits.branches > 1:
        faults.append(f"max_length {limits.max_length} leaves no room beside {limits.branches} branches of a shared row")
    if faults:
        raise BuildError("no engine can have these limits: " + "; ".join(faults))
