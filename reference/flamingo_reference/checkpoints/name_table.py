"""Literal tables of names: how the tensors of a published model are called here, one line each.

    q_proj       self_attn.q_proj      I,W
    media_norm   0.norm_media          W      bias
    k_proj       0.to_kv               I,W    part 1 of 2
    latents      latents               R,W    exact

Our name, theirs, the shape of ours in sizes that the family names by letters. The names are those of modules: `.weight` is put behind both,
and for `bias` a second line with `.bias` and the first size follows; `exact` names are those of tensors. `part i of n`: ours are the i-th
of n equal stretches of their rows. What no line can say is a function of the family's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from flamingo_reference.arrays import Shape
from flamingo_reference.checkpoints.conversions import Recipe, as_is, rows

_LINE = re.compile(r"(\S+)\s+(\S+)\s+([\w,]+)((?:\s+(?:bias|exact|part \d+ of \d+))*)")
_PART = re.compile(r"part (\d+) of (\d+)")


class Line(msgspec.Struct, frozen=True):
    """One tensor: names, the sizes of ours by their letters, which stretch of their rows it is (1 of 1: all)."""

    ours: str
    theirs: str
    sizes: tuple[str, ...]
    part: int = 1
    parts: int = 1


Table = tuple[Line, ...]


def table(text: str) -> Table:
    """The lines of a table. Raises ValueError for one that is none."""
    found: list[Line] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"no line of a table of names: {line!r}")
        ours, theirs, sizes, how = match.groups()
        part, parts = map(int, stretch.groups()) if (stretch := _PART.search(how)) else (1, 1)
        letters, words = tuple(sizes.split(",")), how.split()
        if "exact" in words:
            found.append(Line(ours, theirs, letters, part, parts))
            continue
        found.append(Line(f"{ours}.weight", f"{theirs}.weight", letters, part, parts))
        if "bias" in words:
            found.append(Line(f"{ours}.bias", f"{theirs}.bias", letters[:1], part, parts))
    return tuple(found)


def filled(lines: Table, ours: str, theirs: str, sizes: Mapping[str, int | Shape]) -> dict[str, Recipe]:
    """Recipes of a table's tensors. ours, theirs: what stands before the names. sizes: what the letters stand for."""
    found: dict[str, Recipe] = {}
    for line in lines:
        shape: Shape = ()
        for letter in line.sizes:
            size = sizes[letter]
            shape += size if isinstance(size, tuple) else (size,)
        name, source = f"{ours}{line.ours}", f"{theirs}{line.theirs}"
        if line.parts == 1:
            found[name] = as_is(source, shape)
        else:
            whole = (line.parts * shape[0], *shape[1:])
            found[name] = rows(source, whole, (line.part - 1) * shape[0], line.part * shape[0])
    return found
