"""What a user reads where a process of Ray's failed: the reason, without the traceback of every process that it passed."""

from __future__ import annotations

import re

_OURS = re.compile(r"^flamingo_export\.errors\.\w+: ", re.MULTILINE)
_ANY = re.compile(r"^[\w.]+(?:Error|Exception): .*$", re.MULTILINE)


def reason_of(text: str) -> str:
    """The last error of ours in what Ray says, else the last exception of others, else the last line: Ray ends with advice."""
    *_, last = re.split(_OURS, text.strip())
    if _OURS.search(text):
        return last
    *_, other = ["", *_ANY.findall(text)]
    return other or last.rpartition("\n")[2]
