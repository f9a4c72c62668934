"""Filters and tests that a chat template may use, each bounded by the size of what it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import filters, tests
from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace

MAX_SIZE = 1_000_000
"""Characters and elements of one value."""
_MAX_INDENT = 16
_MAX_TRIMMED = 1000


class TemplateLimit(Exception):
    """A template takes more time or room than there is."""


def measured(value: Any) -> Any:
    """The value itself. Raises TemplateLimit if it is larger than one may be, everything within counted as often as it stands there: a list
    that holds a list twice is twice as long to write, however little memory it takes."""
    _size(value, MAX_SIZE)
    return value


def bounded(values: Iterator[Any]) -> Iterator[Any]:
    """What a filter gives one at a time, all of it together no larger than one value may be: others keep it in lists."""
    left = MAX_SIZE
    for value in values:
        left -= 1 + _size(value, left)
        if left < 0:
            raise TemplateLimit(f"a list grows beyond {MAX_SIZE} characters and elements")
        yield value


def _size(value: Any, most: int) -> int:
    """Characters and elements of a value. Raises TemplateLimit for more than `most`."""
    size, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str | Mapping | list | tuple):
            size += len(item)
            if size > most:
                raise TemplateLimit(f"a value grows beyond {MAX_SIZE} characters and elements")
        if isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
        elif isinstance(item, Namespace) and item is not value:
            raise TemplateLimit("a list holds a namespace")
    return size


def plain_text(value: Any) -> str:
    """A value as text. Raises TemplateLimit for what is none: a namespace, a function."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Undefined | Macro | bool | int | float | Mapping | list | tuple | range) or value is None:
        return "" if isinstance(value, Macro) else str(value)
    raise TemplateLimit(f"a {type(value).__name__} is written as text")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers writes it: letters as they are, nothing escaped for HTML."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=_small(indent), separators=separators, sort_keys=sort_keys)
    # Piece by piece: indents and separators may be far larger than the value.
    pieces, left = [], MAX_SIZE
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise TemplateLimit(f"a text grows beyond {MAX_SIZE} characters")
    return "".join(pieces)


def _small(number: int | None) -> int | None:
    if number is not None and not (isinstance(number, int) and 0 <= number <= _MAX_INDENT):
        raise TemplateLimit(f"an indent is {number!r}, expected a number from 0 to {_MAX_INDENT}")
    return number


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    _small(width)
    if text.count("\n") * width > MAX_SIZE:
        raise TemplateLimit(f"a text grows beyond {MAX_SIZE} characters")
    return str(filters.do_indent(text, width, first, blank))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, before, after = plain_text(value), plain_text(old), plain_text(new)
    found = text.count(before) if before else len(text) + 1
    if found * len(after) > MAX_SIZE:
        raise TemplateLimit(f"a text grows beyond {MAX_SIZE} characters")
    return text.replace(before, after, -1 if count is None else count)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, values: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        get = filters.make_attrgetter(environment, attribute)
        values = [get(value) for value in values]
    between = plain_text(d)
    texts, left = [], MAX_SIZE
    for value in values:
        texts.append(plain_text(value))
        left -= len(texts[-1]) + len(between)
        if left < 0:
            raise TemplateLimit(f"a text grows beyond {MAX_SIZE} characters")
    return between.join(texts)


def _trim(text: Any, chars: str | None = None) -> str:
    if chars is not None and len(chars) > _MAX_TRIMMED:
        raise TemplateLimit(f"trim is given {len(chars)} characters, expected at most {_MAX_TRIMMED}")
    return plain_text(text).strip(chars)


def _listed(values: Any) -> list[Any]:
    """A list of what a generator gives, one element at a time so that it is stopped in time."""
    if not isinstance(values, GeneratorType):
        return list(values)
    found = []
    for value in values:
        found.append(value)
        if len(found) > MAX_SIZE:
            raise TemplateLimit(f"a list grows beyond {MAX_SIZE} elements")
    return found


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Undefined):
        return []
    if not isinstance(value, Mapping):
        raise TypeError("items are those of a dictionary")
    return list(value.items())


def _as_text(convert: Callable[[str], str]) -> Callable[[Any], str]:
    return lambda value: convert(plain_text(value))


FILTERS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "capitalize": _as_text(str.capitalize),
    "count": len,
    "d": filters.do_default,
    "default": filters.do_default,
    "dictsort": filters.do_dictsort,
    "first": filters.do_first,
    "float": filters.do_float,
    "indent": _indent,
    "int": filters.do_int,
    "items": _items,
    "join": _join,
    "last": filters.do_last,
    "length": len,
    "list": _listed,
    "lower": _as_text(str.lower),
    "map": filters.do_map,
    "max": filters.do_max,
    "min": filters.do_min,
    "reject": filters.do_reject,
    "rejectattr": filters.do_rejectattr,
    "replace": _replace,
    "reverse": filters.do_reverse,
    "safe": plain_text,
    "select": filters.do_select,
    "selectattr": filters.do_selectattr,
    "sort": filters.do_sort,
    "string": plain_text,
    "title": _as_text(filters.do_title),
    "tojson": _tojson,
    "trim": _trim,
    "unique": filters.do_unique,
    "upper": _as_text(str.upper),
}
_TESTS: Mapping[str, Any] = tests.TESTS
TESTS: Mapping[str, Callable[..., Any]] = {
    name: _TESTS[name]
    for name in (
        *(
            "boolean",
            "defined",
            "divisibleby",
            "eq",
            "equalto",
            "==",
            "even",
            "false",
            "float",
            "ge",
            ">=",
            "greaterthan",
            "gt",
            ">",
        ),
        *(
            "in",
            "integer",
            "iterable",
            "le",
            "<=",
            "lessthan",
            "lower",
            "lt",
            "<",
            "mapping",
            "ne",
            "!=",
            "none",
            "number",
            "odd",
        ),
        *("sameas", "sequence", "string", "true", "undefined", "upper"),
    )
}
