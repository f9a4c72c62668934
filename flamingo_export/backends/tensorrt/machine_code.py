"""Which cards a library's CUDA kernels run on: read from the library, so that a card without any is refused in words when an engine is opened.

nvcc stores a "fat binary" for each source: a header, then one entry for each architecture, machine code (cubin) or PTX, which the driver
compiles.
"""

from __future__ import annotations

import functools
import mmap
import struct
from pathlib import Path

import msgspec

from flamingo_export.errors import BackendError

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
_ENTRY = struct.Struct(
    "<HHIQIIHHI"
)  # kind, -, bytes of this header, bytes of the code, -, -, minor and major of the format, architecture
_PTX, _CUBIN = 1, 2
_EMBEDDED = frozenset({72, 87, 101, 110})
"""Jetson and its kin: machine code of another card does not run on them, nor theirs elsewhere."""


class MachineCode(msgspec.Struct, frozen=True):
    """Architectures (89 for 8.9) that there is machine code for, and PTX."""

    cubins: tuple[int, ...]
    ptx: tuple[int, ...]

    def runs_on(self, architecture: int) -> bool:
        """Machine code of the same major version and no later minor one, or PTX of no later architecture, which the driver compiles."""
        if architecture in self.cubins or any(each <= architecture for each in self.ptx):
            return True
        return architecture not in _EMBEDDED and any(
            each // 10 == architecture // 10 and each <= architecture for each in self.cubins if each not in _EMBEDDED
        )

    def __str__(self) -> str:
        named = [f"sm_{each}" for each in self.cubins] + [f"PTX of {each}" for each in self.ptx]
        return ", ".join(named) or "none"


def machine_code(library: Path) -> MachineCode:
    """What a library holds. Raises BackendError where it cannot be read."""
    found: dict[int, set[int]] = {_PTX: set(), _CUBIN: set()}
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.find(_MAGIC)
            while 0 <= at <= len(data) - _HEADER.size:
                _, _, header, size = _HEADER.unpack_from(data, at)
                entry, end = at + header, min(at + header + size, len(data))
                while header >= _HEADER.size and entry + _ENTRY.size <= end:
                    kind, _, own, code, _, _, _, _, architecture = _ENTRY.unpack_from(data, entry)
                    if kind not in found or own < _ENTRY.size:
                        break
                    found[kind].add(architecture)
                    entry += own + code
                at = data.find(_MAGIC, at + len(_MAGIC))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise BackendError(f"the plugin library {library} cannot be read ({error})") from error
    return MachineCode(cubins=tuple(sorted(found[_CUBIN])), ptx=tuple(sorted(found[_PTX])))


@functools.lru_cache(maxsize=16)
def check_card(library: Path, digest: str, target: str) -> None:
    """Raises BackendError if a library has no code for a card. target: `sm89`. digest: of the library, so that each is looked at once."""
    code, architecture = machine_code(library), int(target.removeprefix("sm"))
    if not code.runs_on(architecture):
        raise BackendError(
            f"{library} has no code that this GPU ({target}) runs: it has {code}. Build it for this GPU: CUDAARCHS={architecture} make plugin, "
            "or leave CUDAARCHS out for all from sm_80 on; and build the engines with it."
        )
