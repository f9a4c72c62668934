"""What this process may use of the machine: memory and cores, within the limits of its container (Linux control groups, versions 1 and 2), and a
folder for what it may lose: notes of verified bundles, compiled kernels, timings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60
"""Version 1 says the largest multiple of a page for "no limit"."""


def home() -> Path | None:
    """The user's home folder.

    None where there is none: a user id without HOME and without an entry in passwd, as containers have them. A HOME that is relative or
    empty does not count: what is kept there would lie in whatever folder the command is called from, or in the root folder.
    """
    named = os.environ.get("HOME")
    if named is not None and not os.path.isabs(named):
        return None
    try:
        return Path.home()
    except RuntimeError:
        return None


def user_cache(kind: str) -> Path | None:
    """Folder for one kind of file below the user's cache: `$XDG_CACHE_HOME`, else `~/.cache`. Not made yet.

    None where there is neither; whoever asks then does without the cache. A relative XDG_CACHE_HOME is passed over, as the XDG Base
    Directory Specification asks.
    """
    named, place = os.environ.get("XDG_CACHE_HOME", ""), home()
    root = Path(named) if os.path.isabs(named) else place / ".cache" if place is not None else None
    return root / "flamingo-export" / kind if root is not None else None


def total_memory() -> int:
    """Bytes of memory that there are, or the container's limit where that is less."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Bytes that can be taken now: free or reclaimable on the machine, and left below every limit of the container.

    What the container's files take in the page cache counts as left, since the kernel gives it up first.
    """
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _memory_limits())]))


def usable_cores() -> int:
    """Logical cores that this process may run on, and has a quota for: 1.5 cores' time counts as 2 cores."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_cpu_quotas()]))


def physical_cores() -> int:
    """Usable cores, hyper-threads not counted: more threads than that slow matrix products down."""
    import psutil

    usable = usable_cores()
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes used without the page cache) of each group that this process is in and that has a limit."""
    for folder in _folders(""):
        for name in ("memory.max", "memory.high"):
            if (limit := _number(folder / name)) is not None:
                yield limit, _used(folder / "memory.current", folder / "memory.stat", ("inactive_file", "active_file"))
    for folder in _folders("memory"):
        limit = _number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < _UNLIMITED:
            stat = ("total_inactive_file", "total_active_file")
            yield limit, _used(folder / "memory.usage_in_bytes", folder / "memory.stat", stat)


def _used(current: Path, stat: Path, cache: tuple[str, ...]) -> int:
    lines = dict(line.split(maxsplit=1) for line in _text(stat).splitlines() if " " in line)
    return max(0, (_number(current) or 0) - sum(int(lines.get(name, "0")) for name in cache))


def _cpu_quotas() -> Iterator[int]:
    """Cores' worth of time, rounded up, of each group that has a quota."""
    for folder in _folders(""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit() and int(period):
            yield -(-int(quota) // int(period))
    for folder in _folders("cpu"):
        found, length = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if found is not None and length and found > 0:
            yield -(-found // length)


def _folders(controller: str) -> Iterator[Path]:
    """The folders of this process's group of a controller (version 2: "") and of all groups above it, as far as they can be seen.

    A container sees its own group as the root of what is mounted, whatever path the membership names.
    """
    for line in _text(MEMBERSHIP).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller not in names.split(","):
            continue
        mounts = [CGROUPS / names, CGROUPS / controller] if controller else [CGROUPS, CGROUPS / "unified"]
        seen = set()
        for mount in mounts:
            parts = Path(path).parts[1:] if ".." not in Path(path).parts else ()
            for count in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:count])
                if folder not in seen and folder.is_dir():
                    seen.add(folder)
                    yield folder


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none ("max", or no such file)."""
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return ""
