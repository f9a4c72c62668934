"""What a user reads where a process of Ray's failed: the reason, without the traceback of every process that it passed."""

from __future__ import annotations

import re

_OURS = re.compile(r"^flamingo_export\.errors\.\w+: ", re.MULTILINE)


def reason_of(text: str) -> str:
    """The last error of ours in what Ray says, else the last line."""
    *_, last = re.split(_OURS, text.strip())
    return last if _OURS.search(text) else last.rpartition("\n")[2]
