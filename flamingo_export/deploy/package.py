"""Writes the folder of a host from its templates."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from flamingo_export import estimates
from flamingo_export.bundle.manifest import Manifest, read_manifest
from flamingo_export.errors import BuildError
from flamingo_export.files import write_atomically
from flamingo_export.weights import WeightIndex

Host = Literal["docker", "kubernetes", "kserve", "ray", "triton"]
HOSTS: tuple[str, ...] = get_args(Host)
_FIELD = re.compile(r"@([a-z_]+)@")
_UNQUOTABLE = re.compile(r"""["'`$\\\x00-\x1f\x7f]""")
"""In JSON, YAML, shell scripts."""
_GIB = 1 << 30
_SHARED = {"kserve": ("kubernetes", ("claim.yaml", "loader.yaml"))}
"""Files that a host takes from another one's templates."""


def package(bundle: Path, host: str, out: Path) -> list[Path]:
    """Writes what runs this bundle on a host to `out`, and returns the files.

    bundle: read for its name, size and needs; it is not copied.
    host: one of HOSTS.
    out: a folder that is missing or empty.
    Raises BundleError, BuildError for an unknown host, an `out` that holds something or a bundle whose name cannot stand in those files.
    What a failed call has written is removed.
    """
    if host not in HOSTS:
        raise BuildError(f"{host!r} is not a host that there is a folder for. Choose one of {', '.join(HOSTS)}.")
    manifest = read_manifest(bundle)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out} exists and is not an empty folder. Name another one with --out.")
    fields = _fields(bundle, manifest)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    written: list[Path] = []
    try:
        for name, text in sorted(_templates(host)):
            path = out / name
            write_atomically(path, _FIELD.sub(lambda found: fields[found[1]], text).encode())
            written.append(path)
            if text.startswith("#!"):
                path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    except BaseException:
        _take_back(written, out, made)
        raise
    return written


def _take_back(written: Sequence[Path], out: Path, made: Sequence[Path]) -> None:
    """Removes what was written before a failure, so that the same command finds `out` as it was; half a folder looks like a whole one."""
    for path in written:
        path.unlink(missing_ok=True)
    folders = {folder for folder in out.rglob("*") if folder.is_dir()}
    for folder in (*sorted(folders, reverse=True), *made):
        with suppress(OSError):  # holds what somebody else put there
            folder.rmdir()


def _templates(host: str) -> list[tuple[str, str]]:
    """Names within the folder, with `/` between, and texts."""
    found: list[tuple[str, str]] = []
    left = [("", resources.files(__package__).joinpath("templates", host))]
    while left:
        prefix, folder = left.pop()
        for entry in folder.iterdir():
            if entry.is_file():
                found.append((prefix + entry.name, entry.read_text(encoding="utf-8")))
            elif entry.name != "__pycache__":
                left.append((f"{prefix}{entry.name}/", entry))
    if host in _SHARED:
        other, names = _SHARED[host]
        found += [(name, text) for name, text in _templates(other) if name in names]
    return found


def _fields(bundle: Path, manifest: Manifest) -> dict[str, str]:
    """What the templates ask for."""
    size = sum(file.size for file in manifest.files)
    memory = (
        -(-estimates.running(manifest.config, WeightIndex.read(bundle)) // _GIB) + 2
    )  # cache, media and the interpreter beside the weights
    model = bundle.resolve().name.removesuffix(".bundle")
    if _UNQUOTABLE.search(model):
        raise BuildError(
            f"{model!r} has quotes or control characters, which the files to write cannot hold. Rename the bundle's folder."
        )
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:50] or "model"
    return {
        "name": name if name[0].isalpha() else f"model-{name}",
        "model": model,
        "version": version("flamingo-export"),
        "memory": f"{memory}Gi",
        "memory_docker": f"{memory}g",
        "storage": f"{-(-size // _GIB) + 1}Gi",
    }
