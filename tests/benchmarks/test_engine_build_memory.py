"""The decoder of 3b whole in one engine, streamed to disk by TensorRT for RTX: its memory is what the estimate before a build allows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import trt_wheels

from flamingo_export.backends.tensorrt.estimate import estimate
from flamingo_export.estimates import GIB

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WEIGHTS = 4_763_164_672
"""Bytes of 3b's decoder in bf16."""

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]


@pytest.fixture(scope="module")
def script(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("engine_build_memory")


def test_3b_whole(script: ModuleType, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    needed = estimate(WEIGHTS)
    if psutil.virtual_memory().available < needed.memory:
        pytest.skip(f"the decoder of 3b needs {needed.memory / GIB:.1f} GiB of free memory")
    if shutil.disk_usage(tmp_path).free < 2.2 * WEIGHTS:
        pytest.skip(f"the decoder of 3b needs {2.2 * WEIGHTS / GIB:.1f} GiB of free disk")
    paths = [*filter(None, sys.path), str(trt_wheels.folder("rtx"))]
    command = [sys.executable, str(BENCHMARKS / "engine_build_memory.py"), "--size", "3b", "--json", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    record_property("measured", script.report(result))
    assert result["weight_bytes"] == WEIGHTS
    assert result["fused_attentions"] == result["attentions"] == 48
    # The whole engine is never in memory: anonymous memory has no room for it beside what the compiler holds, 1.23 times the weights.
    assert result["anonymous_peak"] < 1.6 * WEIGHTS
    assert result["resident_peak"] < needed.memory
    assert WEIGHTS <= result["engine_bytes"] <= 1.02 * WEIGHTS
    assert list(tmp_path.iterdir()) == []
