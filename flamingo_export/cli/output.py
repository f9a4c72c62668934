"""Where things are printed: results on stdout, as text, tables or JSON; progress and remarks on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDTH_WITHOUT_TERMINAL = 132


def results() -> Console:
    """The console of results: stdout, without colour where it is not a terminal."""
    from rich.console import Console

    class Results(Console):
        def print(self, *objects: Any, **settings: Any) -> None:
            """As rich has it, but what does not fit the width is not cut off: the terminal wraps it, a file has it whole."""
            super().print(*objects, **{"crop": False, **settings})

    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Results(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def remarks() -> Console:
    """The console of progress and remarks: stderr."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


@contextmanager
def logged_to_stderr() -> Iterator[None]:
    """Warnings of this package (another backend than asked for, steps that are not captured) are lines on stderr for the length of a `with`
    block. Nothing is left behind: the command may be called from a program that has its own way with logs."""
    import logging

    log = logging.getLogger("flamingo_export")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("flamingo-export: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing where stderr is not a terminal."""
    console = remarks()
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def print_json(value: Any) -> None:
    """`value` (msgspec structs, dataclasses, containers) as indented JSON on stdout."""
    import msgspec

    try:
        text = msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=1).decode()
    except UnicodeEncodeError:  # the name of a file is not UTF-8: an escape for each byte, from which Python has the name back
        text = json.dumps(_finite(msgspec.to_builtins(value, enc_hook=_plain, str_keys=True)), indent=1)
    print(text)


def _finite(value: Any) -> Any:
    """Null for numbers that JSON does not have, as msgspec writes them."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """What msgspec does not encode by itself: numpy's scalars and arrays, and paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, right: Iterable[int] = ()
) -> RenderableType:
    """A plain table; the columns numbered in `right` are aligned to the right, as figures are. The title is a line of its own, not wrapped
    to the table's width."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    numbers = set(right)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made if title is None else Group(Text(title, style="bold", no_wrap=True, overflow="ignore"), made)


def human_bytes(size: float) -> str:
    """A size in bytes with a binary unit: 25.1 GiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def human_count(count: float) -> str:
    """A number of parameters: 435M, 9.30B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}" if count < 100 * limit else f"{count / limit:.0f}{unit}"
    return str(int(count))


def human_seconds(seconds: float) -> str:
    """A length of time in its two largest units: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
