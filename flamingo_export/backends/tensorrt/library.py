"""TensorRT's Python modules: which there are, finding one, and what to do where it is missing.

Nothing is imported before it is needed, and every other module of this package is given the imported one: one body serves datacenter
TensorRT and TensorRT for RTX.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from importlib.util import find_spec
from types import ModuleType

import msgspec

from flamingo_export.errors import BackendError


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """A build of TensorRT: the names its module goes by, and how it is used.

    ahead_of_time: it compiles for other GPUs than this machine's, and without any.
    """

    backend: str
    title: str
    modules: tuple[str, ...]
    install: str
    ahead_of_time: bool
    oldest: tuple[int, int]
    """Major and minor version of the oldest one that has all operators of the graphs."""
    native_functions: frozenset[str] = frozenset()


RTX = Library(
    backend="tensorrt-rtx",
    title="TensorRT for RTX",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    install="pip install tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs",
    ahead_of_time=True,
    oldest=(1, 7),
)
DATACENTER = Library(
    backend="tensorrt",
    title="TensorRT",
    modules=("tensorrt",),
    install="On the GPU host: pip install tensorrt-cu13, or NVIDIA's container, tar or Debian packages of TensorRT 11",
    ahead_of_time=False,
    oldest=(10, 15),
    native_functions=frozenset({"PhiCrossAttention", "PhiRangeCrossAttention"}),
)
LIBRARIES = {library.backend: library for library in (RTX, DATACENTER)}


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU of this machine."""

    target: str
    """`sm89` for compute capability 8.9."""
    memory: int = 0
    """Bytes, 0 where the driver does not say."""


def load(library: Library) -> ModuleType:
    """The library's module. Raises BackendError with what to install where there is none, or it does not load."""
    for name in library.modules:
        if not _there(name):
            continue
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise BackendError(f"{library.title} is installed but does not load ({error}). {library.install}.") from error
        if not hasattr(module, "Builder"):
            raise BackendError(f"{name} is installed without TensorRT's builder. {library.install}.")
        _check_version(library, module)
        return module
    raise BackendError(f"{library.title} is not installed. {library.install}.")


def _check_version(library: Library, module: ModuleType) -> None:
    """Raises BackendError for a version whose parser lacks operators that every decoder has."""
    found = tuple(int(part) for part in re.findall(r"\d+", str(module.__version__))[:2])
    if found < library.oldest:
        wanted = ".".join(map(str, library.oldest))
        raise BackendError(
            f"{library.title} {module.__version__} is too old: its parser has no TensorScatter and Attention as the graphs use them. "
            f"Install {wanted} or later. {library.install}."
        )


def installed(library: Library) -> bool:
    """Whether one of its modules is there; nothing is imported."""
    return any(_there(name) for name in library.modules)


def cuda_python() -> bool:
    """Whether cuda-python's bindings are installed; they are not imported."""
    try:
        return find_spec("cuda.bindings.runtime") is not None
    except (ImportError, ValueError):
        return False


def _there(name: str) -> bool:
    """Whether it can be imported. A mere folder of that name on the path, which Python takes for a package, is not a library."""
    try:
        spec = None if name in sys.modules else find_spec(name)
    except (ImportError, ValueError):
        return False
    return name in sys.modules or (spec is not None and spec.origin is not None)


def device(index: int = 0) -> Device | None:
    """The GPU of that number, asked through the driver's own library; None where there is no driver or no such GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    ordinal, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(ordinal), index) != 0:
        return None
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, ordinal)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, ordinal)
    memory = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), ordinal)
    return Device(target=f"sm{major.value}{minor.value}", memory=memory.value)


def device_count() -> int:
    """GPUs that the driver shows to this process."""
    found = 0
    while device(found) is not None:
        found += 1
    return found


def targets(trt: ModuleType) -> tuple[str, ...]:
    """GPUs that a library compiles for ahead of time: sm75, sm80 and so on."""
    names = getattr(trt, "ComputeCapability", None)
    return tuple(sorted(name.lower() for name in dir(names) if name.startswith("SM"))) if names is not None else ()


def resolve_target(library: Library, trt: ModuleType, wanted: str | None) -> str:
    """The GPU to build for: `wanted`, or this machine's. Raises BackendError saying which can be built for."""
    here = device()
    if not library.ahead_of_time:
        if here is None:
            raise BackendError(
                f"{library.title} builds engines on the GPU that runs them, and there is no NVIDIA driver or GPU here. Build there, "
                "or ahead of time for RTX GPUs on any machine: --backend tensorrt-rtx --target sm89"
            )
        if wanted not in (None, here.target):
            raise BackendError(
                f"{library.title} builds for the GPU of this machine, {here.target}, not for {wanted}. Leave --target out, or build there."
            )
        return here.target
    possible = targets(trt)
    chosen = (wanted or (here.target if here is not None else "")).lower()
    if chosen in possible:
        return chosen
    which = f"no target {chosen!r}" if chosen else "no GPU here to build for, and no --target"
    raise BackendError(
        f"{library.title} {trt.__version__}: {which}. It builds for {', '.join(possible)}: --target {possible[-1]}"
    )
