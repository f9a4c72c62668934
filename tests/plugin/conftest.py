"""The plugin library with the launcher that records its arguments, and the program that drives it: built once a test run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trt_wheels

from flamingo_export.backends.tensorrt.plugin import LIBRARY

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def run(*command: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """A command that must end; ten minutes are for machines that do much else."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False, **keywords)


def in_child(script: str, *arguments: object, environment: dict[str, str] | None = None) -> Any:
    """What tests/plugin/SCRIPT prints as JSON on its last line; native code that crashes ends the child alone."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    done = run(sys.executable, HERE / script, *arguments, env={**os.environ, "PYTHONPATH": paths, **(environment or {})})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def plugin_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder of trt_plugins/tests/plugin. Skips without compiler, CUDA or TensorRT's headers; a compiler's error fails."""
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "plugin_build"
    with (base / "plugin_build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configured = folder / "configured.txt"
        if not configured.exists():
            done = run("cmake", "-S", ROOT / "trt_plugins" / "tests" / "plugin", "-B", folder)
            assert done.returncode == 0, done.stdout + done.stderr
            done_build = run("cmake", "--build", folder, "--parallel", "2")
            assert done_build.returncode == 0, done_build.stdout + done_build.stderr
            configured.write_text(done.stdout)
    reason = next((line for line in configured.read_text().splitlines() if "the plugin is not built" in line), None)
    if reason:
        pytest.skip(f"{reason.removeprefix('-- ').partition(':')[0]} (docs/plugin.md: TENSORRT_ROOT)")
    return folder


@pytest.fixture(scope="session")
def library(plugin_build: Path) -> Path:
    """The plugin library; its launcher computes nothing."""
    return plugin_build / LIBRARY


@pytest.fixture(scope="session")
def rtx_path(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variable under which TensorRT for RTX finds itself by the name that it looks for."""
    folder = tmp_path_factory.mktemp("rtx")
    (folder / "libtensorrt_rtx.so").symlink_to(trt_wheels.folder("rtx") / "tensorrt_rtx_libs" / "libtensorrt_rtx.so.1")
    return {"LD_LIBRARY_PATH": str(folder)}
