"""The benchmark of evaluation runs, in small: what it measures is what it says."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def settings(**given: int) -> argparse.Namespace:
    return argparse.Namespace(**{"threads": 1, "rounds": 1, "items": 2, "size": "nano", "turns": 2, **given})


@pytest.mark.slow
def test_index(tmp_path: Path, benchmark_script: Callable[[str], ModuleType]) -> None:
    found = benchmark_script("evaluation_cpu").index(tmp_path, settings(images=48))
    assert found["seconds"].keys() == found["processor_seconds"].keys() == {"index", "session", "encoder"}
    assert (found["images"], found["copies"]) == (48, 1)
    assert found["ratio_to_the_index_encoder"] == found["seconds"]["index"] / found["seconds"]["encoder"]
    assert (tmp_path / "index1" / "features-00000.safetensors").is_file()


def test_rows(tmp_path: Path, benchmark_script: Callable[[str], ModuleType]) -> None:
    assert benchmark_script("evaluation_cpu").rows(tmp_path, settings(rows=100))["width"] == 1376


@pytest.mark.slow
def test_video(tmp_path: Path, benchmark_script: Callable[[str], ModuleType]) -> None:
    pytest.importorskip("av", reason="video files need the extra `video`")
    assert benchmark_script("evaluation_cpu").video(tmp_path, settings())["frames"] == 30
