"""Where this program keeps what it may lose: notes of verified bundles, compiled kernels, timings."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(kind: str) -> Path | None:
    """Folder for one kind of file below the user's cache: `$XDG_CACHE_HOME`, else `~/.cache`. Not made yet.

    None where there is neither: a user id without HOME and without an entry in passwd, as containers have them. Whoever asks then does
    without the cache. A relative XDG_CACHE_HOME is passed over, as the XDG Base Directory Specification asks.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "flamingo-export" / kind
