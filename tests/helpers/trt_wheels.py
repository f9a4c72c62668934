"""TensorRT's Python wheels for tests on any machine: installed once into the tests' cache folder, never into the environment.

    trt_wheels.rtx()       TensorRT for RTX, whose parser and builder need no GPU
    trt_wheels.lean()      the lean runtime, whose plugin registry needs none
    trt_wheels.folder(...) the folder of a set of wheels, for a child process's PYTHONPATH

Each skips the calling test, with a reason, where the wheels cannot be had (no network, no wheel for this Python or platform). `rtx` and
`lean` may be imported in one process.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from flamingo_export.machine import user_cache

WHEELS = {
    "rtx": ("tensorrt_rtx_cu13_bindings==1.7.1.116", "tensorrt_rtx_cu13_libs==1.7.1.116"),
    "lean": ("tensorrt_lean_cu13_bindings==11.4.0.106", "tensorrt_lean_cu13_libs==11.4.0.106"),
    "datacenter-bindings": ("tensorrt_cu13_bindings==11.4.0.106",),
    "datacenter-bindings-10.16": ("tensorrt_cu13_bindings==10.16.1.11",),
    "datacenter-bindings-10.15": ("tensorrt_cu13_bindings==10.15.1.29",),
    "cuda": ("cuda_bindings==13.5.0", "cuda_pathfinder==1.9.0"),
    "cuda-12": ("cuda_bindings==12.9.10", "cuda_pathfinder==1.9.0"),
    "cuda-12-lowest": ("cuda_bindings==12.9.0", "cuda_pathfinder==1.9.0"),
}
CUDA_WHEELS = "FLAMINGO_TESTS_CUDA"
"""Environment variable, for a test process of its own: which of them `cuda` imports, since a process has one."""
_INSTALL_SECONDS = 300


def rtx() -> ModuleType:
    """The module `tensorrt_rtx_bindings`, or a skip."""
    return _module("rtx", "tensorrt_rtx_bindings")


def lean() -> ModuleType:
    """The module `tensorrt_lean_bindings`, or a skip. Never create its `Runtime` without a driver: it crashes."""
    return _module("lean", "tensorrt_lean_bindings")


def cuda() -> ModuleType:
    """cuda-python's `cuda.bindings.runtime`, or a skip. It imports without a driver; each call then says that there is none."""
    return _module(os.environ.get(CUDA_WHEELS, "cuda"), "cuda.bindings.runtime")


def folder(name: str) -> Path:
    """Folder in which the wheels WHEELS[name] are installed, or a skip."""
    found = _installed(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def _module(name: str, module: str) -> ModuleType:
    path = str(folder(name))
    if path not in sys.path:
        sys.path.append(path)
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        pytest.skip(f"{module} does not load here: {error}")


@functools.cache
def _installed(name: str) -> Path | str:
    """The folder, or why there is none. Other test processes wait for the one that installs."""
    wheels = WHEELS[name]
    version = wheels[0].partition("==")[2]
    name = f"{name}-{version}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    shared = Path("~/.cache/flamingo-export/wheels").expanduser() / name
    if shared.is_dir():  # put there once for several work trees; tests write nothing there
        return shared
    cache = user_cache("wheels")
    assert cache is not None, "tests/conftest.py names the cache folder"
    target = cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return target
            return _install(wheels, target)
    except OSError as error:
        return f"no folder for TensorRT's wheels: {error}"


def _install(wheels: tuple[str, ...], target: Path) -> Path | str:
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=1", f"--target={unfinished}", *wheels]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"{', '.join(wheels)}: not installed within {_INSTALL_SECONDS} s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
        return f"{', '.join(wheels)} cannot be installed: {reason}"
    os.replace(unfinished, target)
    return target
