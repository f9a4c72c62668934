"""Who is asking: API keys, and the name that a request's turn counts against."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flamingo_export.errors import InputError
from flamingo_export.serve.refusals import ApiError

_LEAST = 16


def read_keys(path: Path) -> dict[str, str]:
    """Keys of a file by their holder's name.

    One line per key: `KEY` or `NAME KEY`; empty lines and lines that begin with `#` are skipped. Raises InputError for a file that cannot
    be read, a key shorter than 16 characters, or a key or name that stands there twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the key file {path} cannot be read: {error}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise InputError(f"{path}, line {number}: expected a key, or a name and a key")
        key = words[-1]
        name = words[0] if len(words) == 2 else f"key {number}"
        if len(key) < _LEAST:
            raise InputError(f"{path}, line {number}: a key has at least {_LEAST} characters")
        if name in keys or key in keys.values():
            raise InputError(f"{path}, line {number}: a name or key that stands there already")
        keys[name] = key
    if not keys:
        raise InputError(f"the key file {path} has no keys, so nobody could use the server")
    return keys


class Access:
    """Knows callers by key, or by address where there are no keys, and bounds what each has under way."""

    def __init__(self, keys: Mapping[str, str], max_per_caller: int | None) -> None:
        # Digests are of one length, so that comparing them tells nothing of a key.
        self._keys = {name: _digest(key) for name, key in keys.items()}
        self._most = max_per_caller
        self._active: Counter[str] = Counter()

    def caller(self, authorization: str | None, address: str) -> str:
        """Who sends this header from this address. Raises ApiError 401 for a missing or unknown key."""
        if not self._keys:
            return address
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(401, "An API key is needed: send the header 'Authorization: Bearer KEY'.", code="missing_api_key")
        given, found = _digest(key.strip()), None
        for name, known in self._keys.items():  # all of them, whichever fits
            if hmac.compare_digest(given, known):
                found = name
        if found is None:
            raise ApiError(401, "The API key is not known here.", code="invalid_api_key")
        return found

    @contextmanager
    def turn(self, caller: str) -> Iterator[None]:
        """Counts a request while it is under way. Raises ApiError 429 if the caller has as many as it may."""
        if self._most is not None and self._active[caller] >= self._most:
            raise ApiError(
                429, f"You have {self._most} requests under way, which is the most.", code="too_many_requests", retry=True
            )
        self._active[caller] += 1
        try:
            yield
        finally:
            self._active[caller] -= 1
            if not self._active[caller]:
                del self._active[caller]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
