"""Reading published files so that a fault is named by file and line."""

from __future__ import annotations

import csv
import io
import json
import json.decoder
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from flamingo_export.errors import EvaluationError
from flamingo_reference.checkpoints.files.json_file import repeated_keys

_SHOWN = 8
_PIECE = re.compile(r"\.(?P<name>[^.\[`]+)|\[(?P<index>[0-9]+)\]|\[\.\.\.\]")
T = TypeVar("T")


class Faults:
    """Faults found while reading; all are looked for before any is raised."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, path: Path, line: int | None, what: str) -> None:
        """Notes a fault. line: None where the file has no lines that would help."""
        self._found.append(f"{path}{f', line {line}' if line else ''}: {what}")

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self) -> None:
        """Raises EvaluationError if there were any."""
        if self._found:
            more = len(self._found) - _SHOWN
            raise EvaluationError("\n".join(self._found[:_SHOWN]) + (f"\nand {more} more" if more > 0 else ""))


def text_of(path: Path, what: str) -> str:
    """The text of a UTF-8 file. Raises EvaluationError; what: names the file in messages."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise EvaluationError(f"{path} does not exist; expected {what}") from None
    except IsADirectoryError:
        raise EvaluationError(f"{path} is a folder; expected {what}") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text ({error}); expected {what}") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}); expected {what}") from error


def read_json(path: Path, kind: type[T], what: str) -> T:
    """A JSON file of the layout `kind`; fields beyond it are ignored, as published files have many.

    Raises EvaluationError with the line of what is wrong, also for a file that ends too early (an interrupted download).
    """
    text = text_of(path, what)
    try:
        return msgspec.json.decode(text.encode(), type=kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `")
        keys = _keys(place.rstrip("`"))
        line = text.count("\n", 0, _offset_of(text, keys)) + 1
        raise EvaluationError(f"{path}, line {line}{_named(keys)}: {message}; expected {what}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        try:
            json.loads(text)
        except json.JSONDecodeError as fault:
            early = (
                " The file ends too early: was its download interrupted?"
                if fault.pos >= len(text.rstrip()) or fault.msg.startswith("Unterminated")
                else ""
            )
            raise EvaluationError(
                f"{path}, line {fault.lineno}: not JSON ({fault.msg} at column {fault.colno}).{early}"
            ) from None
        except RecursionError:
            pass
        raise EvaluationError(f"{path}: not JSON that can be read ({error})") from None


def line_of(path: Path, *keys: str | int) -> int:
    """The line on which the value under these keys begins, in a JSON file that has been read."""
    text = path.read_bytes().decode("utf-8-sig")
    return text.count("\n", 0, _offset_of(text, keys)) + 1


def read_json_lines(path: Path, kind: type[T], what: str) -> Iterator[tuple[int, T]]:
    """(line, record) of a JSON Lines file; empty lines are skipped. Raises EvaluationError naming every faulty line."""
    faults = Faults()
    decoder = msgspec.json.Decoder(kind)
    found: list[tuple[int, T]] = []
    for number, line in enumerate(text_of(path, what).split("\n"), start=1):
        if line.strip():
            try:
                found.append((number, decoder.decode(line)))
                if twice := repeated_keys(line):
                    faults.add(path, number, f"{', '.join(twice)} is given twice; give each key once")
            except msgspec.ValidationError as error:
                faults.add(path, number, f"{error}; expected {what}")
            except (msgspec.DecodeError, RecursionError) as error:
                faults.add(path, number, f"not JSON ({error})")
    faults.check()
    yield from found


def read_csv(path: Path, columns: Sequence[str], what: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(line, row) of a CSV file with a header that names at least `columns`; the line is the one on which the row ends.

    Raises EvaluationError for columns that are missing or there twice, and for rows of another length.
    """
    reader = csv.reader(io.StringIO(text_of(path, what), newline=""))
    header = next(reader, [])
    if missing := [name for name in columns if name not in header]:
        raise EvaluationError(f"{path}, line 1: no column {', '.join(missing)}; expected {what}")
    if twice := [name for name in columns if header.count(name) > 1]:
        raise EvaluationError(f"{path}, line 1: several columns are called {', '.join(twice)}; expected {what}")
    faults = Faults()
    found = []
    try:
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                faults.add(path, reader.line_num, f"{len(row)} fields, the header has {len(header)}")
                continue
            found.append((reader.line_num, dict(zip(header, row, strict=True))))
    except csv.Error as error:
        faults.add(path, reader.line_num, f"not CSV ({error})")
    faults.check()
    yield from found


def first_of(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of these files that the folder has. Raises EvaluationError naming all of them."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder; expected one with {what}")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise EvaluationError(f"{folder} has none of {', '.join(names)}; expected {what}")


def refuse_duplicates(path: Path, ids: Sequence[str], lines: Sequence[int], faults: Faults) -> None:
    """Notes each id that occurs a second time."""
    seen: dict[str, int] = {}
    for name, line in zip(ids, lines, strict=True):
        if name in seen:
            faults.add(path, line, f"id {name} occurs a second time (first on line {seen[name]})")
        else:
            seen[name] = line


def whole_number(value: str) -> int | None:
    """The number that a CSV field holds, None if it holds none."""
    try:
        return int(value)
    except ValueError:
        return None


def seconds(value: str) -> float | None:
    """The finite, non-negative number of seconds that a CSV field holds, None if it holds none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def _keys(place: str) -> list[str | int]:
    """msgspec's place of a fault, `$.questions[3].image_id`, as keys. `[...]` stands for a key that it does not name, and ends them."""
    keys: list[str | int] = []
    for piece in _PIECE.finditer(place):
        if piece[0] == "[...]":
            break
        keys.append(piece["name"] or int(piece["index"]))
    return keys


def _named(keys: Sequence[str | int]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return f" ({text.lstrip('.')})" if text else ""


_BLANKS = " \t\r\n"
_DECODER = json.JSONDecoder()
_scan = _DECODER.raw_decode
_string: Any = getattr(json.decoder, "scanstring")  # noqa: B009  # which the stubs lack


def _offset_of(text: str, keys: Sequence[str | int]) -> int:
    """Where the value under `keys` begins in a valid JSON text; where its container begins if it has no such key."""
    at = _skip(text, 0)
    for key in keys:
        found = _entry(text, at, key)
        if found is None:
            return at
        at = found
    return at


def _entry(text: str, at: int, key: str | int) -> int | None:
    if text[at] != ("[" if isinstance(key, int) else "{"):
        return None
    number, at = 0, _skip(text, at + 1)
    while text[at] not in "]}":
        name: Any = number
        if isinstance(key, str):
            name, at = _string(text, at + 1)
            at = _skip(text, _skip(text, at) + 1)
        if name == key:
            return at
        at = _skip(text, _scan(text, at)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)
        number += 1
    return None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANKS:
        at += 1
    return at
