"""Inputs made wrong in seeded ways, and what must come of them: an answer, or an error of ours.

Each case has a number, and its random generator is seeded with the name of the test and that number: a find is reproduced by both.
`FLAMINGO_FUZZ=20` runs twenty times as many cases; they begin with the same ones.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import struct
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from flamingo_export.errors import FlamingoExportError

FACTOR = float(os.environ.get("FLAMINGO_FUZZ", "1"))
CASE_SECONDS = 10.0
"""Of processor time, for one case: none takes a tenth of a second that goes as it should."""
CASE_BYTES = 1 << 30
"""By which the peak of the process may grow in a case."""
NUMBERS = (0, 1, -1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 10**9)
STRANGE: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    False,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\0",
    "../../etc/passwd",
    "/dev/zero",
    "é\u2028\U0001f600",
    "a" * 5000,
    [],
    [[]],
    [None],
    [1, 2, 3],
    {},
    {"": None},
    {"a": {"b": [1]}},
)


def rounds(count: int) -> int:
    """How many cases a test runs."""
    return max(1, int(count * FACTOR))


def fuzz(
    name: str, count: int, case: Callable[[random.Random], object], *, answers: bool = True, refusals: bool = True
) -> None:
    """Runs `case` so often, each time with a generator of its own.

    answers, refusals: whether some of the cases must end so; where none does, mutations are too strong or too weak to find anything.
    """
    with memory_limited():
        _fuzz(name, count, case, answers, refusals)


@contextlib.contextmanager
def memory_limited() -> Iterator[None]:
    """Makes a case that asks for all memory an error of Python's, not the end of the process or of its neighbours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * CASE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _fuzz(name: str, count: int, case: Callable[[random.Random], object], answers: bool, refusals: bool) -> None:
    ended = {"answer": 0, "refusal": 0, "error that says nothing": 0}
    finds: dict[str, str] = {}
    for number in range(rounds(count)):
        started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                case(random.Random(f"{name} {number}"))
            ended["answer"] += 1
        except FlamingoExportError as error:
            ended["refusal" if str(error).strip() else "error that says nothing"] += 1
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            kind = f"{type(error).__name__} at {last.filename}:{last.lineno}"
            finds.setdefault(kind, f"case {number}: {error}")
        taken = time.process_time() - started
        assert taken < CASE_SECONDS, f"{name}, case {number} took {taken:.1f} s"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        assert grown < CASE_BYTES, f"{name}, case {number} took {grown >> 20} MiB"
    assert not finds, f"{name}: {len(finds)} kinds of find: {finds}"
    assert not ended["error that says nothing"], name
    assert ended["answer"] or not answers, f"{name}: all {ended['refusal']} cases were refused"
    assert ended["refusal"] or not refusals, f"{name}: none of {ended['answer']} cases was refused"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers of several widths, pieces cut out, doubled, moved or filled."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not changed:
            break
        place = _place(len(changed), rng)
        length = min(len(changed) - place, rng.choice((1, 2, 4, 8, 64, 1000)))
        match rng.randrange(9):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2 | 3:
                kind = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
                size = struct.calcsize(kind)
                changed[place : place + size] = struct.pack(kind, rng.choice(NUMBERS) % 256**size)
            case 4:
                del changed[place : place + length]
            case 5:
                changed[place:place] = changed[place : place + length]
            case 6:
                changed[place : place + length] = rng.randbytes(length)
            case 7:
                del changed[place:]
            case 8:
                other = _place(len(changed), rng)
                changed[place : place + length] = changed[other : other + length]
    return bytes(changed)


def _place(size: int, rng: random.Random) -> int:
    """Anywhere, the beginning more often: headers lie there."""
    return rng.randrange(min(size, 64)) if rng.random() < 0.5 else rng.randrange(size)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three changes anywhere in it: values of other kinds and sizes, keys gone, renamed or new, lists longer."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = list(_holders(changed))
        if not holders:
            return rng.choice(STRANGE)
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match rng.randrange(7):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(STRANGE))
            case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = holder[key] * rng.choice((-1, 0, 2, 3, 1000)) + rng.choice((-1, 0, 1))
            case 4:
                del holder[key]
            case 5 if isinstance(holder, dict):
                holder[rng.choice((f"{key}_", "", "name", "__metadata__"))] = holder.pop(key)
            case 6 if isinstance(holder, list):
                holder.extend([holder[key]] * rng.choice((1, 3)))
            case _:
                holder[key] = [holder[key]]
    return changed


def _holders(value: Any) -> Any:
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def mutated_json_text(value: Any, rng: random.Random) -> bytes:
    """The text of a changed value, or the value's text with changed bytes."""
    if rng.random() < 0.75:
        return json.dumps(mutated_json(value, rng)).encode()
    return mutated(json.dumps(value).encode(), rng)


def mutated_png(data: bytes, rng: random.Random) -> bytes:
    """Changes within a chunk, its length and checksum right again, or chunks gone, doubled or in another order: what a checksum cannot
    tell. The compressed pixels may be changed before they are compressed."""
    chunks: list[tuple[bytes, bytes]] = []
    place = 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.randrange(len(chunks))
        kind, content = chunks[number]
        match rng.randrange(6):
            case 0:
                del chunks[number]
            case 1:
                chunks.insert(rng.randrange(len(chunks) + 1), (kind, content))
            case 2:
                other = rng.randrange(len(chunks))
                chunks[number], chunks[other] = chunks[other], chunks[number]
            case 3 if kind in (b"IDAT", b"fdAT"):
                ahead = 4 if kind == b"fdAT" else 0
                with contextlib.suppress(zlib.error):  # one that was changed before
                    pixels = mutated(zlib.decompress(content[ahead:]), rng)
                    chunks[number] = (kind, content[:ahead] + zlib.compress(pixels))
            case _:
                chunks[number] = (kind, mutated(content, rng))
        if not chunks:
            break
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes in the header's JSON, its length right again, or anywhere in the file."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = mutated_json_text(json.loads(data[8 : 8 + length]), rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutated_zip(data: bytes, rng: random.Random, *, entry: str = "data.pkl") -> bytes:
    """Changes in the entry that ends so, the archive written anew with everything stored, or anywhere in the file."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, mutated(content, rng) if info.filename.endswith(entry) else content)
    return out.getvalue()
